"""What `hdovd cache ls`, `info`, `diff` and `gc` print, line by line."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.identity import KeyInputs, differences
from hdovd.cache.inventory import Entry, Garbage, inventory, of_unfinished_extractions
from hdovd.cache.product import Product
from hdovd.cache.schema import DEFAULT_SET, TABLES, Level
from hdovd.cache.verify import product_names
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.data.coco import Skips
from hdovd.pipelines.common.console import size
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.common.settings import pair_lines
from hdovd.pipelines.extraction.boxes import match_rows
from hdovd.pipelines.proposal_files.file import made_by_line

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
    lines = _table((*HEAD, "used by"), [(*_cells(entry, entries), _users(entry)) for entry in entries])
    unfinished = sum(entry.product is not None and not entry.whole for entry in entries)
    total = size(sum(entry.size for entry in entries))
    lines.append(f"{counted(len(entries), 'product')}{f' ({unfinished} not finished)' if unfinished else ''}, {total}")
    if note:
        return lines + note
    unused = [entry for entry in entries if not entry.users]
    going_on = of_unfinished_extractions(unused)
    rest = [entry.size for entry in unused if entry not in going_on]
    if going_on:
        lines.append(
            f"{len(going_on)} of them belong to an extraction that is running, or can go on by its extract-clip command"
        )
    if rest:
        lines.append(
            f"no set and no run uses {len(rest)} of them, {size(sum(rest))}: hdovd cache gc {catalog.folder.url}"
        )
    return lines


def _cells(entry: Entry, entries: Sequence[Entry]) -> tuple[str, ...]:
    rows = f"{entry.product.rows:,d}" if entry.product is not None else "-"
    return (
        str(entry.level),
        entry.key[:12],
        entry.state,
        rows,
        size(entry.size),
        *_model(entry, entries),
        age(time.time() - entry.began),
    )


def _model(entry: Entry, entries: Sequence[Entry]) -> tuple[str, str]:
    """The CLIP and its precision."""
    if entry.product is None:
        return "-", "-"
    inputs, made_with = entry.product.attributes["key_inputs"], entry.product.attributes["made_with"]
    for other in entries:
        if other.product is not None and other.key == inputs.get(
            Level.INSTANCE
        ):  # pseudo labels: that of the embeddings they come from
            inputs = other.product.attributes["key_inputs"]
    clip = inputs.get("clip", {})
    name = "/".join(str(made_with[part]) for part in ("clip", "pretrained") if made_with.get(part)) or "-"
    if name == "local-dir" and "weights_sha256" in clip:  # a folder's name is not kept: say which weights
        name += f" {clip['weights_sha256'][:8]}"
    dtype = str(clip.get("compute_dtype", "-"))
    return name, Precision.of(dtype) or dtype


def _users(entry: Entry) -> str:
    return shorten([user if user.startswith("set ") else f"run {Path(user).name}" for user in entry.users], 4) or "-"


def age(seconds: float) -> str:
    """A time span in its largest unit."""
    length, unit = next((length, unit) for least, length, unit in AGES if seconds >= least)
    return f"{max(seconds, 0) / length:.0f} {unit}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return [
        indent
        + "  ".join(
            text.rjust(width) if name in NUMBERS else text.ljust(width)
            for name, text, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in [head, *rows]
    ]


# --- info ---


def info_lines(catalog: Catalog, name: str | None) -> list[str]:
    """A set (by default the default one) or a product, whole. Raises HdovdError for a name that is neither."""
    sets = catalog.sets()
    if name is None and DEFAULT_SET not in sets:
        known = (
            f"its sets: {', '.join(sets)}; hdovd cache info {catalog.folder.url} NAME tells more of one"
            if sets
            else "no set is finished yet; these are its products"
        )
        return [f"{catalog.folder.url} has no set {DEFAULT_SET}: {known}", "", *product_lines(catalog)]
    wanted = name or DEFAULT_SET
    entries = inventory(catalog.folder, catalog.users())
    if wanted in sets:
        return _set_lines(catalog, wanted, sets[wanted], entries)
    product = find_product(catalog, wanted)
    return _product_lines(next(e for e in entries if (e.level, e.key) == (product.level, product.key)), entries)


def _set_lines(catalog: Catalog, name: str, features: FeatureSet, entries: Sequence[Entry]) -> list[str]:
    mine = [entry for entry in entries if (entry.level, entry.key) in features.levels.items()]
    lines = [
        f"set {name} of {catalog.folder.url}: {counted(len(mine), 'product')}, "
        f"{size(sum(entry.size for entry in mine))}",
        *_table(HEAD, [_cells(entry, entries) for entry in mine], "  "),
    ]
    lines += [
        f"  {level} {key[:12]} is not there: hdovd cache verify"
        for level, key in features.levels.items()
        if (level, key) not in {(e.level, e.key) for e in mine}
    ]
    lines += (
        ["made from", *pair_lines(features.made_from)]
        if features.made_from
        else ["made from: imported, nothing to make it again from"]
    )
    if features.proposals:
        made_by = features.proposals.get("made_by")
        lines += [
            f"proposals {features.proposals.get('identity')} of {features.proposals.get('file')}, "
            + ("made by" if made_by else made_by_line(None)),
            *pair_lines(made_by or {}),
        ]
    adds = "; extract-clip, run again, adds it" if features.made_from else ""
    lines += ['text embedding of "object": ' + ("there" if features.object_text else f"none{adds}")]
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


def _product_lines(entry: Entry, entries: Sequence[Entry]) -> list[str]:
    product = entry.product
    if product is None:
        return [
            f"{entry.level} {entry.key}: its metadata are damaged: hdovd cache verify --repair, then its extract-clip "
            f"command"
        ]
    parts = (
        f", {counted(product.parts, 'part')} of at most {product.part_rows:,d} rows"
        if product.parts
        else ", tables alone"
    )
    values = {
        "state": entry.state + parts,
        "rows": f"{product.rows:,d}" + (f" of {product.dim} values" if product.dim else ""),
        "size": size(entry.size),
        "model": ", ".join(_model(entry, entries)),
        "begun": f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(entry.began))}, {age(time.time() - entry.began)} "
        f"ago",
        "used by": ", ".join(entry.users) or "nothing",
    }
    lines = [f"{entry.level} {entry.key}", *(f"  {name:10s}{value}" for name, value in values.items())]
    lines += ["made with", *pair_lines(product.attributes["made_with"])] if product.attributes["made_with"] else []
    lines += ["key inputs", *pair_lines(product.attributes["key_inputs"])]
    return lines + (_failed_lines(product.failed()) if entry.level in (Level.IMAGE, Level.INSTANCE) else [])


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
    if len(found) == 1:
        return Product(catalog.folder, *found[0])
    if found:
        raise HdovdError(
            f"{name} begins {len(found)} keys of {catalog.folder.url}, give more of it: "
            + ", ".join(f"{level} {key}" for level, key in found)
        )
    short_name = f" ({LEAST_PREFIX} characters of a key at least)" if len(name) < LEAST_PREFIX else ""
    raise HdovdError(
        f"{catalog.folder.url} has no set and no product {name}{short_name}. Sets: "
        f"{', '.join(catalog.sets()) or 'none'}; "
        f"products: {', '.join(f'{level} {key[:12]}' for level, key in keys) or 'none'}"
    )


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
            *(f"  {line}" for line in _row_differences(one[level], other[level], inputs, sides)),
        ]
    if len(one) > 1 and len(other) > 1:
        lines += [f"{level}: only {sides[0]} has it" for level in one if level not in other]
        lines += [f"{level}: only {sides[1]} has it" for level in other if level not in one]
    return lines


def _products_of(catalog: Catalog, name: str) -> dict[Level, Product]:
    sets = catalog.sets()
    if name in sets:
        return {level: Product(catalog.folder, level, key) for level, key in sets[name].levels.items()}
    product = find_product(catalog, name)
    return {product.level: product}


def _row_differences(a: Product, b: Product, inputs: Sequence[KeyInputs], sides: Sequence[str]) -> list[str]:
    """What a hash does not say: how many images (of one id, file name and size) and boxes (of one image and place) are
    the same.
    """
    if not all(of.get("images") for of in inputs) or not (a.is_finished(TABLES) and b.is_finished(TABLES)):
        return []
    rows = {"images": [[product.table(name) for name in ("image_id", "image_hash")] for product in (a, b)]}
    if "boxes" in inputs[0]:
        rows["boxes"] = [
            [*(np.repeat(column, np.diff(product.table("offset"))) for column in images), product.table("box")]
            for product, images in zip((a, b), rows["images"], strict=True)
        ]
    lines = []
    for what in (what for what in rows if inputs[0][what] != inputs[1][what]):
        one, other = rows[what]
        in_b, in_a = match_rows(one, other) >= 0, match_rows(other, one) >= 0
        lone = [f"{int((~found).sum()):,d} only {side} has" for found, side in zip((in_b, in_a), sides, strict=True)]
        lines.append(f"{what}: {int(in_b.sum()):,d} are the same, {lone[0]}, {lone[1]}")
    return lines


# --- gc ---


def garbage_lines(garbage: Garbage) -> list[str]:
    """What could be deleted, by kind."""
    lines = []
    for head, entries in {
        "no set and no run uses": garbage.unused,
        "not finished, or begun with what is not: an extraction may be running, or was killed and can go on": garbage.unfinished,  # noqa: E501
    }.items():
        rows = [(*_cells(entry, entries), f"{age(time.time() - entry.touched)} ago") for entry in entries]
        lines += [head, *_table((*HEAD, "last written"), rows, "  ")] if entries else []
    if garbage.partial:
        total = size(sum(garbage.partial.values()))
        lines.append(f"half-written by processes that are dead: {counted(len(garbage.partial), 'file')}, {total}")
    if garbage.runs:
        lines += ["records of runs whose folder is gone", *(f"  {run.path}" for run in garbage.runs)]
    return lines
