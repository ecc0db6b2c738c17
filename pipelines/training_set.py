"""The training set: pictures and base boxes from COCO files, joined to their cached rows by image and annotation id.

Called by `train.py`. D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.coco import ImageBoxes, Split
from hdovd.config import Recipe
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.identities import data_inputs
from hdovd.pipelines.images import read_pixels
from hdovd.targets import Targets

Sample = tuple[Tensor, Targets, int]  # picture (3, h, w) uint8 RGB, its targets, its image id


class TrainingSet(Dataset[Sample]):
    """Sample i is image i of the split, flipped at random; boxes, pseudo boxes and rows stay together."""

    def __init__(self, split: Split, cache: FeatureCache, recipe: Recipe, log: Callable[[str], None] = print) -> None:
        """Raises HdovdError if a level of the cache that the recipe uses does not fit the split."""
        self.split, self.cache, self.recipe = split, cache, recipe
        self.images = split.images
        self._check()
        self._leave_out_failed(log)
        self._nouns = torch.zeros(0, cache.dim)
        if recipe.loss.uses_pseudo_boxes and Level.NOUN in cache.levels():
            self._nouns = torch.from_numpy(cache.embeddings(Level.NOUN))

    def _check(self) -> None:
        loss, cache = self.recipe.loss, self.cache
        if loss.uses_cache:
            cache.require_one_clip()
        wanted = data_inputs(self.images)
        if loss.image.enabled:
            cache.require(Level.IMAGE, wanted[Level.IMAGE])
            cache.hold(Level.IMAGE)
        if loss.uses_pseudo_boxes:
            cache.require(Level.INSTANCE, wanted[Level.INSTANCE])
            cache.hold(Level.INSTANCE)
            if loss.class_.enabled and Level.NOUN not in cache.levels():
                raise HdovdError(f"{cache.path} has no nouns, so no pseudo box has a text embedding: extract it with --vocabulary "
                                 "(and --captions), or train with --set loss.class.enabled=false")

    def _leave_out_failed(self, log: Callable[[str], None]) -> None:
        """Images that extraction could not read, in base-only runs too: runs that are compared see the same images."""
        cache = self.cache
        failed = cache.failed()
        if failed:
            log(f"skipped {len(failed)}: image without embeddings ({shorten(list(failed))}); the cache says why")
            self.images = [image for image in self.images if image.id not in failed]
            if not self.images:
                raise HdovdError(f"no image of {self.split.annotations} has embeddings in {cache.path}; first reason: "
                                 f"{next(iter(failed.values()))}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        pixels, targets = read_pixels(self.split, image), self._targets(image)
        if torch.rand(()) < self.recipe.input.flip:
            pixels, targets = pixels.flip(-1), targets.flipped(image.width)
        return pixels, targets, image.id

    def _targets(self, image: ImageBoxes) -> Targets:
        dim, loss = self.cache.dim, self.recipe.loss
        boxes, labels = torch.from_numpy(image.boxes), torch.from_numpy(image.labels)
        embeddings = torch.zeros(len(boxes), dim)
        pseudo_boxes, pseudo_embeddings, pseudo_texts = torch.zeros(0, 4), torch.zeros(0, dim), torch.zeros(0, dim)
        if loss.uses_pseudo_boxes:
            rows = self.cache.instances(image.id)
            base, proposals = rows.base_boxes(), rows.proposals()
            if not np.array_equal(base.annotation_id, image.annotation_ids):
                raise HdovdError(f"{self.cache.path}: the base rows of image {image.id} are of annotations "
                                 f"{base.annotation_id.tolist()}, expected {image.annotation_ids.tolist()}: run extract-clip again")
            embeddings = _normalised(base.embedding)
            if len(self._nouns):
                proposals = proposals.select(proposals.noun >= 0)
                pseudo_texts = self._nouns[torch.from_numpy(proposals.noun.astype(np.int64))]
            else:  # instance level alone: no noun, no weight in text space
                pseudo_texts = torch.zeros(len(proposals.box), dim)
            pseudo_boxes, pseudo_embeddings = torch.from_numpy(proposals.box), _normalised(proposals.embedding)
        whole = _normalised(self.cache.image_embedding(image.id)) if loss.image.enabled else torch.zeros(dim)
        return Targets(boxes, labels, embeddings, pseudo_boxes, pseudo_embeddings, pseudo_texts, whole)


def _normalised(rows: np.ndarray) -> Tensor:
    """Stored float16 rows, of norm one again in float32."""
    return torch.nn.functional.normalize(torch.from_numpy(rows), dim=-1)
