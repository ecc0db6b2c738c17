"""What lies in a cache, product by product, from one listing, and what of it nothing uses; and what `hdovd cache ls`,
`info`, `diff` and `gc` print of it, line by line.
"""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hdovd.cache import DEFAULT_SET, INDEX, TABLES, Catalog, FeatureSet, Level, Product, RunRecord, differences
from hdovd.cache.product import recorded_parts
from hdovd.cache.store import Folder
from hdovd.cache.verify import product_names
from hdovd.core import HdovdError, counted, shorten
from hdovd.data import Skips
from hdovd.pipelines.common.console import size
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.common.settings import pair_lines
from hdovd.pipelines.proposal_files.file import made_by_line
from hdovd.pipelines.runs import table_lines
from hdovd.pipelines.search.nearest import index_part

TOGETHER = ("clip", "images", "boxes")  # inputs that the products of one extraction share


@dataclass(frozen=True, slots=True)
class Entry:
    """One product. `product`: None if its metadata cannot be read. `state`: damaged, how much is done, or whole, and
    whether its rows are indexed. `began`: by the clock.
    """

    level: Level
    key: str
    product: Product | None
    size: int
    state: str
    began: float
    users: tuple[str, ...]


def inventory(folder: Folder, users: dict[tuple[Level, str], list[str]]) -> list[Entry]:
    """Every product, in the order of levels, the oldest first."""
    entries = []
    for level, key in product_names(folder):
        prefix, product, state = f"{level}/{key}", None, "damaged"
        listed, records = folder.sizes(prefix), recorded_parts(folder, prefix)
        with suppress(HdovdError):
            product = Product(folder, level, key)
            done = len(records.keys() & set(range(product.parts)))
            state = f"{done}/{product.parts} parts"
            if done == product.parts:
                state = "whole" if TABLES in records else "no tables"
            if any(str(part).startswith(INDEX) for part in records) and index_part(product)[0] in records:
                state += ", indexed"  # not by an index of earlier rows
        began = folder.modified([*listed][-1])  # of its metadata, the last by name, or what there is without them
        entries.append(
            Entry(level, key, product, sum(listed.values()), state, began, tuple(users.get((level, key), ())))
        )
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
    gone = [run for run in catalog.runs() if not run.is_there]
    return Garbage(*unused(inventory(catalog.folder, users)), catalog.folder.stale(), gone)


def delete_garbage(
    catalog: Catalog, garbage: Garbage, *, unfinished: bool, without_set: str | None = None
) -> tuple[int, list[Entry]]:
    """Delete it; returns the bytes that were, and what was left alone because an extraction is at work on it or with
    it.
    """
    doomed = garbage.unused + (garbage.unfinished if unfinished else [])
    claims = catalog.folder.claimed()
    busy = [entry for entry in doomed if any(name.startswith(f"{entry.level}-{entry.key}-") for name in claims)]
    left = _grown(busy, doomed)
    if without_set is not None:
        catalog.delete_set(without_set)
    for entry in doomed:
        if entry not in left:
            prefix = f"{entry.level}/{entry.key}"
            catalog.folder.delete(f"{prefix}/parts")  # first: without records nobody takes the rest for whole
            catalog.folder.delete(prefix)
    for run in garbage.runs:
        catalog.folder.delete(run.file)
    catalog.folder.sweep()
    return garbage.bytes(unfinished=unfinished) - sum(entry.size for entry in left), left


