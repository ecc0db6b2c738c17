"""What every stage needs of the machine: the cores that it may use, and the precision that suits its device."""
