"""What the rows of the class and noun levels are made from: names, several names of one class, or a file of class
embeddings; and the text embedding of the word "object", by which AdaMixer knows objects.

`extract_clip` embeds that word with the templates of the class names and keeps it in the set's own file: as a level
of the cache, or a row among the classes, one row would give every cache that is there other keys. `train` hands it to
the detector. K names, D embedding size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.catalog import FeatureSet
from hdovd.cache.identity import KeyInputs, hash_tables, key_of
from hdovd.core.errors import HdovdError, Unfit, require_readable, shorten
from hdovd.core.log import log
from hdovd.core.text_files import checked_name, read_toml, shown
from hdovd.modeling.base import Detector
from hdovd.pipelines.common.tensors import floats, load_pth, load_tensors
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.prompts import Name, said


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """Names in row order. `synonyms`: all the names of a row, its own among them or not, where it has others than its
    own.

    `embeddings`: (K, D) float32 as a file has them, instead of CLIP's text embeddings of the names.
    """

    names: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    embeddings: np.ndarray | None = None

    @property
    def texts(self) -> list[Name]:
        """What goes into each row, (K)."""
        return [said(self.synonyms.get(name, name)) for name in self.names]

    def inputs(self, clip: Teacher, templates: Sequence[str]) -> KeyInputs:
        """What determines the rows. Rows of a file are taken to be of the CLIP that they are used with: no file says
        it.
        """
        if self.embeddings is not None:
            return {
                "clip": clip.identity,
                "names": list(self.names),
                "class_embeddings": hash_tables([self.embeddings]),
            }
        return {
            "clip": clip.identity,
            "templates": list(templates),
            "names": list(self.names),
            "tokens": clip.hash_prompts(self.texts, templates),
            **({"synonyms": {name: list(names) for name, names in self.synonyms.items()}} if self.synonyms else {}),
        }

    def embed(self, clip: Teacher, templates: Sequence[str], start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of K: (n, D) float32, L2-normalised."""
        if self.embeddings is None:
            return clip.embed_names(self.texts[start:stop], templates)
        rows = self.embeddings[start:stop].astype(np.float64)  # the norms of float32 numbers do not overflow there
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def read_synonyms(file: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """All names of the classes that `file` lists: TOML, as protocols are, since JSON takes a class that is listed twice
    without a word.

        couch = ["couch", "sofa"]
        "hot dog" = ["hot dog", "sausage in a bun"]

    A class that has its own name alone is left out. Raises HdovdError.
    """
    where, example = f"--synonyms {file}", 'couch = ["couch", "sofa"], one class a line, quoted where it has spaces'
    tree = read_toml(file, "--synonyms", f"TOML such as {example}")
    if unknown := [name for name in tree if name not in names]:
        near = {name: get_close_matches(name, names, 1, cutoff=0.3) for name in unknown}
        raise HdovdError(
            f"{where}: no classes of the protocol: "
            + shorten([repr(name) + (f" (the nearest is {n[0]!r})" if n else "") for name, n in near.items()])
            + f". Each key is a class, its value all names of it: {example}"
        )
    for name, found in tree.items():
        if not isinstance(found, list) or not found:
            raise HdovdError(f"{where}: {name} must be a list of names, not {shown(found)}")
        for other in found:
            checked_name(other, f"{where}: {name} must be a list of names: one")
        if twice := sorted({n for n in found if found.count(n) > 1}):
            raise HdovdError(f"{where}: {name} lists {shorten(list(twice))} twice")
    return {name: tuple(tree[name]) for name in names if name in tree and tree[name] != [name]}


def read_class_embeddings(
    file: Path, names: Sequence[str], *, each: str = "class of the protocol, base then novel"
) -> np.ndarray:
    """(K, D) float32, the rows of a .npy, .safetensors, .pt or .pth file in the order of `names`, as they are. `each`:
    what has a row.

    Raises HdovdError if they do not fit, or cannot be normalised.
    """
    where = f"--class-embeddings {file}"
    try:
        require_readable(file)
        rows = read_rows(file)
    except HdovdError as error:
        raise HdovdError(f"--class-embeddings: {error}") from error
    if rows.ndim != 2 or len(rows) != len(names) or not rows.shape[1]:
        raise HdovdError(
            f"{where} has shape {rows.shape}, expected ({len(names)}, D): a row for each {each}, "
            f"{names[0]} first and {names[-1]} last"
        )
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist():
        raise HdovdError(
            f"{where}: {len(bad)} of {len(rows)} rows cannot be normalised, they are zero or not finite: "
            + shorten([f"{row} ({names[row]})" for row in bad])
        )
    return rows


def read_rows(file: Path) -> np.ndarray:
    """The one array of floating-point numbers that a file holds, as float32. Raises Unfit."""
    if file.suffix == ".npy":
        try:
            array = np.load(
                file, mmap_mode="r", allow_pickle=False
            )  # mapped: a file too short for its shape is an error
            found: Any = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise Unfit(f"{file} is no .npy file of numbers, or damaged ({error})") from error
    elif file.suffix == ".safetensors":
        found = load_tensors(file)
    elif file.suffix in (".pt", ".pth"):
        found = load_pth(file)
    else:
        raise Unfit(f"{file}: expected .npy, .safetensors, .pt or .pth, not {file.suffix or 'a name without ending'}")
    if isinstance(found, dict):
        if len(found) != 1:
            raise Unfit(
                f"{file} holds {shorten([_described(name, value) for name, value in found.items()]) or 'nothing'}: "
                "expected one tensor, save the one that is meant alone"
            )
        (found,) = found.values()
    return floats(found, str(file))


def _described(name: Any, value: Any) -> str:
    return f"{name} {tuple(value.shape)}" if hasattr(value, "shape") else f"{name} (a {type(value).__name__})"


WORD = "object"


def object_text_entry(clip: Teacher, templates: Sequence[str], sets: Iterable[FeatureSet]) -> dict[str, Any]:
    """What a set keeps: the key of what made the row, and the row as float16 values; that of a set of the cache which
    has it.
    """
    rows = TextRows((WORD,))
    key = key_of(rows.inputs(clip, templates))
    for features in sets:
        if features.object_text.get("key") == key:
            return dict(features.object_text)
    return {"key": key, "embedding": rows.embed(clip, templates, 0, 1)[0].astype(np.float16).tolist()}


def object_text_of(features: FeatureSet, dim: int, where: str) -> Tensor | None:
    """(D,) float32, normalised; None if the set has none. Raises HdovdError, naming `where`, if it is damaged."""
    if not features.object_text:
        return None
    try:
        row = torch.tensor(features.object_text["embedding"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError):
        row = torch.zeros(0)
    if row.shape != (dim,) or not row.isfinite().all() or not row.any():
        raise HdovdError(
            f'{where}: the text embedding of "{WORD}" is damaged (expected {dim} finite values): delete object_text from '  # noqa: E501
            f"the set's file and run its extract-clip again"
        )
    return F.normalize(row, dim=0)


def give_object_text(model: Detector, row: Tensor | None, where: str) -> dict[str, str]:
    """Tell a detector what an object is, unless it knows or has no use for it; returns what the run's record says of
    it.
    """
    if model.knows_objects:
        return {}
    if row is None:
        log(
            f'{where} has no text embedding of "{WORD}": the hdovd extract-clip command that made a Zarr cache adds it, and extracts '  # noqa: E501
            "nothing else again; tar shards get it by hdovd cache export of that cache"
        )
        return {"object_text": "mean of the base classes"}
    model.set_object_text(row)
    log(f'the text embedding of "{WORD}" is that of {where}')
    return {"object_text": "cache"}
