"""How far pseudo labels are to be trusted, `w = scale * sigmoid((cos(v, u) - centre) / width)` (METHOD section 2),
fitted to labels of base boxes.

`extract-clip` ends with it, and `calibrate` draws it: a quarter of the base classes after the other is held out, which
is to say that their names may be given, as a novel class's may, and every base box of them gets the label that a
proposal with its crop would get. Some of these labels are right. A logistic regression of "right" on the cosine gives
the probability that a label is, in which proposals that lie on no object count as more wrong labels. That is the weight
where the cosine tells nothing (AUC 0.5): all labels weigh their share of right ones. Where it tells right from wrong
for certain (AUC 1), right labels weigh 1 in the mean, as base boxes do; in between the scale is, too. Nothing novel is
read.

Nouns that name no base class say nothing of that by themselves: then the embeddings of the base classes are nouns too,
which every image offers. They are all nouns that there are where a set has none, or nobody knows the words of those
that it has, as in imports.

What this cannot see is that boxes of proposals fit less well than base boxes.

n crops, D embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hdovd.cache import Level, Source
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError
from hdovd.data import Split
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.extraction.config import LabelChoice, LabelRule
from hdovd.pipelines.extraction.pseudo_labels import best_nouns, label_texts, prior, rows_of_classes

FOLDS = 4  # of the base classes
IMAGES = 20_000  # to fit to, evenly spaced
LEAST = 10  # labels, without which nothing is fitted
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


def fit_probability(cosines: np.ndarray, right: np.ndarray) -> Fit:
    """The weight that is the probability of a right label: cosines (n,) and right (n,) bool of labels as they come.
    Raises HdovdError for fewer than `LEAST`.
    """
    if len(cosines) < LEAST:
        raise HdovdError(
            f"{len(cosines)} labels of base boxes are too few to fit a weight to, expected {LEAST} or more"
        )
    x, count = np.concatenate([cosines[right], cosines[~right]]).astype(np.float64), int(right.sum())
    mean, spread = x.mean(), max(float(x.std()), 1e-3)
    slope, offset = _logistic((x - mean) / spread, count)
    if slope < LEAST_SLOPE:  # a higher cosine does not speak for a label: all weigh alike
        share = (count + 1) / (len(x) + 2)
        slope, offset = LEAST_SLOPE, float(np.log(share / (1 - share)))
    auc = area_under_curve(cosines[right], cosines[~right]) if 0 < count < len(x) else 0.5
    return Fit(float(mean - spread * offset / slope), spread / slope, 1.0, auc)


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

    Targets are (n + 1) / (n + 2) and 1 / (m + 2) for n right and m wrong ones instead of 1 and 0 (Platt, 1999,
    "Probabilistic outputs for support vector machines"): the width stays above 0 where no cosine is both.
    """
    wrong, weight = len(x) - right, 1 / len(x)
    target = np.repeat([(right + 1) / (right + 2), 1 / (wrong + 2)], [right, wrong])
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


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Labels of base boxes: their cosines (n,) and whether they are right (n,) bool. `classes`: how many base classes
    have a noun, without which none can be right, and whose boxes these are. `unnamed`: boxes of theirs that got no
    label, being most like a background.
    """

    cosines: np.ndarray
    right: np.ndarray
    classes: int
    failed: int = 0
    unnamed: int = 0

    def fitted_to(self, cache: FeatureCache) -> dict[str, Any]:
        """`fitted`, by what a set says of its proposals. Where verdicts were mixed in, how many have a label does not
        compare with how many base boxes have one.
        """
        mixed = "verdicts" in (cache.key_inputs(Level.PSEUDO_LABEL) if Level.PSEUDO_LABEL in cache.levels() else ())
        evidence = replace(self, unnamed=0) if mixed else self
        return evidence.fitted(on_object(cache.set.proposals), 1.0 if mixed else cache.named_share())

    def fitted(self, on_object: float | None, named: float = 1.0) -> dict[str, Any]:
        """The weight, and what it was fitted to, as JSON values.

        on_object: the share of proposals that lie on an object; those on none are taken to look like wrong labels, of
        which there are so many more: odds of a right one fall, and the centre rises. None: not known, all of them.
        named: the share of proposals that have a label. As few of those on objects have none as of base boxes, so that
        of those with a label more lie on objects: what `on_object` says in the result.

        Raises HdovdError for too few labels.
        """
        fit, wrong = fit_probability(self.cosines, self.right), (int((~self.right).sum()) + 1) / (len(self.right) + 2)
        known = {} if on_object is None else {"proposals_on_object": on_object}
        if on_object is not None:
            kept = len(self.right) / (len(self.right) + self.unnamed)
            on_object = min(1.0, on_object * kept / max(named, 0.01))
        share = 1.0 if on_object is None else max(on_object, 0.01)
        fit = replace(fit, centre=fit.centre + fit.width * float(np.log1p((1 - share) / share / wrong)))
        of_right = _mean(fit.weights(self.cosines)[self.right]) or 1.0
        fit = replace(fit, scale=1 + max(0.0, 2 * fit.auc - 1) * (1 / of_right - 1))
        weights = fit.weights(self.cosines)
        found = (
            asdict(fit)
            | known
            | {
                "boxes": len(self.right),
                "classes": self.classes,
                "failed": self.failed,
                "named_rightly": int(self.right.sum()),
                "on_object": on_object,
                "weight_of_right": _mean(weights[self.right]),
                "weight_of_wrong": _mean(weights[~self.right]),
            }
        )  # six digits: the last ones depend on where the cosines lie in memory
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in found.items()}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def same_prompts(cache: FeatureCache) -> bool:
    """Whether nouns and classes are of the same prompts, as far as is known: a set may have no nouns, and an import
    does not say it.
    """
    nouns = cache.key_inputs(Level.NOUN) if Level.NOUN in cache.levels() else {}
    return "templates" not in nouns or cache.key_inputs(Level.CLASS).get("templates") == nouns["templates"]


def label_evidence(
    cache: FeatureCache, split: Split, base: Sequence[Sequence[str]], offered: Mapping[int, Sequence[int]] | None
) -> Evidence:
    """The labels that base boxes get by the set's own rule with their classes held out; no labels if the nouns name no
    base class and the classes are of other prompts.

    Args:
        base: the names of each base class. offered: noun rows by image id, None for all of them everywhere.
    """
    rule = LabelRule.of(cache.key_inputs(Level.PSEUDO_LABEL) if Level.PSEUDO_LABEL in cache.levels() else {})
    words, added = cache.known_nouns(), range(0)
    of_class, texts = rows_of_classes(words, base), [cache.embeddings(Level.NOUN)] if words else []
    if not any(of_class) and same_prompts(cache):
        added = range(len(words), len(words) + len(base))
        of_class = [{row} for row in added]
        texts.append(cache.class_embeddings([names[0] for names in base]))
        if rule.choice is LabelChoice.LIKELY:
            rule = replace(rule, barred=(*rule.barred, *added))
    nouns = F.normalize(torch.from_numpy(np.concatenate(texts)), dim=1)
    failed, named = cache.failed(), np.array([bool(rows) for rows in of_class])
    images = [image for image in split.images if image.id not in failed and named[image.labels].any()]
    count = min(IMAGES, len(images))
    cosines, right, unnamed = [np.zeros(0, np.float32)], [np.zeros(0, bool)], 0
    rules = [
        replace(rule, barred=tuple(sorted(set(rule.barred).difference(*of_class[fold::FOLDS]))))
        for fold in range(FOLDS)
    ]
    for number in progress(range(count), "labels of base boxes", "image"):
        image = images[number * len(images) // count]
        crops = F.normalize(torch.from_numpy(cache.instances(image.id).base_boxes().embedding).float(), dim=1)
        own = None if offered is None else (*offered.get(image.id, ()), *added)
        for fold in range(FOLDS):
            mine = named[image.labels] & (image.labels % FOLDS == fold)
            if mine.any():
                found, weights, _ = best_nouns(crops[mine], nouns, rules[fold], prior(own, len(nouns), rules[fold]))
                some = (found[:, 0] >= 0).numpy()
                unnamed += int((~some).sum())
                cosines.append((crops[mine] * label_texts(nouns, found, weights)).sum(dim=1).numpy()[some])
                pairs = zip(found[:, 0].tolist(), image.labels[mine].tolist(), strict=True)
                right.append(np.array([noun in of_class[label] for noun, label in pairs], bool)[some])
    return Evidence(np.concatenate(cosines), np.concatenate(right), int(named.sum()), len(failed), unnamed)


def on_object(proposals: Mapping[str, Any]) -> float | None:
    """The share of proposals that lie on an object, as what made them says; None if it does not.

    proposals: what a set says of them.
    """
    try:
        selection = proposals["made_by"]["selection"]
        share = float(selection.get("by_base_boxes", selection)["on_object"])
    except (KeyError, TypeError, ValueError):
        return None
    return round(share, 4) if 0 <= share <= 1 else None


def expectation(cache: FeatureCache, fitted: Mapping[str, Any]) -> list[str]:
    """What to expect of training with the pseudo labels of a set, in words; fitted: its weights of labels."""
    share = fitted["named_rightly"] / max(fitted["boxes"], 1)
    boxes, proposals = (sum(cache.counts(source).values()) for source in (Source.BASE_BOX, Source.PROPOSAL))
    count = round(proposals * cache.named_share())
    lines = [
        f"labels of {fitted['boxes']:,d} base boxes, with their classes held out in turn: {share:.0%} right, AUC "
        f"{fitted['auc']:.3f}; so a label's weight, unless METHOD or --calibration has one for this CLIP, is "
        f"{fitted['scale']:.2f} sigmoid((cosine - {fitted['centre']:.3f}) / {fitted['width']:.3f}): right ones weigh "
        f"{fitted['weight_of_right']:.2f} in the mean, wrong ones {fitted['weight_of_wrong']:.2f}"
    ]
    if count < proposals:
        lines.append(f"{proposals - count:,d} of {proposals:,d} proposals have no label")
    if (on := fitted["on_object"]) is None:
        return [*lines, "which share of the proposals lies on an object is not known: labels weigh as if all did"]
    wrong = count * (1 - on * share) * fitted["weight_of_wrong"]
    return [
        *lines,
        f"expect of {count:,d} pseudo boxes about {on:.0%} on an object and {on * share:.0%} with its name; wrong ones "
        f"weigh {wrong / max(boxes, 1):.1%} of what the {boxes:,d} base boxes do: base AP is at risk by that",
    ]
