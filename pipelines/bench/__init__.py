"""`hdovd bench`: what the project says of its speed and memory, measured on this machine."""
