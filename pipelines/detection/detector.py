"""A trained run that finds things by any name: `Detector.from_run(path).set_classes([...])(picture)`.

For Python, and `detect`; `evaluate_examples` is `hdovd eval --examples`. K names, D embedding size, n detections.
`names` says where their embeddings come from; `fit_rows` fits those of examples to what the detector sees of them. K
classes with examples, O other classes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou

from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, counted, log, shorten
from hdovd.data import Exif, Protocol
from hdovd.modeling.base import Detector as Model
from hdovd.modeling.batching import input_size, padded
from hdovd.modeling.boxes import Detections, detect_batch
from hdovd.modeling.export.detectors import ExportableDetector, traceable
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.device import inference_autocast, pick_device
from hdovd.pipelines.common.images import AnyPicture, Decoded, decode
from hdovd.pipelines.detection.names import Examples, NameEmbedder, Shown, read_examples, told_apart
from hdovd.pipelines.evaluation.config import SHOWN_SCORE, EvalConfig
from hdovd.pipelines.evaluation.evaluate import EvalResult, evaluate_by, load_detector
from hdovd.pipelines.runs import DEFAULT_MIX, RunFolder, Weights
from hdovd.pipelines.teachers.base import folded


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
            weights: "last" or "best". device: "auto", "cpu" or "cuda".
            clip, pretrained: the run's CLIP, as for `hdovd extract-clip`, where it lies elsewhere than the run's cache
                says.
            templates: prompts, "{}" for the name, instead of those that the run's classes were embedded with.
            trust: build code that the run names, and ask addresses that it names, though it was not trained here by
            this user.

        CLIP is loaded for names that are no classes of the run, and were not asked for before on this machine. Raises
        HdovdError.
        """
        folder, target = RunFolder.open(Path(run), trusted=trust), pick_device(device)
        embedder = NameEmbedder(folder, target, clip=clip, pretrained=pretrained, templates=templates)
        return cls(
            load_detector(folder, embedder.dim, target, Weights(weights).file), folder.protocol(), embedder, target
        )

    @property
    def recipe(self) -> Recipe:
        return self.model.recipe

    @property
    def class_embeddings(self) -> Tensor:
        """(K, D) float32: the rows of the names that are looked for, on the detector's device."""
        return self._texts[: len(self.names)]

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
        wanted = told_apart(names, "what to look for")
        asked = tuple(wanted.values())
        rows = self.embedder.embed(asked) if embeddings is None else self._fitting(embeddings, asked)
        base = {folded(name) for name in self.protocol.base}
        self.rivals: tuple[str, ...] = (
            () if alone else tuple(name for name in self.protocol.base if folded(name) not in wanted)
        )
        self._texts = torch.cat([rows, self.embedder.own_rows(self.rivals)]).to(self.device)
        self.names, self._split_blind = asked, split_blind
        self.is_novel = torch.tensor([name not in base for name in wanted], device=self.device)
        return self

    def set_examples(
        self,
        examples: Shown,
        *,
        images: Path | None = None,
        names: Sequence[str] = (),
        mix: float = DEFAULT_MIX,
        split_blind: bool = False,
        alone: bool = False,
    ) -> "Detector":
        """What to look for, by example; returns the detector itself. The run's cache and its CLIP are needed.

        Args:
            examples: pictures by the name of their class, `{"umbrella": ["a.jpg", picture]}`; a folder with a subfolder
                of crops a class; or a COCO instances file, with `images`, its image folder.
            names: other classes to look for too, by their names alone; those that have examples may be among them.
            mix: 0: names alone; 1: examples alone. split_blind, alone: as for `set_classes`.

        Raises HdovdError as `set_classes`, and for examples that cannot be used.
        """
        if not 0 <= mix <= 1:
            raise HdovdError(f"--mix {mix:g}: expected a number from 0 to 1")
        shown = read_examples(examples, images)
        asked = {folded(name): name for name in shown.names} | (told_apart(names, "what to look for") if names else {})
        rivals = [] if alone else [name for name in self.protocol.base if folded(name) not in asked]
        by_name = self.embedder.embed([*asked.values()][len(shown.names) :])
        rows = self.example_rows(shown, mix, torch.cat([by_name, self.embedder.own_rows(rivals)]))
        return self.set_classes(
            [*asked.values()], embeddings=torch.cat([rows, by_name]), split_blind=split_blind, alone=alone
        )

    def example_rows(self, examples: Examples, mix: float, others: Tensor) -> Tensor:
        """(K, D) rows of classes, of their examples and names: as `set_examples`. others: (O, D), classes beside
        them.
        """
        rows = self.embedder.embed_examples(examples, mix)
        return fit_rows(self.model, examples, rows, others) if mix else rows

    def _fitting(self, embeddings: Tensor | np.ndarray, names: tuple[str, ...]) -> Tensor:
        """Normalised, and rounded to float16 as a cache would. Raises HdovdError."""
        rows = torch.as_tensor(embeddings).detach().cpu().double()
        if rows.shape != (len(names), self.embedder.dim):
            raise HdovdError(
                f"embeddings have shape {tuple(rows.shape)}, expected ({len(names)}, {self.embedder.dim}): a row for "
                "each name, of the run's CLIP"
            )
        if bad := [
            name for name, norm in zip(names, rows.norm(dim=1).tolist(), strict=True) if not 0 < norm < float("inf")
        ]:
            raise HdovdError(f"embeddings that are zero or not finite: {shorten(list(bad))}")
        return F.normalize(rows, dim=1).half().float()

    def __call__(self, picture: AnyPicture, threshold: float = SHOWN_SCORE) -> NamedDetections:
        """`batch` of one picture."""
        return self.batch([picture], threshold)[0]

    def batch(self, pictures: Sequence[AnyPicture], threshold: float = SHOWN_SCORE) -> list[NamedDetections]:
        """What is found in each picture, with a score above `threshold`.

        Args:
            pictures: files, which are turned as their EXIF says, so that boxes are of the upright picture; or PIL
                images, (3, h, w) uint8 tensors or (h, w, 3) uint8 arrays, RGB, as they are.

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
            groups.setdefault(
                tuple(
                    map(padded, input_size(height, width, self.recipe.input.short_side, self.recipe.input.long_side))
                ),
                [],
            ).append(number)
        found: dict[int, NamedDetections] = {}
        for numbers in groups.values():
            with inference_autocast(self.device, self.recipe):
                predictions = self.model.predict(
                    [pictures[n].pixels.to(self.device, non_blocking=True) for n in numbers], self._texts
                )
                detections = detect_batch(
                    predictions,
                    torch.cat([self.is_novel, self.is_novel.new_zeros(len(self.rivals))]),
                    config,
                    split_blind=self._split_blind,
                    wanted=len(self.names),
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


ON_IOU, OFF_IOU, OFF = 0.5, 0.3, -1  # a region is on an example from the one on, off all below the other
OFF_REGIONS = 100  # of a picture
KEPT, PRIOR = 10.0, 3000.0  # weights; chosen by base classes (docs/RESULTS.md)
STEPS, RATE = 100, 0.02  # of Adam; more change nothing that counts


@torch.inference_mode(False)
@torch.enable_grad()
def fit_rows(model: Model, examples: Examples, rows: Tensor, others: Tensor) -> Tensor:
    """(K, D) L2-normalised: rows (K, D) of norm 1, moved until regions on examples are found as their class, and those
    off all examples have the probabilities that they had, as far as that takes no row far.

        sum over regions on examples of -log p + KEPT * sum over the others of KL(before || after)
        + PRIOR * sum over rows of (1 - cosine with what the row was)

    Other classes (O, D) compete. Examples that are crops without their pictures, and detectors that do not tell
    features of regions (`exportable`), leave the rows as they are.
    """
    detector = traceable(model)
    if not examples.in_pictures or not isinstance(detector, ExportableDetector):
        return rows
    found = (_regions(detector, examples, number) for number in range(len(examples.images)))
    c, label = map(torch.cat, zip(*filter(None, found), strict=True))
    on, start, others = label != OFF, rows.to(c).clone(), others.to(c).clone()  # copies, outside of inference mode
    log(f"examples in their pictures: the detector has {counted(int(on.sum()), 'region')} on them")

    def log_probabilities(moved: Tensor) -> Tensor:
        return model.scores(c, None, torch.cat([moved, others]))[0].clamp(min=1e-12).log()

    before, moved = log_probabilities(start).detach(), start.clone().requires_grad_()
    adam = torch.optim.Adam([moved], lr=RATE)
    for _ in range(STEPS):
        unit = F.normalize(moved, dim=1)
        after = log_probabilities(unit)
        loss = (
            F.nll_loss(after[on], label[on], reduction="sum")
            + PRIOR * (1 - (unit * start).sum(dim=1)).sum()
            + KEPT * F.kl_div(after[~on], before[~on], reduction="sum", log_target=True)
        )
        adam.zero_grad()
        (loss / len(on)).backward()
        adam.step()
    return F.normalize(moved.detach(), dim=1).to(rows)


@torch.no_grad()
def _regions(detector: ExportableDetector, examples: Examples, number: int) -> tuple[Tensor, Tensor] | None:
    """Features (n, D) and labels (n,) of regions of a picture, the class of the example that one is on, or OFF: of all
    that are on examples, and of OFF_REGIONS at most that are off all. None for a picture that cannot be read.
    """
    image, device = examples.images[number], detector.mean.device
    try:
        pixels = examples.picture(examples.path(image), image.width, image.height, Exif.APPLY).pixels
    except HdovdError:
        return None  # its examples are told as left out
    with inference_autocast(device, detector.recipe):
        found = detector.rois(pixels.to(device))
    overlap, nearest = box_iou(found.boxes.float(), torch.from_numpy(image.boxes).to(device)).max(dim=1)
    label = torch.from_numpy(image.labels).to(device)[nearest].where(overlap >= ON_IOU, OFF)
    off = (overlap < OFF_IOU).nonzero().flatten()
    kept = torch.cat([(label != OFF).nonzero().flatten(), off[:: -(-len(off) // OFF_REGIONS) or 1]])
    return found.c[kept].float(), label[kept]


def evaluate_examples(job: EvalConfig, source: Path) -> EvalResult:
    """Evaluate a run by its protocol, with the rows of the examples `source` for the classes that have any; files go to
    RUN/examples/NAME-MIX. Raises HdovdError for bad input, for examples of other classes than the protocol's, and
    where results of other examples of that name lie.
    """
    job.check()
    run, examples = RunFolder(job.run, job.trust), read_examples(source, job.example_images)
    protocol, texts = run.protocol(), run.class_embeddings().float()
    place = {folded(name): label for label, name in enumerate(protocol.names)}
    if strange := [name for name in examples.names if folded(name) not in place]:
        raise HdovdError(
            f"--examples {source}: no classes of protocol {protocol.name}: {shorten(list(strange))}; hdovd "
            f"detect looks for any"
        )
    out = run.path / "examples" / f"{source.absolute().name.removesuffix('.json')}-{job.mix:g}"
    about = {
        "examples": str(source.absolute()),
        "mix": job.mix,
        "classes": list(examples.names),
        "weights": str(job.weights),
    }
    told = out / "examples.json"
    if told.exists() and (was := json.loads(told.read_text())) | about != was:
        raise HdovdError(
            f"{out} holds results of {was['examples']} ({was.get('weights', 'last')} weights): move it away"
        )
    rows = [place[folded(name)] for name in examples.names]
    others = [row for row in range(len(texts)) if row not in rows]
    detector = Detector.from_run(
        job.run, weights=job.weights, device=job.device, clip=job.clip, pretrained=job.pretrained, trust=job.trust
    )
    texts[rows] = detector.example_rows(examples, job.mix, texts[others])
    del detector  # and CLIP
    result = evaluate_by(job, protocol, texts, out)
    write_text(told, json.dumps(about, indent=1))
    result.files.append(told)
    return result
