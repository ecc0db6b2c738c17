"""CLIP's text embedding of the word "object", which detectors that know objects by it are measured against (AdaMixer).

`extract_clip` embeds it with the templates of the class names and keeps it in the set's own file: as a level of the
cache, or a row among the classes, one row would give every cache that is there other keys. `train` hands it to the
detector. D embedding size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.catalog import FeatureSet
from hdovd.cache.identity import key_of
from hdovd.core.errors import HdovdError
from hdovd.modeling.base import Detector
from hdovd.pipelines.extraction.text import TextRows
from hdovd.pipelines.teachers.base import Teacher

WORD = "object"


def object_text_entry(clip: Teacher, templates: Sequence[str], sets: Iterable[FeatureSet]) -> dict[str, Any]:
    """What a set keeps: the key of what made the row, and the row as float16 values; that of a set of the cache which
    has it.
    """
    rows = TextRows((WORD,))
    key = key_of(rows.inputs(clip, templates))
    for features in sets:
        if features.object_text.get("key") == key and _is_sound(features, clip.dim):
            return dict(features.object_text)
    return {"key": key, "embedding": rows.embed(clip, templates, 0, 1)[0].astype(np.float16).tolist()}


def _is_sound(features: FeatureSet, dim: int) -> bool:
    try:
        return object_text_of(features, dim, "") is not None
    except HdovdError:
        return False


def object_text_of(features: FeatureSet, dim: int, where: str) -> Tensor | None:
    """(D,) float32, normalised; None if the set has none. Raises HdovdError, naming `where`, if it is damaged."""
    if not features.object_text:
        return None
    damaged = f'{where}: the text embedding of "{WORD}" is damaged: delete object_text from the set\'s file and run its extract-clip again'  # noqa: E501
    try:
        row = torch.tensor(features.object_text["embedding"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise HdovdError(f"{damaged} ({error!r})") from error
    if row.shape != (dim,) or not row.isfinite().all() or not row.any():
        raise HdovdError(f"{damaged} (expected {dim} finite values, found {tuple(row.shape)})")
    return F.normalize(row, dim=0)


def give_object_text(model: Detector, row: Tensor | None, where: str, log: Callable[[str], None]) -> dict[str, str]:
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
