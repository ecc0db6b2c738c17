"""Encoding rows of a cache again, to see whether they are still what the CLIP gives: `hdovd cache verify --sample N`.

Finds what no checksum can: rows that were exchanged and checksummed anew, pictures or a CLIP that are not those of
then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hdovd.cache.catalog import FeatureSet
from hdovd.cache.content import name_rows
from hdovd.cache.identity import differences
from hdovd.cache.picture_files import known_files
from hdovd.cache.product import Product
from hdovd.cache.rows import open_rows
from hdovd.cache.schema import TABLES, Level
from hdovd.cache.store import Folder
from hdovd.cache.verify import Finding
from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import ImageBoxes, Split
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.embedding.build import embedders_of
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, DenseRecipe
from hdovd.pipelines.embedding.crops import Cutter
from hdovd.pipelines.embedding.embedders import Embedder, Pictures
from hdovd.pipelines.extraction.picture_hashes import image_hash
from hdovd.pipelines.teachers.base import Teacher

LEAST_COSINE = 0.99
BATCH_ROWS = 64
GONE = ImageBoxes(-1, "", 1, 1, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Sampled:
    """Cosines of a sample with what the cache holds; rows: how many."""

    rows: int
    least: float
    mean: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What to sample with: `count` rows of a level, of a choice that follows from `seed`."""

    folder: Folder
    split: Split
    clip: Teacher
    count: int
    seed: int


def sample_set(
    sample: Sample,
    features: FeatureSet,
    findings: Sequence[Finding],
    sampled: dict[tuple[Level, str], Sampled],
    log: Callable[[str], None],
) -> list[Finding]:
    """Encode rows of the image and the instance level again; what is below LEAST_COSINE is returned. Adds to `sampled`.

    What `findings` names already, and products that `sampled` has, are left out. Raises HdovdError if the CLIP is not
    the cache's.
    """
    low: list[Finding] = []
    for level in (Level.IMAGE, Level.INSTANCE):
        if level not in features.levels or (level, features.levels[level]) in sampled:
            continue
        name = f"{level} {features.levels[level][:12]}"
        known = {f.part for f in findings if f.product == (level, features.levels[level])}
        if TABLES in known:
            log(f"sample of {name}: left out, its tables are damaged")
            continue
        product = Product(sample.folder, level, features.levels[level])
        embedder = _embedder(product, sample)
        chosen = _choose(product, known, sample.count, sample.seed)
        if not len(chosen):
            log(f"sample of {name}: left out, none of its rows is sound")
            continue
        rows, cosines, problems = _cosines(product, embedder, chosen)
        if problems:
            log(f"sample of {name}: {len(problems)} images could not be encoded again: {shorten([*problems], 4)}")
        if not len(rows):
            raise HdovdError(
                f"sample of {name}: none of {len(chosen)} rows could be encoded again, pictures from "
                f"{sample.split.folder}"
            )
        sampled[level, product.key] = found = Sampled(len(rows), float(cosines.min()), float(cosines.mean()))
        log(
            f"sample of {name}: {found.rows:,d} rows encoded again, cosine min {found.least:.4f}, mean {found.mean:.4f}"
        )
        low += _findings(product, rows, cosines)
    return low


def _embedder(product: Product, sample: Sample) -> Embedder:
    """How the product's rows are embedded. Raises HdovdError if the CLIP is another one than made it.

    The precision may be another one: it costs far less than LEAST_COSINE. What was imported names no CLIP to compare
    with.
    """
    inputs, teacher, tables = product.key_inputs, sample.clip, product.table
    named = "weights_sha256" in inputs["clip"]
    if named:
        _refuse_others(product, {"clip": {**teacher.identity, "compute_dtype": inputs["clip"].get("compute_dtype")}})
    by_id = {image.id: image for image in sample.split.images}
    images = [by_id.get(image_id, GONE) for image_id in tables("image_id").tolist()]
    on_boxes = product.level is Level.INSTANCE
    recipe = (
        DenseRecipe(inputs["dense"]["side"])
        if "dense" in inputs
        else CropRecipe.from_inputs(inputs["crop"])
        if "crop" in inputs
        else PLAIN_BOX
    )
    offset, box = (tables("offset"), tables("box")) if on_boxes else (np.zeros(1), np.zeros((0, 4)))
    pictures = Pictures(images, sample.split.path, offset, box, sample.split.exif)
    embedder = embedders_of(teacher, pictures, recipe)[product.level]
    if named:
        _refuse_others(product, embedder.inputs())
    return embedder


