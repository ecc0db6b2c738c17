"""`hdovd calibrate`: fit the reliability weight of pseudo labels to a cache's own base boxes (METHOD section 2). No
CLIP.

Nothing novel is read: base boxes, and the text embeddings of base classes.

Every base box makes two labels:

- **right**: its own class. Boxes that are more like another class count too: the captions of a picture offer a few
  nouns, and the right one among them wins with cosines at which it would lose against all classes.
- **wrong**: the class that it is most like when its own is left out, as where captions or vocabulary lack the right
  noun. Not any wrong class: a label is the best of its list, and the cosines of all wrong names lie far below.

What this cannot know is which nouns a picture's captions offer, and what a proposal without any object looks like;
`fit` says what follows from that. Where labels are made of the k best nouns, so are these (the right one of
its own class and the k - 1 best others), and the cosine is that of their mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.core.errors import HdovdError
from hdovd.data.coco import Split
from hdovd.data.protocol import Protocol
from hdovd.pipelines.calibration.config import CalibrateConfig
from hdovd.pipelines.calibration.fit import MANY, Fit, fit_reliability
from hdovd.pipelines.calibration.picture import draw_calibration
from hdovd.pipelines.calibration.values import Calibration, origin_of
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.extraction.identities import inputs_of
from hdovd.pipelines.extraction.label_rule import LabelRule
from hdovd.pipelines.extraction.pseudo_labels import best_nouns, label_texts

BOXES_AT_ONCE = 4_096


@dataclass(frozen=True, slots=True, eq=False)
class Cosines:
    """Of the labels that n base boxes make: right (n,), wrong (n,). `named`: of how many the right one is the
    higher."""

    right: np.ndarray
    wrong: np.ndarray
    named: int


def calibrate(config: CalibrateConfig, log: Callable[[str], None] = print) -> Calibration:
    """Fit, write the values and the picture. Raises HdovdError if the set does not fit the data, or nothing can be
    fitted.
    """
    config.check()
    cache = FeatureCache(config.cache, config.features)
    origin = origin_of(cache)
    _require_prompts(cache)
    split, protocol = config.source.load(cache.set, log)
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
    cache.require(Level.BOXES, wanted[Level.BOXES])
    cache.require(Level.INSTANCE, wanted[Level.INSTANCE])
    inputs = {level: cache.key_inputs(level) for level in cache.levels()}
    rule = LabelRule.of(inputs.get(Level.PSEUDO_LABEL, {}))
    texts = F.normalize(torch.from_numpy(cache.class_embeddings(protocol.base)), dim=1)
    cache.hold(Level.INSTANCE)
    failed, rows, labels = cache.failed(), list[np.ndarray](), list[np.ndarray]()
    found, waiting = list[Cosines](), 0

    def take() -> None:
        crops = F.normalize(torch.from_numpy(np.concatenate(rows)).float(), dim=1)
        found.append(labels_of_boxes(crops, torch.from_numpy(np.concatenate(labels)), texts, rule))
        rows.clear()
        labels.clear()

    for image in progress(split.images, "base boxes", "image"):
        if image.id in failed or not len(image.boxes):
            continue
        rows.append(cache.instances(image.id).base_boxes().embedding)
        labels.append(image.labels)
        waiting += len(image.labels)
        if waiting >= BOXES_AT_ONCE:
            take()
            waiting = 0
    if rows:
        take()
    if not found:
        raise HdovdError(
            f"{cache.url} has no embeddings of base boxes: a calibration needs them (imports of oadp have none)"
        )
    return Cosines(
        np.concatenate([part.right for part in found]),
        np.concatenate([part.wrong for part in found]),
        sum(part.named for part in found),
    )


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
    few = [f"note: {len(right)} boxes are few: the values are uncertain"] if len(right) < MANY else []
    return [
        f"{len(right):,d} base boxes: their own names have cosine {right.mean():.3f} ({right.std():.3f}), the best "
        f"wrong ones "
        f"{wrong.mean():.3f} ({wrong.std():.3f}); AUC {fit.auc:.3f}; {found.named:,d} ({found.named / len(right):.1%}) "
        f"would be named rightly among all base classes",
        f"centre {fit.centre:.4f}, width {fit.width:.4f}, scale {fit.scale:.3f}: right labels weigh "
        f"{fit.weights(right).mean():.2f} on average, wrong ones {fit.weights(wrong).mean():.2f}",
        *few,
    ]
