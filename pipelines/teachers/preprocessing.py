"""What a CLIP wants done to a picture, on uint8 tensors: open_clip's evaluation transform, its resizing kept apart from
normalisation.

Pictures stay bytes until they are on the model's device: a quarter of the memory to move, and half of the work on a CPU
core.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """open_clip's preprocessing configuration, under its names. `size`: height and width of the model's input."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Preprocessing":
        """From `visual.preprocess_cfg` of an open_clip model."""
        given = [config[name] for name in ("size", "mean", "std")]
        size, mean, std = (tuple(value) if isinstance(value, tuple | list) else (value,) for value in given)
        return cls(
            (size[0], size[-1]),
            mean * (3 // len(mean)),
            std * (3 // len(std)),
            config.get("interpolation") or "bicubic",
            config.get("resize_mode") or "shortest",
            int(config.get("fill_color") or 0),
        )

    def squashed(self, side: int) -> "Preprocessing":
        """The same, of whole pictures into a square of `side` whatever the model's way: cutting would lose boxes, a
        border cells.
        """
        return replace(self, size=(side, side), resize_mode="squash")

    def inputs(self) -> dict[str, Any]:
        """What of it determines embeddings, as JSON values: a part of a product's key."""
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()},
            "resize": "antialiased, to uint8",
        }

    def fit(self, picture: Tensor) -> Tensor:
        """(3, h, w) uint8 -> (3, *size) uint8: resized and cut, or filled up, about the centre."""
        height, width = picture.shape[1:]
        rows, columns = self._resized(height, width)
        batch = picture[None].contiguous(
            memory_format=torch.channels_last
        )  # the form that torch's resizing of bytes wants
        if (
            height > rows and 2 * (width - columns) < height - rows
        ):  # Pillow 13 then shrinks down before across, and rounds in between
            batch = F.interpolate(batch, (rows, width), mode=self._filter, antialias=True)
        if batch.shape[-2:] != (rows, columns):
            batch = F.interpolate(batch, (rows, columns), mode=self._filter, antialias=True)
        return batch[0] if (rows, columns) == self.size else self._centred(batch[0])

    def normalise(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) uint8 -> float32 as the model takes it, on the same device."""
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std

    @property
    def _filter(self) -> str:
        """open_clip's choice: bicubic for "random" too, and for whatever keeps the ratio towards an input that is no
        square.
        """
        ratio_kept = self.resize_mode == "shortest" and self.size[0] != self.size[1]
        return "bilinear" if self.interpolation == "bilinear" and not ratio_kept else "bicubic"

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """The whole picture's size after resizing: rounded as open_clip and torchvision round."""
        if self.resize_mode == "squash":
            return self.size
        ratios = height / self.size[0], width / self.size[1]
        if self.resize_mode == "shortest" and self.size[0] == self.size[1]:
            side, short = self.size[0], min(height, width)
            return (side, int(side * width / short)) if height <= width else (int(side * height / short), side)
        ratio = max(ratios) if self.resize_mode == "longest" else min(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))  # open_clip fails where that is 0

    def _centred(self, picture: Tensor) -> Tensor:
        (height, width), (rows, columns) = picture.shape[-2:], self.size
        if height < rows or width < columns:
            down, across = max(0, rows - height), max(0, columns - width)
            picture = F.pad(picture, (across // 2, -(-across // 2), down // 2, -(-down // 2)), value=self.fill_color)
            height, width = picture.shape[-2:]
        top, left = round((height - rows) / 2), round((width - columns) / 2)
        return picture[..., top : top + rows, left : left + columns]