def unused(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """What nothing uses, and apart from it what may belong to an extraction that is running or can go on: products
    without all their parts, and whole ones that could have been begun with them.
    """
    lone = [entry for entry in entries if not entry.users]
    going_on = _grown([entry for entry in lone if not entry.state.startswith(("whole", "damaged"))], lone)
    return [entry for entry in lone if entry not in going_on], going_on


def _grown(some: Sequence[Entry], entries: Sequence[Entry]) -> list[Entry]:
    """`some` with all `entries` that could be of the same extractions."""
    found = list(some)
    for one in found:  # which grows meanwhile
        found += [entry for entry in entries if entry not in found and _together(entry, one)]
    return [entry for entry in entries if entry in found]


def _together(a: Entry, b: Entry) -> bool:
    """Whether nothing in their inputs keeps two products from being of one extraction."""
    if a.product is None or b.product is None or a.level is b.level:
        return False
    one, other = a.product.attributes["key_inputs"], b.product.attributes["key_inputs"]
    same = [one[name] == other[name] for name in TOGETHER if name in one and name in other]
    # pseudo labels name the products that they were made from
    return one.get(b.level) == b.key or other.get(a.level) == a.key or (bool(same) and all(same))


LEAST_PREFIX = 4  # characters of a key
MEANING = {
    "images.count": "images",
    "images.hash": "which images, of what file name and size",
    "boxes.count": "rows",
    "boxes.hash": "where the boxes are, and of which images",
    "base_boxes.hash": "the annotated boxes and their ids",
    "proposals.hash": "the proposals and their scores",
    "clip.weights_sha256": "the CLIP's weights",
    "clip.architecture": "the CLIP's model",
    "clip.compute_dtype": "the precision that the CLIP ran in",
    "tokens": "what the tokenizer makes of the prompts",
    "offered": "which nouns an image's captions offer",
    "sources": "which rows are proposals",
    "top_k": "how many nouns a label is made of",
    "temperature": "how sharply they are weighed",
    "instance": "the embeddings that were named",
    "noun": "the nouns to name them by",
}
HEAD = ("level", "key", "state", "rows", "size", "model", "precision", "age")
NUMBERS = {"rows", "size", "age"}
AGES = (
    (2 * 86_400, 86_400, "d"),
    (2 * 3_600, 3_600, "h"),
    (60, 60, "min"),
    (-math.inf, 1, "s"),
)  # from so many seconds on


# --- ls ---


def product_lines(catalog: Catalog) -> list[str]:
    """All products as a table, and totals."""
    try:
        users, note = catalog.users(), []
    except HdovdError as error:
        users, note = {}, [f"note: who uses what is not known: {error}"]
    entries = inventory(catalog.folder, users)
    if not entries:
        return [f"{catalog.folder.url} is empty: hdovd extract-clip --cache {catalog.folder.url} fills it", *note]
    users_of = [[user if user.startswith("set ") else f"run {Path(user).name}" for user in e.users] for e in entries]
    cells = [(*_cells(entry), shorten(of, 4) or "-") for entry, of in zip(entries, users_of, strict=True)]
    unfinished = sum(not entry.state.startswith(("whole", "damaged")) for entry in entries)
    return [
        *table_lines((*HEAD, "used by"), cells, NUMBERS),
        f"{counted(len(entries), 'product')}{f' ({unfinished} not finished)' if unfinished else ''}, "
        f"{size(sum(entry.size for entry in entries))}",
        *note,
    ]


def _cells(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.level),
        entry.key[:12],
        entry.state,
        f"{entry.product.rows:,d}" if entry.product is not None else "-",
        size(entry.size),
        *_model(entry),
        age(time.time() - entry.began),
    )


def _model(entry: Entry) -> tuple[str, str]:
    """The CLIP and its precision; of pseudo labels, which are made of what stands there, no precision."""
    if entry.product is None:
        return "-", "-"
    inputs, made_with = entry.product.attributes["key_inputs"], entry.product.attributes["made_with"]
    clip = inputs.get("clip", {})
    name = "/".join(str(made_with[part]) for part in ("clip", "pretrained") if made_with.get(part)) or "-"
    if name == "local-dir" and "weights_sha256" in clip:  # a folder's name is not kept: say which weights
        name += f" {clip['weights_sha256'][:8]}"
    dtype = str(clip.get("compute_dtype", "-"))
    return name, Precision.of(dtype) or dtype


def age(seconds: float) -> str:
    """A time span in its largest unit."""
    length, unit = next((length, unit) for least, length, unit in AGES if seconds >= least)
    return f"{max(seconds, 0) / length:.0f} {unit}"


# --- info ---


def info_lines(catalog: Catalog, name: str | None) -> list[str]:
    """A set (by default the only one, or the default one) or a product, whole. Raises HdovdError for a name that is
    neither.
    """
    sets = catalog.sets()
    wanted = name or (next(iter(sets)) if len(sets) == 1 else DEFAULT_SET)
    entries = inventory(catalog.folder, catalog.users())
    if wanted in sets:
        return _set_lines(catalog, wanted, sets[wanted], entries)
    product = find_product(catalog, wanted)
    return _product_lines(next(e for e in entries if (e.level, e.key) == (product.level, product.key)), product)


def _set_lines(catalog: Catalog, name: str, features: FeatureSet, entries: Sequence[Entry]) -> list[str]:
    mine = [entry for entry in entries if (entry.level, entry.key) in features.levels.items()]
    lines = [
        f"set {name} of {catalog.folder.url}: {counted(len(mine), 'product')}, "
        f"{size(sum(entry.size for entry in mine))}",
        *(f"  {line}" for line in table_lines(HEAD, [_cells(entry) for entry in mine], NUMBERS)),
        *(
            f"  {level} {key[:12]} is not there: hdovd cache verify"
            for level, key in features.levels.items()
            if (level, key) not in {(e.level, e.key) for e in mine}
        ),
        "made from" if features.made_from else "made from: imported, nothing to make it again from",
        *pair_lines(features.made_from),
    ]
    if features.proposals:
        made_by = features.proposals.get("made_by")
        lines += [
            f"proposals {features.proposals.get('identity')} of {features.proposals.get('file')}, "
            + ("made by" if made_by else made_by_line(None)),
            *pair_lines(made_by or {}),
        ]
    adds = "; extract-clip, run again, adds it" if features.made_from else ""
    lines += ['text embedding of "object": ' + ("there" if features.object_text else f"none{adds}")]
    if features.label_weights:
        lines += ["weight of pseudo labels, fitted to those of base boxes", *pair_lines(features.label_weights)]
    lines += Skips(features.skipped).lines() or ["skipped: nothing"]
    failed = {
        image: reason
        for entry in mine
        if entry.level in (Level.IMAGE, Level.INSTANCE) and entry.product is not None
        for image, reason in entry.product.failed().items()
    }
    runs = [run for run in catalog.runs() if set(run.levels.items()) & set(features.levels.items())]
    return [
        *lines,
        *_failed_lines(failed),
        f"runs that use it: {len(runs) or 'none'}",
        *(f"  {run.path}{'' if run.is_there else ' (gone)'}" for run in runs),
    ]


