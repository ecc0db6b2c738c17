"""`python -m hdovd` is the command `hdovd`."""

from hdovd.cli.main import main

if __name__ == "__main__":
    main()
