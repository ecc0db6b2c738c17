"""The training set: pictures and base boxes from COCO files, joined to their cached rows by image and annotation id.

Called by `train.py`. What a sample is made of is shared with `tar_training`, where the same comes from tar shards. D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.cache.reader import FeatureCache, InstanceRows, require_unit
from hdovd.cache.schema import Level, Source
from hdovd.config.recipe import LossConfig, Recipe
from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.targets import Targets
from hdovd.pipelines.calibration.values import LabelOrigin, origin_of
from hdovd.pipelines.common.images import read_pixels
from hdovd.pipelines.dataloading.sample_keys import Draw, as_draw, is_flipped, key_of
from hdovd.pipelines.dataloading.sampler import BlockShuffle, EpochOrder, PlainShuffle, Streams
from hdovd.pipelines.extraction.identities import inputs_of, require_exif
from hdovd.pipelines.extraction.object_text import object_text_of
from hdovd.pipelines.extraction.pseudo_labels import label_texts

Sample = tuple[Tensor, Targets, int]  # picture (3, h, w) uint8 RGB, its targets, its image id


class TrainingSet(Dataset[Sample]):
    """The images of a split by their draw, flipped at random; boxes, pseudo boxes and rows stay together."""

    def __init__(self, split: Split, cache: FeatureCache, recipe: Recipe, log: Callable[[str], None] = print) -> None:
        """Raises HdovdError if a level of the cache that the recipe uses does not fit the split."""
        self.split, self.cache, self.recipe = split, cache, recipe
        self.images = split.images
        self._check()
        self._leave_out_failed(log)
        self._nouns = torch.zeros(0, cache.dim)
        if uses_nouns(recipe.loss, cache.levels(), cache.url):
            self._nouns = torch.from_numpy(cache.embeddings(Level.NOUN))

    def _check(self) -> None:
        loss, cache = self.recipe.loss, self.cache
        if loss.uses_cache:
            cache.require_together()
        if not (loss.image.enabled or loss.uses_pseudo_boxes):
            return
        require_exif({level: cache.key_inputs(level) for level in cache.levels()}, self.split.exif, cache.url)
        wanted = inputs_of(self.split, cache)
        if loss.image.enabled:
            cache.require(Level.IMAGE, wanted[Level.IMAGE])
            cache.hold(Level.IMAGE)
        if loss.uses_pseudo_boxes:
            cache.require(Level.BOXES, wanted[Level.BOXES])
            cache.require(Level.INSTANCE, wanted[Level.INSTANCE])
            cache.hold(Level.INSTANCE)

    def _leave_out_failed(self, log: Callable[[str], None]) -> None:
        """Images that extraction could not read, in base-only runs too: runs that are compared see the same images."""
        cache = self.cache
        failed = cache.failed()
        if failed:
            log(f"skipped {len(failed)}: image without embeddings ({shorten(list(failed))}); the cache says why")
            self.images = [image for image in self.images if image.id not in failed]
            if not self.images:
                raise HdovdError(f"no image of {self.split.annotations} has embeddings in {cache.url}; first reason: "
                                 f"{next(iter(failed.values()))}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, wanted: Draw | int) -> Sample:
        draw = as_draw(wanted)
        image = self.images[draw.index]
        return flipped_at_random(read_pixels(self.split, image), self._targets(image), image.id, draw.epoch, self.recipe)

    def image_ids(self) -> np.ndarray:
        """(n,) int64, by index."""
        return np.array([image.id for image in self.images], np.int64)

    def order(self, streams: Streams) -> EpochOrder:
        """How an epoch goes over the images."""
        if self.recipe.loss.uses_pseudo_boxes and self.cache.reads_best_in_blocks:
            return BlockShuffle(len(self), self.recipe.train.seed, streams)
        return PlainShuffle(len(self), self.recipe.train.seed)

    @property
    def dim(self) -> int:
        return self.cache.dim

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that the cache lacks."""
        return self.cache.class_embeddings(names)

    def describe(self) -> str:
        """What there is to train on, in words."""
        return f"{len(self)} images, {sum(len(image.boxes) for image in self.images)} base boxes"

    def object_text(self) -> Tensor | None:
        """(D,) the text embedding of "object", None if there is none. Raises HdovdError for one that is damaged."""
        return object_text_of(self.cache.set, self.dim, self.cache.url)

    def label_origin(self) -> LabelOrigin:
        """What the weights of pseudo labels depend on."""
        return origin_of(self.cache)

    def record(self) -> dict[str, Any]:
        """Where it came from, for the record of a run."""
        return {"cache": self.cache.identity(), "skipped": self.split.skips.by_reason}

    def _targets(self, image: ImageBoxes) -> Targets:
        rows = None
        if self.recipe.loss.uses_pseudo_boxes:
            rows = self.cache.instances(image.id)
            base = rows.annotation_id[rows.source == Source.BASE_BOX]
            if not np.array_equal(base, image.annotation_ids):
                raise HdovdError(f"{self.cache.url}: the base rows of image {image.id} are of annotations "
                                 f"{base.tolist()}, expected {image.annotation_ids.tolist()}: run extract-clip again")
        whole = self.cache.image_embedding(image.id) if self.recipe.loss.image.enabled else None
        return make_targets(image.boxes, image.labels, rows, whole, self._nouns, self.cache.dim,
                            f"{self.cache.url}: image {image.id}")


