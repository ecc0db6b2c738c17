"""What determines each level of a cache, computed alike by extraction and by training.

`data_inputs` holds what the training set decides; training asks the cache for exactly that.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hdovd.cache.identity import KeyInputs, hash_tables, key_of
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import SCHEMA_VERSION, Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Exif, ImageBoxes, Split
from hdovd.pipelines.embedding.embedders import Embedder
from hdovd.pipelines.extraction.boxes import BoxTable, box_table
from hdovd.pipelines.extraction.config import ONE_NOUN, LabelRule
from hdovd.pipelines.extraction.picture_hashes import picture_hashes
from hdovd.pipelines.extraction.text import TextRows
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.teachers.base import Teacher


def data_inputs(images: Sequence[ImageBoxes], hashes: np.ndarray | None = None) -> dict[Level, KeyInputs]:
    """The part of the identities that follows from the training images and base boxes. hashes: as `boxes.box_table`
    takes them.
    """
    table = box_table(images, {}, hashes)
    listed = table.image_inputs()
    return {
        Level.IMAGE: {"images": listed},
        Level.INSTANCE: {"images": listed},
        Level.BOXES: {"images": listed, "base_boxes": table.base_box_inputs()},
    }


def inputs_of(split: Split, cache: FeatureCache) -> dict[Level, KeyInputs]:
    """`data_inputs` of a split, by what a set knows of its pictures. Raises HdovdError if one has changed since."""
    hashes = picture_hashes(split, cache.products())
    hashes.require_unchanged(cache.url)
    return data_inputs(split.images, hashes.values)


def exif_of(inputs: Mapping[Level, KeyInputs]) -> Exif | None:
    """How the pictures of a set were read, by what made its levels; None for sets that do not say it: as stored,
    whatever EXIF says.
    """
    found = {inputs[level].get("exif") for level in (Level.IMAGE, Level.INSTANCE) if level in inputs}
    return next((exif for exif in Exif if exif in found), None)


def require_exif(inputs: Mapping[Level, KeyInputs], wanted: str, where: str) -> None:
    """Raises HdovdError if the pictures of a set were read in another way."""
    exif = exif_of(inputs)
    if exif not in (None, wanted):
        raise HdovdError(
            f'{where} was made with --exif {exif}, and input.exif is "{wanted}": boxes and embeddings would be of pictures '  # noqa: E501
            f"that are turned in different ways. Train with --set input.exif={exif}, or extract with --exif {wanted}"
        )


def level_inputs(
    clip: Teacher,
    table: BoxTable,
    nouns: Nouns | None,
    classes: TextRows,
    templates: Sequence[str],
    embedders: Mapping[Level, Embedder],
    rule: LabelRule = ONE_NOUN,
) -> dict[Level, KeyInputs]:
    """All inputs of every level that an extraction writes: what determines its bytes, and nothing else."""
    schema: KeyInputs = {"schema_version": SCHEMA_VERSION}
    images, boxes = table.image_inputs(), table.box_inputs()
    pictures = {**schema, "clip": clip.identity, "images": images, "exif": str(embedders[Level.IMAGE].pictures.exif)}
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {
            **schema,
            "images": images,
            "base_boxes": table.base_box_inputs(),
            "proposals": table.proposal_inputs(),
            "boxes": boxes,
        },
        Level.CLASS: {**schema, **classes.inputs(clip, templates)},
        Level.IMAGE: {**pictures, **embedders[Level.IMAGE].inputs()},
        Level.INSTANCE: {**pictures, **embedders[Level.INSTANCE].inputs(), "boxes": boxes},
    }
    if nouns is not None:
        offered = (
            "all"
            if nouns.by_image is None
            else hash_tables(np.array(nouns.offered(i), np.int64) for i in table.image_id.tolist())
        )
        inputs[Level.NOUN] = {**schema, **TextRows(nouns.vocabulary).inputs(clip, templates)}
        inputs[Level.PSEUDO_LABEL] = {
            **schema,
            "instance": key_of(inputs[Level.INSTANCE]),
            "noun": key_of(inputs[Level.NOUN]),
            "offered": offered,
            "sources": hash_tables([table.source]),
            **rule.inputs(),
        }
    return inputs
