"""The one exception that users see: `cli` prints its text without a traceback."""


class HdovdError(Exception):
    """Bad input. The text names the file and id, what was expected, what was found and what to do."""


def shorten(items: list[object], most: int = 8) -> str:
    """`items` in one line, cut after `most` with a count of the rest."""
    shown = ", ".join(map(str, items[:most]))
    return shown if len(items) <= most else f"{shown} and {len(items) - most} more"
