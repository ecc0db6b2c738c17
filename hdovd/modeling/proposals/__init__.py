"""Class-agnostic proposal networks: the object localisation network and its baseline."""
