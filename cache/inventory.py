"""What lies in a cache, product by product, from one listing; and what of it nothing uses. For `hdovd cache ls`, `info`
and `gc`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from hdovd.cache.catalog import Catalog, RunRecord
from hdovd.cache.local import CLAIMS, PARTIAL, is_stale, lock, unlock
from hdovd.cache.product import Product
from hdovd.cache.schema import TABLES, Level
from hdovd.cache.store import Folder
from hdovd.cache.verify import product_names
from hdovd.core.errors import HdovdError

TOGETHER = ("clip", "images", "boxes")  # inputs that the products of one extraction share


@dataclass(frozen=True, slots=True)
class Entry:
    """One product. `product`: None if its metadata cannot be read. `done`: parts; `touched`: when it was last written
    to, by the clock.
    """

    level: Level
    key: str
    product: Product | None
    size: int
    done: int
    whole: bool
    began: float
    touched: float
    users: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return f"{self.level}/{self.key}"

    @property
    def state(self) -> str:
        if self.product is None:
            return "damaged"
        if self.whole:
            return "whole"
        return "no tables" if self.done == self.product.parts else f"{self.done}/{self.product.parts} parts"


def inventory(folder: Folder, users: dict[tuple[Level, str], list[str]]) -> list[Entry]:
    """Every product, in the order of levels, the oldest first."""
    entries = []
    for level, key in product_names(folder):
        listed = folder.sizes(f"{level}/{key}")
        records = [name for name in listed if name.startswith(f"{level}/{key}/parts/")]
        numbers = {int(name[-11:-5]) for name in records if name[-11:-5].isdigit()}
        try:
            product: Product | None = Product(folder, level, key)
        except HdovdError:
            product = None
        done = numbers if product is None else numbers & set(range(product.parts))
        whole = product is not None and product.record_name(TABLES) in records and len(done) == product.parts
        began = folder.modified(next(iter(listed))) if product is None else product.modified()
        touched = max([began, *(folder.modified(name) for name in records[-2:])])
        its_users = tuple(users.get((level, key), ()))
        entries.append(Entry(level, key, product, sum(listed.values()), len(done), whole, began, touched, its_users))
    return sorted(entries, key=lambda e: (list(Level).index(e.level), e.began))


@dataclass(slots=True)
class Garbage:
    """What nothing uses. `unfinished`: products that lack parts, and whole ones that may belong to the same extraction.

    `partial`: sizes of the files that dead processes left half-written; `runs`: records of runs whose folder is gone.
    """

    unused: list[Entry] = field(default_factory=list)
    unfinished: list[Entry] = field(default_factory=list)
    partial: dict[str, int] = field(default_factory=dict)
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def everything(self) -> list[object]:
        return [*self.unused, *self.unfinished, *self.partial, *self.runs]

    def bytes(self, *, unfinished: bool) -> int:
        return sum(e.size for e in self.unused + (self.unfinished if unfinished else [])) + sum(self.partial.values())


def find_garbage(catalog: Catalog, without_set: str | None = None) -> Garbage:
    """What could be deleted, as if the set `without_set` were not there. Raises HdovdError if it is not, or if a set or
    run is damaged.
    """
    sets = catalog.sets()
    if without_set is not None and without_set not in sets:
        raise HdovdError(f"{catalog.folder.url} has no set {without_set}; it has {', '.join(sets) or 'none'}")
    users = {product: [user for user in of if user != f"set {without_set}"] for product, of in catalog.users().items()}
    unused = [entry for entry in inventory(catalog.folder, users) if not entry.users]
    unfinished, root = of_unfinished_extractions(unused), catalog.folder.path("")
    files = sorted(root.rglob(f"{PARTIAL}*")) if root is not None else []
    partial = {
        file.relative_to(root).as_posix(): file.stat().st_size for file in files if root is not None and is_stale(file)
    }
    return Garbage(
        [e for e in unused if e not in unfinished],
        unfinished,
        partial,
        [run for run in catalog.runs() if not run.is_there],
    )


def delete_garbage(
    catalog: Catalog, garbage: Garbage, *, unfinished: bool, without_set: str | None = None
) -> tuple[int, list[Entry]]:
    """Delete it; returns the bytes that were, and what was left alone because an extraction is at work on it or with
    it.
    """
    doomed = garbage.unused + (garbage.unfinished if unfinished else [])
    claims = _claimed(catalog.folder)
    left = _grown(
        [entry for entry in doomed if any(name.startswith(f"{entry.level}-{entry.key}-") for name in claims)], doomed
    )
    if without_set is not None:
        catalog.delete_set(without_set)
    for entry in doomed:
        if entry not in left:
            catalog.folder.delete(f"{entry.prefix}/parts")  # first: without records nobody takes the rest for whole
            catalog.folder.delete(entry.prefix)
    for run in garbage.runs:
        catalog.folder.delete(run.file)
    catalog.folder.sweep()
    return garbage.bytes(unfinished=unfinished) - sum(entry.size for entry in left), left


def of_unfinished_extractions(unused: Sequence[Entry]) -> list[Entry]:
    """Products without all their parts, and whole ones that could have been begun with them: their extraction may be
    running.
    """
    return _grown([entry for entry in unused if not entry.whole and entry.product is not None], unused)


def _grown(some: Sequence[Entry], entries: Sequence[Entry]) -> list[Entry]:
    """`some` with all `entries` that could be of the same extractions."""
    found, new = list(some), list(some)
    while new:
        new = [entry for entry in entries if entry not in found and any(_together(entry, other) for other in new)]
        found += new
    return [entry for entry in entries if entry in found]


def _together(a: Entry, b: Entry) -> bool:
    """Whether nothing in their inputs keeps two products from being of one extraction."""
    if a.product is None or b.product is None or a.level is b.level:
        return False
    one, other = a.product.attributes["key_inputs"], b.product.attributes["key_inputs"]
    same = [one[name] == other[name] for name in TOGETHER if name in one and name in other]
    named = (
        one.get(b.level) == b.key or other.get(a.level) == a.key
    )  # pseudo labels name the products that they were made from
    return named or (bool(same) and all(same))


def _claimed(folder: Folder) -> set[str]:
    """The names of what processes are writing right now, as far as locks tell."""
    claims, busy = folder.path(CLAIMS), set()
    for path in sorted(claims.glob("*")) if claims is not None else ():
        try:
            handle = lock(path, 0)
        except OSError:  # no locks here, or not ours to open
            continue
        if handle is None:
            busy.add(path.name)
        else:
            unlock(path, handle)
    return busy
