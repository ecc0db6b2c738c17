"""The version, for the package, its files and its pages."""

__version__ = "0.2.0"