def uses_nouns(loss: LossConfig, levels: Collection[Level], where: str) -> bool:
    """Whether pseudo boxes have nouns. Raises HdovdError if the losses need them and the features have none."""
    if loss.uses_pseudo_boxes and loss.class_.enabled and Level.NOUN not in levels:
        raise HdovdError(f"{where} has no nouns, so no pseudo box has a text embedding: extract it with --nouns, or "
                         "--vocabulary (and --captions), or train with --set loss.class.enabled=false")
    return loss.uses_pseudo_boxes and Level.NOUN in levels


def make_targets(boxes: np.ndarray, labels: np.ndarray, rows: InstanceRows | None, image_embedding: np.ndarray | None, nouns: Tensor,
                 dim: int, where: str) -> Targets:
    """The targets of one image: zeros for levels that are off. Raises HdovdError, naming `where`, for embeddings not of norm one.

    boxes (n, 4) float32 and labels (n,) int64 of the base boxes; rows: theirs, in this order, and the proposals';
    image_embedding (D,) float16; nouns (K, D) float32, no rows if pseudo boxes have none.
    """
    base_boxes, base_labels, embeddings = torch.from_numpy(boxes), torch.from_numpy(labels), torch.zeros(len(boxes), dim)
    pseudo_boxes, pseudo_embeddings, pseudo_texts = torch.zeros(0, 4), torch.zeros(0, dim), torch.zeros(0, dim)
    if rows is not None:
        require_unit(rows.embedding, f"{where}, instance level")
        base, proposals = rows.base_boxes(), rows.proposals()
        embeddings = _normalised(base.embedding)
        if len(nouns):
            proposals = proposals.select(proposals.noun >= 0)
            pseudo_texts = _texts(proposals, nouns)
        else:  # instance level alone: no noun, no weight in text space
            pseudo_texts = torch.zeros(len(proposals.box), dim)
        pseudo_boxes, pseudo_embeddings = torch.from_numpy(proposals.box), _normalised(proposals.embedding)
    if image_embedding is not None:
        require_unit(image_embedding[None], f"{where}, image level")
    whole = torch.zeros(dim) if image_embedding is None else _normalised(image_embedding)
    return Targets(base_boxes, base_labels, embeddings, pseudo_boxes, pseudo_embeddings, pseudo_texts, whole)


def _texts(rows: InstanceRows, nouns: Tensor) -> Tensor:
    """(n, D) u of rows that have a label: their noun's embedding, or the mean of several."""
    if not rows.top_noun.shape[1]:
        return nouns[torch.from_numpy(rows.noun.astype(np.int64))]
    return label_texts(nouns, torch.from_numpy(rows.top_noun.astype(np.int64)), torch.from_numpy(rows.top_weight))


def flipped_at_random(pixels: Tensor, targets: Targets, image_id: int, epoch: int, recipe: Recipe) -> Sample:
    """A sample, mirrored left to right as its key says; boxes, pseudo boxes and rows stay together."""
    if is_flipped(key_of(recipe.train.seed, epoch, image_id), recipe.input.flip):
        return pixels.flip(-1), targets.flipped(pixels.shape[-1]), image_id
    return pixels, targets, image_id


def _normalised(rows: np.ndarray) -> Tensor:
    """Stored float16 rows, of norm one again in float32."""
    return torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=-1)
