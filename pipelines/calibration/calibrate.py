"""`hdovd calibrate`: fit the reliability weight of pseudo labels, `w = scale * sigmoid((cos(v, u) - centre) /
width)`, to a cache's own base boxes (METHOD section 2). No CLIP.

Nothing novel is read: base boxes, and the text embeddings of base classes. Every base box makes two labels:

- **right**: its own class. Boxes that are more like another class count too: the captions of a picture offer a few
  nouns, and the right one among them wins with cosines at which it would lose against all classes.
- **wrong**: the class that it is most like when its own is left out, as where captions or vocabulary lack the right
  noun. Not any wrong class: a label is the best of its list, and the cosines of all wrong names lie far below.

What this cannot know is which nouns a picture's captions offer, and what a proposal without any object looks like;
what follows from that stands below. Where labels are made of the k best nouns, so are these (the right one of
its own class and the k - 1 best others), and the cosine is that of their mean.

Centre and width are a logistic regression of "right" on the cosine in which all right labels together count as much as
all wrong ones: how often a pseudo box's right noun is offered is not known from base boxes, so neither is preferred,
and the centre is the cosine at which a label is as likely to be either. Its targets are Platt's, (n + 1) / (n + 2) and
1 / (m + 2) instead of 1 and 0 (Platt, 1999, "Probabilistic outputs for support vector machines"): that keeps the width
above 0 where no cosine is both right and wrong.

The scale makes the mean weight of the right labels 1: a pseudo box whose label is right counts on average as a base box
does. It lies between 1, for cosines that tell right from wrong, and 2, for those that say nothing; the known variants
have 1 and 1.3.
n right and m wrong labels.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.data.coco import ImageBoxes, Split
from hdovd.data.protocol import Protocol
from hdovd.pipelines.calibration.config import CalibrateConfig
from hdovd.pipelines.calibration.values import Calibration, origin_of
from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.common.charts import ticks
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.extraction.config import LabelRule
from hdovd.pipelines.extraction.identities import inputs_of
from hdovd.pipelines.extraction.pseudo_labels import best_nouns, label_texts

LEAST = 10  # labels of each kind; below MANY the fit is told to be uncertain
MANY = 200
STEPS = 100
LEAST_SLOPE = 1e-3  # for cosines in units of their standard deviation: below, they say nothing


@dataclass(frozen=True, slots=True)
class Fit:
    """`centre` and `width` in units of the cosine. `auc`: how often a right label has the higher cosine of the two."""

    centre: float
    width: float
    scale: float
    auc: float

    def weights(self, cosines: np.ndarray) -> np.ndarray:
        """(n,) in 0..scale."""
        return self.scale * _sigmoid((cosines - self.centre) / self.width)


def fit_reliability(right: np.ndarray, wrong: np.ndarray) -> Fit:
    """The weight that fits cosines (n,) of right and (m,) of wrong labels. Raises HdovdError if they do not say
    enough."""
    for name, cosines in (("right", right), ("wrong", wrong)):
        if len(cosines) < LEAST:
            raise HdovdError(f"{len(cosines)} {name} labels are too few to fit a weight to, expected {LEAST} or more")
        if not np.isfinite(cosines).all():
            raise HdovdError(
                f"{int((~np.isfinite(cosines)).sum())} of {len(cosines)} cosines of {name} labels are not finite"
            )
    both = np.concatenate([right, wrong]).astype(np.float64)
    mean, spread, auc = both.mean(), both.std(), area_under_curve(right, wrong)
    slope, offset = _logistic((both - mean) / spread, len(right)) if spread > 1e-6 else (0.0, 0.0)
    if slope < LEAST_SLOPE:
        raise HdovdError(
            f"the cosines do not tell right labels from wrong ones (AUC {auc:.3f}; means {right.mean():.3f} and "
            f"{wrong.mean():.3f}): no weight can be fitted. Does this CLIP know the classes, by these prompts?"
        )
    centre, width = float(mean - spread * offset / slope), float(spread / slope)
    return Fit(centre, width, float(1 / _sigmoid((right.astype(np.float64) - centre) / width).mean()), auc)


def area_under_curve(right: np.ndarray, wrong: np.ndarray) -> float:
    """The share of all pairs of a right and a wrong label in which the right one has the higher cosine; ties count
    half.
    """
    order = np.sort(wrong)
    below, up_to = np.searchsorted(order, right, "left"), np.searchsorted(order, right, "right")
    return float((below + up_to).sum() / (2 * len(right) * len(wrong)))


def _logistic(x: np.ndarray, right: int) -> tuple[float, float]:
    """Slope and offset of p = sigmoid(slope * x + offset); x: the `right` right ones first. Newton's method, with
    halved steps.
    """
    wrong = len(x) - right
    target = np.repeat([(right + 1) / (right + 2), 1 / (wrong + 2)], [right, wrong])
    weight = np.repeat([0.5 / right, 0.5 / wrong], [right, wrong])
    design = np.stack([x, np.ones_like(x)], axis=1)
    at = np.zeros(2)

    def loss(point: np.ndarray) -> float:
        logit = design @ point
        return float((weight * (np.logaddexp(0, logit) - target * logit)).sum())

    for _ in range(STEPS):
        p = _sigmoid(design @ at)
        gradient = design.T @ (weight * (p - target))
        hessian = design.T @ (design * (weight * p * (1 - p))[:, None]) + 1e-12 * np.eye(2)
        step, now = np.linalg.solve(hessian, gradient), loss(at)
        while loss(at - step) > now and np.abs(step).max() > 1e-10:
            step = step / 2
        at = at - step
        if np.abs(step).max() < 1e-8:
            break
    return float(at[0]), float(at[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


RIGHT, WRONG, CURVE, GRID, BLACK = (40, 110, 220), (230, 120, 20), (20, 20, 20), (215, 215, 215), (0, 0, 0)
WIDTH, HEIGHT, LEFT, TOP, RIGHT_MARGIN, BOTTOM = 900, 520, 70, 70, 70, 60
BINS = 80


def draw_calibration(right: np.ndarray, wrong: np.ndarray, fit: Fit, file: Path) -> None:
    """Write `file`, a PNG: histograms of cosines as shares of their kind on the left axis, the weight on the right
    one."""
    low, high = _range(right, wrong)
    edges, along = np.linspace(low, high, BINS + 1), np.linspace(low, high, 400)
    shares = [np.histogram(np.clip(cosines, low, high), edges)[0] / len(cosines) for cosines in (wrong, right)]
    top, most = max(share.max() for share in shares) * 1.05, 1.1 * max(1.0, fit.scale)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(canvas, "RGBA"), ImageFont.load_default(14)
    bottom, across, up = HEIGHT - BOTTOM, WIDTH - LEFT - RIGHT_MARGIN, HEIGHT - BOTTOM - TOP

    def x(cosine: float) -> float:
        return LEFT + across * (cosine - low) / (high - low)

    def y(part: float) -> float:
        return bottom - up * part

    for cosine in ticks(low, high):
        pen.line((x(cosine), TOP, x(cosine), bottom), fill=GRID)
    for share, colour in zip(shares, (WRONG, RIGHT), strict=True):
        for left, stop, value in zip(edges[:-1], edges[1:], share, strict=True):
            if value:
                pen.rectangle((x(left), y(value / top), x(stop) - 1, bottom), fill=(*colour, 130), outline=colour)
    pen.line(
        [(x(c), y(w / most)) for c, w in zip(along.tolist(), fit.weights(along).tolist(), strict=True)],
        fill=CURVE,
        width=3,
    )
    if low < fit.centre < high:
        pen.line((x(fit.centre), TOP, x(fit.centre), bottom), fill=CURVE, width=1)
    pen.rectangle((LEFT, TOP, WIDTH - RIGHT_MARGIN, bottom), outline="black")
    formula = f"weight = {fit.scale:.3f} * sigmoid((cosine - {fit.centre:.4f}) / {fit.width:.4f})"
    of_wrong = f"{len(wrong):,d} wrong labels: the best wrong name of each box"
    words: list[tuple[float, float, str, tuple[int, int, int], str]] = [
        *((x(cosine), bottom + 6, f"{cosine:.3g}", BLACK, "ma") for cosine in ticks(low, high)),
        *((LEFT - 6, y(part / top), f"{100 * part:.3g}%", BLACK, "rm") for part in ticks(0, top)),
        *((WIDTH - RIGHT_MARGIN + 6, y(w / most), f"{w:.3g}", BLACK, "lm") for w in ticks(0, most)),
        (LEFT, 10, f"{formula}, the black line, right axis; AUC {fit.auc:.3f}", BLACK, "la"),
        (LEFT, 30, f"{len(right):,d} right labels, share of them in each bin", RIGHT, "la"),
        (LEFT + across // 2, 30, of_wrong, WRONG, "la"),
        (LEFT + across // 2, HEIGHT - 8, "cosine of the crop's and the label's embedding", BLACK, "ms"),
    ]
    for left, top_px, text, colour, anchor in words:
        pen.text((left, top_px), text, fill=colour, font=font, anchor=anchor)
    write_picture(file, canvas, "PNG")


def _range(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float]:
    """What nearly all cosines lie in; the outermost are shown in the outermost bins."""
    both = np.concatenate([np.quantile(right, (0.001, 0.999)), np.quantile(wrong, (0.001, 0.999))])
    margin = 0.02 * (both.max() - both.min()) + 1e-6
    return float(both.min() - margin), float(both.max() + margin)


BOXES_AT_ONCE = 4_096


@dataclass(frozen=True, slots=True, eq=False)
class Cosines:
    """Of the labels that n base boxes make: right (n,), wrong (n,). `named`: of how many the right one is the
    higher."""

    right: np.ndarray
    wrong: np.ndarray
    named: int


def calibrate(config: CalibrateConfig) -> Calibration:
    """Fit, write the values and the picture. Raises HdovdError if the set does not fit the data, or nothing can be
    fitted.
    """
    config.check()
    cache = FeatureCache(config.cache, config.features)
    origin = origin_of(cache)
    _require_prompts(cache)
    split, protocol = config.load(cache.set)
    found = label_cosines(cache, split, protocol)
    try:
        fit = fit_reliability(found.right, found.wrong)
    except HdovdError as error:
        raise HdovdError(
            f"set {config.features} of {config.cache}, {len(found.right)} base boxes of {len(protocol.base)} classes: "
            f"{error}"
        ) from error
    picture = config.out.with_suffix(".png")
    about = {
        "boxes": len(found.right),
        "named_rightly": found.named,
        "auc": fit.auc,
        "right_mean": float(found.right.mean()),
        "wrong_mean": float(found.wrong.mean()),
        "weight_of_right": float(fit.weights(found.right).mean()),
        "weight_of_wrong": float(fit.weights(found.wrong).mean()),
    }
    fitted_on = {
        "cache": cache.identity()["path"],
        "features": config.features,
        "protocol": protocol.name,
        "classes": list(protocol.base),
        "levels": {str(level): cache.key(level) for level in cache.levels()},
        "way": origin.way(),
        "base_boxes": cache.key_inputs(Level.BOXES)["base_boxes"],
    }
    result = Calibration(fit.centre, fit.width, fit.scale, fitted_on, about)
    draw_calibration(found.right, found.wrong, fit, picture)
    write_text(config.out, result.to_toml())
    for line in _lines(found, fit):
        log(line)
    log(
        f"wrote {config.out} and {picture}; next: hdovd train --cache {quote(str(config.cache))} --calibration "
        f"{quote(str(config.out))} ..."
    )
    return result


def label_cosines(cache: FeatureCache, split: Split, protocol: Protocol) -> Cosines:
    """The labels that base boxes would get from the base classes. Raises HdovdError if the cache is not of these
    boxes."""
    if len(protocol.base) < 2:
        raise HdovdError(
            f"protocol {protocol.name} has one base class: there is no wrong name to tell a right one from"
        )
    wanted = inputs_of(split, cache)
    cache.require_together()
    for level in (Level.BOXES, Level.INSTANCE):
        cache.require(level, wanted[level])
    rule = LabelRule.of(cache.key_inputs(Level.PSEUDO_LABEL) if Level.PSEUDO_LABEL in cache.levels() else {})
    texts = F.normalize(torch.from_numpy(cache.class_embeddings(protocol.base)), dim=1)
    cache.hold(Level.INSTANCE)
    failed, found = cache.failed(), list[Cosines]()
    with_boxes = [image for image in split.images if image.id not in failed and len(image.boxes)]
    for images in _batches(progress(with_boxes, "base boxes", "image")):
        rows = np.concatenate([cache.instances(image.id).base_boxes().embedding for image in images])
        labels = torch.from_numpy(np.concatenate([image.labels for image in images]))
        found.append(labels_of_boxes(F.normalize(torch.from_numpy(rows).float(), dim=1), labels, texts, rule))
    if not found:
        raise HdovdError(
            f"{cache.url} has no embeddings of base boxes: a calibration needs them (imports of oadp have none)"
        )
    return Cosines(
        np.concatenate([part.right for part in found]),
        np.concatenate([part.wrong for part in found]),
        sum(part.named for part in found),
    )


def _batches(images: Iterable[ImageBoxes]) -> Iterator[list[ImageBoxes]]:
    """Of `BOXES_AT_ONCE` boxes or a few more."""
    batch, boxes = list[ImageBoxes](), 0
    for image in images:
        batch.append(image)
        boxes += len(image.labels)
        if boxes >= BOXES_AT_ONCE:
            yield batch
            batch, boxes = [], 0
    if batch:
        yield batch


def labels_of_boxes(crops: Tensor, classes: Tensor, texts: Tensor, rule: LabelRule) -> Cosines:
    """Right and wrong labels of boxes: crops (n, D), classes (n,) int64, texts (K, D) of the classes; all
    L2-normalised.
    """
    right, wrong, named = torch.zeros(len(crops)), torch.zeros(len(crops)), 0
    for own in classes.unique().tolist():
        mine, others = classes == own, torch.tensor([k for k in range(len(texts)) if k != own])
        found, _, best = best_nouns(crops[mine], texts[others], rule)
        found = others[found]
        right[mine] = _cosines(
            crops[mine], texts, torch.cat([torch.full((len(found), 1), own), found[:, : rule.top - 1]], dim=1), rule
        )
        wrong[mine] = _cosines(crops[mine], texts, found, rule)
        named += int((crops[mine] @ texts[own] > best).sum())
    return Cosines(right.numpy(), wrong.numpy(), named)


def _cosines(crops: Tensor, texts: Tensor, found: Tensor, rule: LabelRule) -> Tensor:
    """(n,) cosines of crops (n, D) and the labels that are made of the rows found (n, k) of texts."""
    cosines = (crops[:, None] * texts[found]).sum(dim=2)
    return (crops * label_texts(texts, found, (cosines / rule.temperature).softmax(dim=1))).sum(dim=1)


def _require_prompts(cache: FeatureCache) -> None:
    """Raises HdovdError if the classes' embeddings are of other prompts than the nouns', whose cosines are to be
    weighed.
    """
    if Level.NOUN not in cache.levels():
        return
    classes, nouns = cache.key_inputs(Level.CLASS), cache.key_inputs(Level.NOUN)
    if "templates" in nouns and classes.get("templates") != nouns["templates"]:
        raise HdovdError(
            f"{cache.url}: the nouns are of the prompts {nouns['templates']}, the classes "
            + ("of a file of embeddings" if "class_embeddings" in classes else f"of {classes.get('templates')}")
            + ": their cosines say nothing of the nouns'. Extract a set of the same prompts beside it (the same "
            "extract-clip "
            "command with --features plain and without --class-embeddings: texts alone), and calibrate with --features "
            "plain"
        )


def _lines(found: Cosines, fit: Fit) -> list[str]:
    right, wrong = found.right, found.wrong
    return [
        f"{len(right):,d} base boxes: their own names have cosine {right.mean():.3f} ({right.std():.3f}), the best "
        f"wrong ones "
        f"{wrong.mean():.3f} ({wrong.std():.3f}); AUC {fit.auc:.3f}; {found.named:,d} ({found.named / len(right):.1%}) "
        f"would be named rightly among all base classes",
        f"centre {fit.centre:.4f}, width {fit.width:.4f}, scale {fit.scale:.3f}: right labels weigh "
        f"{fit.weights(right).mean():.2f} on average, wrong ones {fit.weights(wrong).mean():.2f}",
        *([f"note: {len(right)} boxes are few: the values are uncertain"] if len(right) < MANY else []),
    ]
