"""What can be said of a proposal file before it is read: its forms, and the order of a list. Imports no numpy."""

from enum import StrEnum
from pathlib import Path

from hdovd.core.errors import HdovdError

FORMS = (".json", ".npz")  # of proposal files that we write


class ListOrder(StrEnum):
    """Which images a list of proposals goes through."""

    FILE = "file"
    ID = "id"

    @property
    def words(self) -> str:
        return "in the order of its images" if self is ListOrder.FILE else "by ascending image id"


def require_form(out: Path) -> None:
    """Raises HdovdError for a name under which proposals cannot be written, before any work is done for them."""
    if out.suffix not in FORMS or out.is_dir():
        raise HdovdError(f"--out {out}: expected a file whose name ends in {' or '.join(FORMS)}")
