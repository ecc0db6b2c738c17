"""Groups of commands, a file a group."""