def _refuse_others(product: Product, have: dict[str, Any]) -> None:
    lines = differences(
        {name: product.key_inputs[name] for name in have if name in product.key_inputs},
        have,
        sides=("the cache has", "the CLIP named has"),
    )
    if lines:
        raise HdovdError(
            f"{product.folder.url}: {product} was made by another CLIP:\n  "
            + "\n  ".join(lines)
            + "\nGive the one that it was made with: --clip, --pretrained."
        )


def _choose(product: Product, known: set[int | str | None], count: int, seed: int) -> np.ndarray:
    """Sorted rows, spread at random over the parts that are sound."""
    left = np.concatenate(
        [np.arange(0), *(np.arange(*product.rows_of(part)) for part in range(product.parts) if part not in known)]
    )
    chosen = np.random.default_rng(seed).choice(len(left), min(count, len(left)), replace=False)
    return np.sort(left[chosen])


def _cosines(product: Product, embedder: Embedder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The rows that could be encoded again, their cosines with the cache, and why others could not."""
    stored, problems = (
        open_rows(product, "embedding", parts={int(part) for part in rows // product.part_rows}),
        list[str](),
    )
    have = np.array([stored.read(int(row), int(row) + 1)[0] for row in rows], np.float64)
    labels = product.table("image_hash")
    usable = np.asarray(have.any(axis=1))  # zeros: the picture could not be read then either
    number, image_id = embedder.images_of(rows), product.table("image_id")
    known = {
        (int(file["image_id"]), int(file["label"])) for file in known_files(product)
    }  # by their contents, whatever they are called
    for n in np.unique(number):
        named = image_hash(embedder.pictures.images[n]) == labels[n] or (int(image_id[n]), int(labels[n])) in known
        if not named and usable[number == n].any():
            problems.append(f"image {image_id[n]} has another name or size in the annotations, or is not there")
            usable[number == n] = False
    cutter, new = Cutter(embedder.fit, embedder.input_size), np.zeros(have.shape)
    for some in progress(embedder.groups(rows[usable], BATCH_ROWS), f"sample of {product.level}", "batch"):
        batch, mine = cutter.batch(embedder.jobs(some), embedder.places(BATCH_ROWS)), np.isin(rows, some)
        problems += [f"image {unread}: {problem}" for unread, problem in batch.problems.items()]
        new[mine] = embedder.encode(batch)[: len(some)]
        usable[mine & np.isin(image_id[number], [*batch.problems])] = False
    rows, have, new = rows[usable], have[usable], new[usable]
    return rows, (new * have).sum(axis=1) / np.linalg.norm(new, axis=1) / np.linalg.norm(have, axis=1), problems


def _findings(product: Product, rows: np.ndarray, cosines: np.ndarray) -> Sequence[Finding]:
    """One a part."""
    low, image_id = cosines < LEAST_COSINE, product.table("image_id")
    offset = np.arange(product.rows + 1) if product.level is Level.IMAGE else product.table("offset")
    found = []
    for part in np.unique(rows[low] // product.part_rows).tolist():
        mine = low & (rows // product.part_rows == part)
        place = f"{product.prefix}/{next(iter(product.row_objects(part).values()))}"
        found.append(
            Finding(
                place,
                f"a cosine of {LEAST_COSINE} or more with the CLIP's answer",
                f"{cosines[mine].min():.4f} at the least",
                (product.level, product.key),
                part,
                name_rows(rows[mine], image_id, offset),
            )
        )
    return found
