"""What is searched for, as one direction: the weighted sum of embeddings of words, pictures, boxes of the cache and
rows of a file. D embedding size.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from hdovd.cache.identity import KeyInputs
from hdovd.cache.reader import FeatureCache, normalised_rows
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError, counted
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.detection.names import load_same_clip
from hdovd.pipelines.embedding.build import embedders_of
from hdovd.pipelines.embedding.crops import NO_FILE, Picture
from hdovd.pipelines.embedding.embedders import Pictures
from hdovd.pipelines.extraction.config import DEFAULT_TEMPLATES, recipe_of
from hdovd.pipelines.extraction.text import read_rows
from hdovd.pipelines.search.config import Box, SearchConfig, weighted
from hdovd.pipelines.teachers.base import Teacher

LEAST_NORM = 1e-6  # of the sum of a query's parts


def query_of(
    config: SearchConfig,
    cache: FeatureCache,
    clip_of: Callable[[], Teacher] | None = None,
    pictures: Mapping[str, bytes] | None = None,
) -> np.ndarray:
    """(D,) float32 of norm 1. clip_of: the set's CLIP, if it is loaded already. pictures: those of `config.image` that
    are no files. Raises HdovdError for a part that cannot be had, and if the parts add up to nothing."""
    parts = [(weight, _row_of_cache(cache, text)) for text, weight in map(weighted, config.like)]
    if config.embeddings is not None:
        parts += [(1.0, row) for row in normalised_rows(np.atleast_2d(read_rows(config.embeddings)))]
    if config.queries or config.not_ or config.image:
        clip = (clip_of or partial(load_set_clip, config, cache))()
        parts += [
            *((weight, _embed_text(clip, cache, text)) for text, weight in map(weighted, config.queries)),
            *((-weight, _embed_text(clip, cache, text)) for text, weight in map(weighted, config.not_)),
            *(
                (weight, _embed_picture(clip, cache, Path(name), (pictures or {}).get(name), config.box))
                for name, weight in map(weighted, config.image)
            ),
        ]
    if other := [row.shape for _, row in parts if row.shape != (cache.dim,)]:
        raise HdovdError(
            f"a part of the query has shape {other[0]}, the set's embeddings have {cache.dim} values: the rows of "
            "--embeddings, or --clip, are of another CLIP"
        )
    total = np.sum([weight * row for weight, row in parts], axis=0)
    if not np.linalg.norm(total) >= LEAST_NORM:  # nor if it is no number
        raise HdovdError("the parts of the query add up to nothing: they cancel each other out, or are no embeddings")
    return np.asarray(normalised_rows(total[None])[0])


def _row_of_cache(cache: FeatureCache, text: str) -> np.ndarray:
    """(D,) float32 of norm 1, of IMAGE_ID:ROW. Raises HdovdError."""
    found = re.fullmatch(r"(-?\d+):(\d+)", text)
    if found is None:
        raise HdovdError(f"--like {text}: expected IMAGE_ID:ROW, as the table of a search prints it, such as 139:0")
    rows, row = cache.instance_embeddings(int(found[1])), int(found[2])
    if row >= len(rows) or not rows[row].any():
        why = cache.failed().get(int(found[1]), f"the image has {counted(len(rows), 'row')}, from 0 on")
        raise HdovdError(f"--like {text}: there is no such row, or no embedding of it: {why}")
    return np.asarray(normalised_rows(rows[row : row + 1])[0])


def load_set_clip(config: SearchConfig, cache: FeatureCache) -> Teacher:
    """The CLIP that made the set's embeddings. Raises HdovdError if it cannot be had, or is another one."""
    made = cache.set.made_from
    if config.clip is None and ("clip" not in made or "teacher" in made):
        raise HdovdError(
            f"set {config.features} of {cache.url} does not say where its CLIP is: give --clip (with --pretrained, as "
            "for hdovd extract-clip), or search by --like or --embeddings, which need none"
        )
    return load_same_clip(
        (str(made.get("clip")), made.get("pretrained")) if config.clip is None else (config.clip, config.pretrained),
        cache.key_inputs(Level.INSTANCE),
        _class_inputs(cache),
        pick_device(config.device),
        given=config.clip is not None,
        whose="set",
        without="search by --like or --embeddings",
    )


def _class_inputs(cache: FeatureCache) -> KeyInputs:
    return cache.key_inputs(Level.CLASS) if Level.CLASS in cache.levels() else {}


def _embed_text(clip: Teacher, cache: FeatureCache, text: str) -> np.ndarray:
    """(D,) float32, in the prompts of the set's names. Raises HdovdError for a text that becomes no token."""
    templates = _class_inputs(cache).get("templates") or cache.set.made_from.get("templates")
    if clip.hash_prompts([text], ["{}"]) == clip.hash_prompts([""], ["{}"]):
        raise HdovdError(f"{text!r}: the tokenizer of the set's CLIP makes nothing of it; give other words")
    return np.asarray(clip.embed_names([text], tuple(templates or DEFAULT_TEMPLATES))[0])


def _embed_picture(clip: Teacher, cache: FeatureCache, file: Path, data: bytes | None, box: Box | None) -> np.ndarray:
    """(D,) float32 of a box of an upright picture, a file or the bytes of one, as the set's boxes were embedded. Raises
    HdovdError for a picture that cannot be read, and a box that is not within it.
    """
    picture = decode(file if data is None else data)
    left, top, wide, high = box or (0, 0, picture.width, picture.height)
    if not (0 <= left < left + wide <= picture.width and 0 <= top < top + high <= picture.height):
        size = f"{picture.width}x{picture.height}"
        raise HdovdError(f"--box {left:g},{top:g},{wide:g},{high:g} is not within {file}, which is {size}")
    height, width = picture.pixels.shape[1:]  # fewer than the picture's, if it is a large one
    scale = np.array([width / picture.width, height / picture.height] * 2, np.float32)
    boxes = scale * np.array([[left, top, left + wide, top + high]], np.float32)
    image = ImageBoxes(0, file.name, width, height, boxes, np.zeros(1, np.int64), np.zeros(1, np.int64))
    pictures = Pictures([image], lambda _: file, np.array([0, 1]), boxes)
    embedder = embedders_of(clip, pictures, recipe_of(cache.key_inputs(Level.INSTANCE)))[Level.INSTANCE]
    rows, _ = embedder.embed([np.zeros(1, np.int64)], lambda *_: Picture(picture.pixels, NO_FILE))
    return np.asarray(rows[0])