def _product_lines(entry: Entry, product: Product) -> list[str]:
    parts = (
        f", {counted(product.parts, 'part')} of at most {product.part_rows:,d} rows"
        if product.parts
        else ", tables alone"
    )
    values = {
        "state": entry.state + parts,
        "rows": f"{product.rows:,d}" + (f" of {product.dim} values" if product.dim else ""),
        "size": size(entry.size),
        "model": ", ".join(_model(entry)),
        "begun": f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.began))}, {age(time.time() - entry.began)} "
        f"ago",
        "used by": ", ".join(entry.users) or "nothing",
    }
    made_with = product.attributes["made_with"]
    return [
        f"{entry.level} {entry.key}",
        *(f"  {name:10s}{value}" for name, value in values.items()),
        *(["made with", *pair_lines(made_with)] if made_with else []),
        "key inputs",
        *pair_lines(product.attributes["key_inputs"]),
        *(_failed_lines(product.failed()) if entry.level in (Level.IMAGE, Level.INSTANCE) else []),
    ]


def _failed_lines(failed: dict[int, str]) -> list[str]:
    if not failed:
        return ["images that could not be read: none"]
    return [
        f"images that could not be read: {len(failed)}; extract-clip --retry-failed tries them again",
        *(f"  {image}  {reason}" for image, reason in sorted(failed.items())),
    ]


# --- diff ---


def find_product(catalog: Catalog, name: str) -> Product:
    """The product whose key begins so. Raises HdovdError if there is none, or more than one."""
    keys = product_names(catalog.folder)
    found = [(level, key) for level, key in keys if len(name) >= LEAST_PREFIX and key.startswith(name)]
    if len(found) != 1:
        raise HdovdError(
            f"{catalog.folder.url} has no set {name}, and {len(found)} products whose keys begin so: give a set, or "
            f"{LEAST_PREFIX} characters of a key at least, so many that it is one product's. Sets: "
            f"{', '.join(catalog.sets()) or 'none, as long as no extraction has finished'}; "
            f"products: {', '.join(f'{level} {key[:12]}' for level, key in found or keys) or 'none'}"
        )
    return Product(catalog.folder, *found[0])


def difference_lines(a: Catalog, a_name: str, b: Catalog, b_name: str) -> list[str]:
    """Which inputs differ between two products, or two sets, level by level."""
    sides = (a_name, b_name) if a_name != b_name else (f"{a_name} of {a.folder.url}", f"{b_name} of {b.folder.url}")
    one, other = _products_of(a, a_name), _products_of(b, b_name)
    both = [level for level in Level if level in one and level in other]
    if not both:
        raise HdovdError(
            f"{sides[0]} is {', '.join(one)} and {sides[1]} is {', '.join(other)}: only products of one level can be "
            f"compared"
        )
    lines = []
    for level in both:
        if one[level].key == other[level].key:
            lines.append(f"{level}: the same, {one[level].key[:12]}")
            continue
        inputs = [product.attributes["key_inputs"] for product in (one[level], other[level])]
        found = [line.partition(" ") for line in differences(*inputs, sides=(f"{sides[0]} has", f"{sides[1]} has"))]
        lines += [
            f"{level}: {one[level].key[:12]} and {other[level].key[:12]}",
            *(f"  {path}{f' ({MEANING[path]})' if path in MEANING else ''} {rest}" for path, _, rest in found),
        ]
    if len(one) > 1 and len(other) > 1:
        lines += [
            *(f"{level}: only {sides[0]} has it" for level in one if level not in other),
            *(f"{level}: only {sides[1]} has it" for level in other if level not in one),
        ]
    return lines


def _products_of(catalog: Catalog, name: str) -> dict[Level, Product]:
    sets = catalog.sets()
    if name in sets:
        return {level: Product(catalog.folder, level, key) for level, key in sets[name].levels.items()}
    product = find_product(catalog, name)
    return {product.level: product}


# --- gc ---


def garbage_lines(garbage: Garbage) -> list[str]:
    """What could be deleted, by kind."""
    lines = []
    for head, entries in (
        ("no set and no run uses", garbage.unused),
        ("not finished, or begun with what is not: an extraction may be running, or can go on", garbage.unfinished),
    ):
        if entries:
            lines += [head, *(f"  {line}" for line in table_lines(HEAD, [*map(_cells, entries)], NUMBERS))]
    if garbage.partial:
        lines.append(
            f"half-written by processes that are dead: {counted(len(garbage.partial), 'file')}, "
            f"{size(sum(garbage.partial.values()))}"
        )
    if garbage.runs:
        lines += ["records of runs whose folder is gone", *(f"  {run.path}" for run in garbage.runs)]
    return lines
