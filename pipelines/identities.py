"""What determines each level of a cache, computed alike by extraction and by training.

`data_inputs` holds what the training set decides; training asks the cache for exactly that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hdovd.cache.identity import KeyInputs, hash_tables, hash_texts
from hdovd.cache.schema import SCHEMA_VERSION, Level
from hdovd.coco import ImageBoxes
from hdovd.pipelines.crops import CROP_RECIPE
from hdovd.pipelines.nouns import Nouns
from hdovd.pipelines.proposal_file import NO_PROPOSALS, Proposals


def data_inputs(images: Sequence[ImageBoxes]) -> dict[Level, KeyInputs]:
    """The part of the image and instance identities that follows from the training images and base boxes."""
    listed = {"count": len(images), "hash": hash_tables([np.array([(i.id, i.width, i.height) for i in images], np.int64)])
              + hash_texts(i.file_name for i in images)[:8]}
    boxes = {"count": sum(len(i.boxes) for i in images),
             "hash": hash_tables(table for i in images for table in (i.boxes, i.annotation_ids))}
    return {Level.IMAGE: {"images": listed}, Level.INSTANCE: {"images": listed, "base_boxes": boxes}}


def level_inputs(clip: KeyInputs, images: Sequence[ImageBoxes], proposals: dict[int, Proposals], nouns: Nouns | None,
                 class_names: Sequence[str], templates: Sequence[str]) -> dict[Level, KeyInputs]:
    """All inputs of every level that an extraction writes."""
    common = {"schema_version": SCHEMA_VERSION, "clip": clip}
    data = data_inputs(images)
    found = [proposals.get(i.id, NO_PROPOSALS) for i in images]
    table = {"count": sum(len(p.boxes) for p in found), "hash": hash_tables(t for p in found for t in (p.boxes, p.scores))}
    inputs: dict[Level, KeyInputs] = {
        Level.INSTANCE: {**common, **data[Level.INSTANCE], "crop": CROP_RECIPE, "proposals": table, "nouns": None},
        Level.IMAGE: {**common, **data[Level.IMAGE]},
        Level.CLASS: {**common, "templates": list(templates), "names": list(class_names)},
    }
    if nouns is not None:
        offered = "all" if nouns.by_image is None else hash_tables(np.array(nouns.offered(i.id), np.int64) for i in images)
        inputs[Level.NOUN] = {**common, "templates": list(templates), "names": list(nouns.vocabulary)}
        inputs[Level.INSTANCE]["nouns"] = {"vocabulary": hash_texts(nouns.vocabulary), "templates": list(templates),
                                           "offered": offered}
    return inputs
