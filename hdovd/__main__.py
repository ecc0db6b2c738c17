"""The program `hdovd`, also as `python -m hdovd`: what has to be settled before the first import that takes time."""

import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C while modules are imported ends it without a traceback."""
    _open_standard_streams()
    try:
        from hdovd.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell says of it


def _open_standard_streams() -> None:
    """Those that were closed (`<&-`) become /dev/null: else the next file that is opened takes their number, and what
    is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # takes the lowest number that is free
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be text


if __name__ == "__main__":
    main()
