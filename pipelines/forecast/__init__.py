"""What an extraction will cost on this machine, measured on made-up pictures and boxes."""
