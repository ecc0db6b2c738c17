"""What determines each level of a cache, computed alike by extraction and by training.

`data_inputs` holds what the training set decides; training asks the cache for exactly that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hdovd.cache.identity import KeyInputs, hash_tables, key_of
from hdovd.cache.schema import SCHEMA_VERSION, Level
from hdovd.coco import ImageBoxes
from hdovd.pipelines.box_table import BoxTable, box_table
from hdovd.pipelines.label_rule import ONE_NOUN, LabelRule
from hdovd.pipelines.nouns import Nouns
from hdovd.pipelines.teacher import Teacher
from hdovd.pipelines.text_rows import TextRows
from hdovd.pipelines.ways import Way


def data_inputs(images: Sequence[ImageBoxes]) -> dict[Level, KeyInputs]:
    """The part of the identities that follows from the training images and base boxes."""
    table = box_table(images, {})
    listed = table.image_inputs()
    return {Level.IMAGE: {"images": listed}, Level.INSTANCE: {"images": listed},
            Level.BOXES: {"images": listed, "base_boxes": table.base_box_inputs()}}


def level_inputs(clip: Teacher, table: BoxTable, nouns: Nouns | None, classes: TextRows, templates: Sequence[str],
                 ways: Mapping[Level, Way], rule: LabelRule = ONE_NOUN) -> dict[Level, KeyInputs]:
    """All inputs of every level that an extraction writes: what determines its bytes, and nothing else."""
    schema: KeyInputs = {"schema_version": SCHEMA_VERSION}
    images, boxes = table.image_inputs(), table.box_inputs()
    pictures = {**schema, "clip": clip.identity, "images": images}
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {**schema, "images": images, "base_boxes": table.base_box_inputs(), "proposals": table.proposal_inputs(),
                      "boxes": boxes},
        Level.CLASS: {**schema, **classes.inputs(clip, templates)},
        Level.IMAGE: {**pictures, **ways[Level.IMAGE].inputs()},
        Level.INSTANCE: {**pictures, **ways[Level.INSTANCE].inputs(), "boxes": boxes},
    }
    if nouns is not None:
        offered = "all" if nouns.by_image is None else hash_tables(np.array(nouns.offered(i), np.int64) for i in table.image_id.tolist())
        inputs[Level.NOUN] = {**schema, **TextRows(nouns.vocabulary).inputs(clip, templates)}
        inputs[Level.PSEUDO_LABEL] = {
            **schema, "instance": key_of(inputs[Level.INSTANCE]), "noun": key_of(inputs[Level.NOUN]), "offered": offered,
            "sources": hash_tables([table.source]), **rule.inputs()}
    return inputs
