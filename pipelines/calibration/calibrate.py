"""`hdovd calibrate`: the reliability weight of pseudo labels, `w = scale * sigmoid((cos(v, u) - centre) / width)`,
fitted to a cache's own base boxes (METHOD section 2), drawn and written to a file. No CLIP, and nothing novel is read.

A set that extract-clip fitted a weight for gets it again: `extraction.label_weights` says how. What follows is for
others, whose nouns are not there or name no base class: older sets and imports. Every base box makes two labels:

- **right**: its own class. Boxes that are more like another class count too: the captions of a picture offer a few
  nouns, and the right one among them wins with cosines at which it would lose against all classes.
- **wrong**: the class that it is most like when its own is left out, as where captions or vocabulary lack the right
  noun. Not any wrong class: a label is the best of its list, and the cosines of all wrong names lie far below.

What this does not know is which nouns a picture's captions offer, and what a proposal without any object looks like;
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
from hdovd.pipelines.extraction.identities import inputs_of, offered_input
from hdovd.pipelines.extraction.label_weights import (
    LEAST,
    MANY,
    Fit,
    expectation,
    fit_reliability,
    label_evidence,
    on_object,
)
from hdovd.pipelines.extraction.pseudo_labels import best_nouns, label_texts
from hdovd.pipelines.extraction.source import extraction_of
from hdovd.pipelines.extraction.text import read_synonyms
from hdovd.pipelines.nouns.allowed import offered_nouns

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
    of_wrong = f"{len(wrong):,d} wrong labels"
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
    _require_boxes(cache, split)
    if cache.set.label_weights:
        found, fit = held_out(cache, split, protocol, config)
    else:
        found = label_cosines(cache, split, protocol)
        try:
            fit = fit_reliability(found.right, found.wrong)
        except HdovdError as error:
            raise HdovdError(
                f"set {config.features} of {config.cache}, {len(found.right)} base boxes of {len(protocol.base)} "
                f"classes: {error}"
            ) from error
    picture = config.out.with_suffix(".png")
    about = {
        "boxes": len(found.right) + len(found.wrong) * bool(cache.set.label_weights),
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
    if not cache.set.label_weights:
        for line in _lines(found, fit):
            log(line)
    log(
        f"wrote {config.out} and {picture}; next: hdovd train --cache {quote(str(config.cache))} --calibration "
        f"{quote(str(config.out))} ..."
    )
    return result


def _require_boxes(cache: FeatureCache, split: Split) -> None:
    """Raises HdovdError if the set is not of these base boxes."""
    wanted = inputs_of(split, cache)
    cache.require_together()
    for level in (Level.BOXES, Level.INSTANCE):
        cache.require(level, wanted[level])


def held_out(cache: FeatureCache, split: Split, protocol: Protocol, config: CalibrateConfig) -> tuple[Cosines, Fit]:
    """The labels of base boxes whose classes are held out, and the weight that extract-clip fitted to them: again,
    from the files of nouns. Raises HdovdError if these are not there, or have changed since.
    """
    made = extraction_of(cache.set, config.cache, config.features)
    nouns = offered_nouns(made.nouns, made.vocabulary, made.captions)
    if (
        nouns is None
        or list(nouns.vocabulary) != list(cache.names(Level.NOUN))
        or offered_input(nouns, cache.image_ids().tolist()) != cache.key_inputs(Level.PSEUDO_LABEL)["offered"]
    ):
        raise HdovdError(
            f"{made.nouns or made.captions or made.vocabulary} is not what set {config.features} of {config.cache} was "
            f"made from any more: run its extract-clip command again, and then this one"
        )
    synonyms = {} if made.synonyms is None else read_synonyms(made.synonyms, protocol.names)
    names = [(name, *synonyms.get(name, ())) for name in protocol.base]
    found = label_evidence(cache, split, names, nouns.by_image)
    fitted = found.fitted(on_object(cache.set.proposals), cache.named_share())
    for line in expectation(cache, fitted):
        log(line)
    right = found.right
    if min(counts := (int(right.sum()), int((~right).sum()))) < LEAST:
        raise HdovdError(
            f"{counts[0]} right and {counts[1]} wrong labels are too few, expected {LEAST} or more of each"
        )
    fit = Fit(*(fitted[name] for name in ("centre", "width", "scale", "auc")))
    return Cosines(found.cosines[right], found.cosines[~right], counts[0]), fit


def label_cosines(cache: FeatureCache, split: Split, protocol: Protocol) -> Cosines:
    """The labels that base boxes would get from the base classes. Raises HdovdError if the cache has none of their
    embeddings.
    """
    if len(protocol.base) < 2:
        raise HdovdError(
            f"protocol {protocol.name} has one base class: there is no wrong name to tell a right one from"
        )
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
