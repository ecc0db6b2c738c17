"""Commands that take something out of hdovd or bring something in, one file each."""
