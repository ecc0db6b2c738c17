"""CLIP run in every training step, in place of the cache: what `bench_train` compares with. Not a way to train."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import open_clip
import torch
from PIL import Image
from torch import Tensor

from hdovd.config.recipe import Recipe
from hdovd.data.targets import with_large_pseudo_boxes
from hdovd.pipelines.teachers.openclip import ClipTeacher
from hdovd.pipelines.training.training_set import Sample


def reference_transform(clip: ClipTeacher) -> Callable[[Image.Image], Tensor]:
    """open_clip's own transform, PIL image -> (3, *input_size) float32: what a teacher's preprocessing has to equal."""
    config = open_clip.transform.PreprocessCfg(**clip.model.visual.preprocess_cfg)
    transform: Callable[[Image.Image], Tensor] = open_clip.transform.image_transform_v2(config, is_train=False)
    return transform


class OnlineClip:
    """Cuts every box that a step uses out of its picture with Pillow, puts it through open_clip's transform, and embeds
    it.
    """

    def __init__(self, clip: ClipTeacher, recipe: Recipe) -> None:
        self._clip, self._recipe, self._transform = clip, recipe, reference_transform(clip)

    def replace(self, sample: Sample) -> Sample:
        """The sample with embeddings of now: of its base boxes, the pseudo boxes that a step takes, and the whole
        picture.
        """
        pixels, targets, image_id = sample
        height, width = pixels.shape[-2:]
        scale = min(
            self._recipe.input.short_side / min(height, width), self._recipe.input.long_side / max(height, width)
        )
        pseudo = self._recipe.pseudo_boxes
        targets = with_large_pseudo_boxes([targets], pseudo.min_side / scale)[0].with_first_pseudo_boxes(
            pseudo.max_per_image
        )
        picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        found = self._embed([*(picture.crop(box) for box in _corners(targets.all_boxes)), picture])
        base = len(targets.boxes)
        return (
            pixels,
            replace(targets, embeddings=found[:base], pseudo_embeddings=found[base:-1], image_embedding=found[-1]),
            image_id,
        )

    def _embed(self, crops: Iterable[Image.Image]) -> Tensor:
        return torch.from_numpy(
            self._clip.embed_preprocessed(torch.stack([self._transform(crop) for crop in crops]))
        ).float()


def _corners(boxes: Tensor) -> list[tuple[int, int, int, int]]:
    """Whole pixels around each box, at least one."""
    return [
        (int(x0), int(y0), max(int(x0) + 1, int(x1 + 0.999)), max(int(y0) + 1, int(y1 + 0.999)))
        for x0, y0, x1, y1 in boxes.tolist()
    ]
