"""The program `hdovd`, also as `python -m hdovd`: what has to be settled before the first import that takes time."""

import os
import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C while modules are imported, or while the interpreter ends, ends it without a
    traceback.
    """
    mine = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # else it is ignored: a background job of a shell
    if mine:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _open_standard_streams()
    from hdovd.cli.main import interrupt, main as run

    if mine:
        signal.signal(signal.SIGINT, interrupt)
    try:
        run()
    finally:
        if mine:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _open_standard_streams() -> None:
    """Those that were closed (`<&-`) become /dev/null: else the next file that is opened takes their number, and what
    is printed.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files need not be text


if __name__ == "__main__":
    main()
