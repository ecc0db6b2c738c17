"""A trained run that finds things by any name: `Detector.from_run(path).set_classes([...])(picture)`.

For Python, and `detect`. K names, D embedding size, n detections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError, shorten
from hdovd.data.protocol import Protocol
from hdovd.modeling.base import Detector as Model
from hdovd.modeling.base import build_detector
from hdovd.modeling.batching import input_size, padded
from hdovd.modeling.boxes import Detections, detect_batch
from hdovd.pipelines.common.device import pick_device, placed
from hdovd.pipelines.common.images import AnyPicture, Decoded, decode
from hdovd.pipelines.common.precision import inference_autocast
from hdovd.pipelines.detection.names import NameEmbedder
from hdovd.pipelines.evaluation.config import SHOWN_SCORE
from hdovd.pipelines.runs.folder import RunFolder, Weights


@dataclass(frozen=True, slots=True)
class NamedDetections(Detections):
    """Best first: also names, of each of the n detections; `labels` are places in the list of names that was asked
    for."""

    names: tuple[str, ...]


class Detector:
    """Until `set_classes` it looks for the classes of the run's protocol. It belongs to one thread."""

    def __init__(self, model: Model, protocol: Protocol, embedder: NameEmbedder, device: torch.device) -> None:
        """model: on the device. `from_run` is the usual way."""
        self.model, self.protocol, self.embedder, self.device = model.eval(), protocol, embedder, device
        self.names: tuple[str, ...] = ()
        self.rivals: tuple[str, ...] = ()
        self.is_novel = torch.zeros(0, dtype=torch.bool)
        self.set_classes(protocol.names)

    @classmethod
    def from_run(
        cls,
        run: Path | str,
        *,
        weights: Weights | str = Weights.LAST,
        device: str = "auto",
        clip: str | None = None,
        pretrained: str | None = None,
        templates: Sequence[str] | None = None,
        trust: bool = False,
    ) -> "Detector":
        """The detector of a run folder.

        Args:
            weights: "last" or "best". device: "auto", "cpu" or "cuda". log: is told which CLIP and prompts were used.
            clip, pretrained: the run's CLIP, as for `hdovd extract-clip`, where it lies elsewhere than the run's cache
            says. templates: prompts, "{}" for the name, instead of those that the run's classes were embedded with.
            trust: build code that the run names, and ask addresses that it names, though it was not trained here by
            this user.

        CLIP is loaded for names that are no classes of the run, and were not asked for before on this machine. Raises
        HdovdError.
        """
        folder, target = RunFolder.open(Path(run), trusted=trust), pick_device(device)
        embedder = NameEmbedder(folder, target, clip=clip, pretrained=pretrained, templates=templates)
        model = build_detector(folder.recipe(), embedder.dim, initialise=False)
        folder.load_model(model, Weights(weights).file)
        return cls(placed(model, target), folder.protocol(), embedder, target)

    @property
    def recipe(self) -> Recipe:
        return self.model.recipe

    def set_classes(
        self,
        names: Sequence[str],
        *,
        embeddings: Tensor | np.ndarray | None = None,
        split_blind: bool = False,
        alone: bool = False,
    ) -> "Detector":
        """What to look for; returns the detector itself.

        Names of base classes of the run, in capitals or not, take the base share of the two scores, all others the
        novel one (METHOD section 7); with `split_blind` the classification score stands alone for all.

        Names compete for a box (the scores are a softmax). So that a person is not called a dog where only dogs are
        asked for, the base classes of the run that are not asked for compete too, and what they win is not given back.

        Args:
            embeddings: (K, D) text embeddings of the run's CLIP, a row a name, of any norm; CLIP is not needed then.
            alone: the names compete with each other and the background alone.

        Raises HdovdError for names or embeddings that do not fit, and if CLIP is needed and cannot be had.
        """
        if isinstance(names, str):
            raise HdovdError(f"set_classes takes a list of names, not one text: [{names!r}]")
        asked = tuple(" ".join(name.split()) for name in names)
        folded = [name.casefold() for name in asked]
        if twice := sorted({name for name, low in zip(asked, folded, strict=True) if folded.count(low) > 1}):
            raise HdovdError(f"named twice: {shorten(list(twice))}; each name once, in capitals or not")
        if not asked or not all(asked):
            raise HdovdError(
                "no names to look for" if not asked else f"name {asked.index('') + 1} of {len(asked)} is empty"
            )
        rows = self.embedder.embed(asked) if embeddings is None else self._fitting(embeddings, asked)
        base = {name.casefold() for name in self.protocol.base}
        self.rivals = () if alone else tuple(name for name in self.protocol.base if name.casefold() not in folded)
        self._texts = torch.cat([rows, self.embedder.own_rows(self.rivals)]).to(self.device)
        self.names, self._split_blind = asked, split_blind
        self.is_novel = torch.tensor([name not in base for name in folded], device=self.device)
        return self

    def _fitting(self, embeddings: Tensor | np.ndarray, names: tuple[str, ...]) -> Tensor:
        """Normalised, and rounded to float16 as a cache would. Raises HdovdError."""
        rows = torch.as_tensor(embeddings).detach().cpu().double()
        if rows.shape != (len(names), self.embedder.dim):
            raise HdovdError(
                f"embeddings have shape {tuple(rows.shape)}, expected ({len(names)}, {self.embedder.dim}): a row for "
                "each name, of the run's CLIP"
            )
        norms = rows.norm(dim=1)
        if bad := [name for name, norm in zip(names, norms.tolist(), strict=True) if not 0 < norm < float("inf")]:
            raise HdovdError(f"embeddings that are zero or not finite: {shorten(list(bad))}")
        return F.normalize(rows, dim=1).half().float()

    def __call__(self, picture: AnyPicture, threshold: float = SHOWN_SCORE) -> NamedDetections:
        """`batch` of one picture."""
        return self.batch([picture], threshold)[0]

    def batch(self, pictures: Sequence[AnyPicture], threshold: float = SHOWN_SCORE) -> list[NamedDetections]:
        """What is found in each picture, with a score above `threshold`.

        Args:
            pictures: files, which are turned as their EXIF says, so that boxes are of the upright picture; or PIL
            images,
                (3, h, w) uint8 tensors or (h, w, 3) uint8 arrays, RGB, as they are.

        Raises HdovdError for a picture that cannot be read.
        """
        return self.find([decode(picture) for picture in pictures], threshold)

    @torch.inference_mode()
    def find(self, pictures: Sequence[Decoded], threshold: float) -> list[NamedDetections]:
        """`batch` of decoded pictures. Those that need the same padding go through the detector together: none sees
        another's size.
        """
        config = self.recipe.inference.model_copy(update={"score_threshold": float(threshold)})
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            height, width = picture.pixels.shape[-2:]
            size = input_size(height, width, self.recipe.input.short_side, self.recipe.input.long_side)
            groups.setdefault(tuple(map(padded, size)), []).append(number)
        found: dict[int, NamedDetections] = {}
        for numbers in groups.values():
            with inference_autocast(self.device, self.recipe):
                predictions = self.model.predict(
                    [pictures[n].pixels.to(self.device, non_blocking=True) for n in numbers], self._texts
                )
                is_novel = torch.cat([self.is_novel, self.is_novel.new_zeros(len(self.rivals))])
                detections = detect_batch(
                    predictions, is_novel, config, split_blind=self._split_blind, wanted=len(self.names)
                )
            found |= {n: self._named(pictures[n], one) for n, one in zip(numbers, detections, strict=True)}
        return [found[number] for number in range(len(pictures))]

    def _named(self, picture: Decoded, found: Detections) -> NamedDetections:
        """In pixels of the whole picture."""
        height, width = picture.pixels.shape[-2:]
        scale = found.boxes.new_tensor([picture.width / width, picture.height / height]).repeat(2)
        return NamedDetections(
            found.boxes * scale, found.scores, found.labels, tuple(self.names[label] for label in found.labels.tolist())
        )
