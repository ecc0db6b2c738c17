"""A round of pseudo boxes: a trained detector looks for base classes and nouns on the training images, what it finds
there besides base boxes becomes proposals, and its names verdicts, which CLIP's own are mixed with: how likely each
name is, and how likely there is no object.

A box's score is the probability that it is no background, the sum of s1 over all names. A noun that the captions of an
image hold is there somewhere: the box that the detector finds likeliest for it is kept and called so, however low its
score. Beside these proposals of the highest scores over all images are kept, until there are as many for each of these
nouns as base boxes for each base class that captions name; without captions, as many as the set had that the detector
was trained from: it has learnt the base boxes, so that their scores cannot tell how many to keep, as they do for `hdovd
propose`. Which share of them lies on an object follows from their scores: the mean, which is too high where the
detector is too sure. Annotations of novel classes are not read.
"""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from hdovd.cache import Catalog, FeatureSet, Level, Source, hash_file
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, __version__, log, quiet, require_files
from hdovd.data import DataPaths, ImageBoxes, Split, load_protocol
from hdovd.modeling.base import Detector
from hdovd.modeling.boxes import combine_scores
from hdovd.pipelines.common.device import Team, team
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.evaluation.evaluate import load_detector
from hdovd.pipelines.extraction.config import ExtractConfig, LabelRule
from hdovd.pipelines.extraction.extract_clip import ExtractReport, extract_clip
from hdovd.pipelines.extraction.pseudo_labels import rows_of_classes, write_verdicts
from hdovd.pipelines.extraction.source import CacheSource, extraction_of, laid_over, set_of_run
from hdovd.pipelines.nouns.allowed import offered_nouns
from hdovd.pipelines.proposal_files.file import Proposals, read_table, write_proposals
from hdovd.pipelines.proposals.networks import Pictures, boxes_by_class, require_some_readable
from hdovd.pipelines.proposals.propose import USUAL, Parts, Selection, find_parts
from hdovd.pipelines.relabelling.config import RelabelConfig, next_round
from hdovd.pipelines.runs import RunFolder, weights_hash

NAMES = 20  # of a box, at most
LEAST = 1e-6  # score of a box: what is added to 1 is not lost


@dataclass(frozen=True, slots=True)
class Round:
    """What is kept of what a detector finds in an image. `offered`: by image the nouns, by place among the N `nouns`,
    that its captions hold.
    """

    selection: Selection
    nouns: list[str]
    offered: Mapping[int, Sequence[int]]

    def __call__(self, image: ImageBoxes, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """Of boxes (n, 4) and scores (n, 1 + N) of `object_scores` those to keep, best first, their scores, with 1
        added where a box is that of an offered noun, and of each names with their scores, that of all other names, and
        that of backgrounds: the odds of there being no object, against all names together.
        """
        base, objects = torch.from_numpy(image.boxes), scores[:, 0].clamp(LEAST, 1)  # a sum may be a little more
        called = self.called(image, boxes, scores[:, 1:], base)
        ranks = objects.clone()
        ranks[[*called]] += 1
        keep = self.selection.keep(boxes, ranks, base)
        names = [
            ({self.nouns[called[row]]: 1.0}, 0.0) if row in called else _best(scores[row, 1:], self.nouns)
            for row in keep.tolist()
        ]
        together = scores[:, 1:].sum(dim=1)
        together[[*called]] = 1.0
        grounds = ((1 - objects) / objects * together)[keep].tolist()
        told = [(*one, float(f"{ground:.4g}")) for one, ground in zip(names, grounds, strict=True)]
        return boxes[keep], ranks[keep], told

    def called(self, image: ImageBoxes, boxes: Tensor, scores: Tensor, base: Tensor) -> dict[int, int]:
        """By its row the noun of each box that is the likeliest for a noun which the image offers: those of the highest
        scores (n, N) first, each beside the others.
        """
        free, found = self.selection.usable(boxes, base), dict[int, int]()
        highest = scores[free].amax(dim=0) if free.any() else scores.new_zeros(len(self.nouns))
        for noun in sorted(self.offered.get(image.id, ()), key=lambda noun: -float(highest[noun])):
            if free.any():
                row = int(scores[:, noun].masked_fill(~free, -1.0).argmax())
                found[row] = noun
                free = free & (box_iou(boxes[row : row + 1], boxes)[0] <= self.selection.overlap)
        return found


@torch.inference_mode()
def object_scores(detector: Detector, texts: Tensor, base: int, images: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each image boxes (n, 4) xyxy pixels, and (n, 1 + N): how likely each is an object, and its scores for N nouns.

    texts: (C, D) of `base` classes and of N nouns that name none.
    """
    config, is_noun = detector.recipe.inference, torch.arange(len(texts), device=texts.device) >= base
    found = []
    for one in detector.predict(images, texts):
        names = one.class_probability
        if one.distillation_score is not None:
            names = combine_scores(names, one.distillation_score, is_noun, config.alpha, config.beta)
        objects = one.class_probability[:, :-1].sum(dim=1, keepdim=True)
        found.append((one.boxes.float(), torch.cat([objects, names[:, base:-1]], dim=1).float()))
    return found


def relabel(config: RelabelConfig) -> tuple[ExtractReport, str]:
    """Write the proposals and verdicts of a round, and fill the cache with the set that is made of them, whose name is
    returned too.

    The same call goes on where a killed one was. Raises HdovdError for bad input, such as a run of another cache or one
    that saw novel boxes, and Stopped if a signal ended it.
    """
    config.check()
    run = RunFolder.open(config.run, trusted=config.trust)
    _, name, features = set_of_run(run, config.cache)
    if Level.PSEUDO_LABEL not in features.levels:
        raise HdovdError(f"set {name} of {config.cache}, which {config.run} was trained from, names no pseudo boxes")
    moved = {key: getattr(config, key) for key in ("clip", "protocol") if getattr(config, key) is not None}
    moved |= {"pretrained": config.pretrained} if config.clip else {}
    given = "another run: of a set that extract-clip made"
    made = extraction_of(features, config.cache, name, given, device=config.device, **moved)
    made = replace(made, features=name, data=laid_over(config.data or DataPaths(), made.data))
    if load_protocol(made.protocol).base != run.protocol().base:
        raise HdovdError(f"protocol {made.protocol} has other base classes than {config.run}: give that of the run")
    require_files(**{key: getattr(made, key) for key in ("captions", "nouns", "synonyms", "class_embeddings")})
    named, number = next_round(name)
    extraction = replace(made, features=config.features or named, proposals=config.proposals, verdicts=config.verdicts)
    _require_free(extraction, name)
    with team(config.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        _propose(config, run, made, number, us, stop)
        us.wait()
    return extract_clip(extraction), extraction.features


def _require_free(extraction: ExtractConfig, before: str) -> None:
    """Raises HdovdError if the set is there, and of other proposals, or the file is, and of no round."""
    name, file = extraction.features, extraction.proposals
    there = Catalog(extraction.cache).sets().get(name)
    if name == before or (there is not None and there.made_from.get("proposals") != str(file and file.absolute())):
        raise HdovdError(f"set {name} of {extraction.cache} is there, of other proposals: name another by --features")
    if file is not None and file.exists() and "round" not in (read_table(file).made_by or {}):
        raise HdovdError(f"{file} is there, and hdovd relabel did not write it: give another --out")


def _propose(
    config: RelabelConfig, run: RunFolder, made: ExtractConfig, number: int, us: Team, stop: StopSignal
) -> None:
    """Write the files of the round after the set that `made` makes, unless they are there."""
    cache, recipe = FeatureCache(config.cache, made.features), run.recipe()
    split, protocol = CacheSource(config.cache, made.features, config.data, config.protocol).load_for(cache)
    require_some_readable(split, recipe)
    nouns, base = cache.names(Level.NOUN), protocol.base
    synonyms = cache.key_inputs(Level.CLASS).get("synonyms", {})
    of_class = rows_of_classes(nouns, [(own, *synonyms.get(own, ())) for own in base])
    taken = set(LabelRule.of(cache.key_inputs(Level.PSEUDO_LABEL)).backgrounds).union(*of_class)
    others = [row for row in range(len(nouns)) if row not in taken]
    if not others:
        raise HdovdError(
            f"set {made.features} of {cache.url} has nouns of base classes and backgrounds alone, to name nothing by"
        )
    selection = _selection(cache.set)
    origin = _origin(config, run, cache, split, base, number) | {"selection": asdict(selection)}
    if _is_there(config, origin):
        log(f"{config.proposals}: the boxes and names of this round are there")
        return
    known = offered_nouns(made.nouns, made.vocabulary, made.captions)
    offered = {} if known is None or known.by_image is None else known.by_image
    own = torch.from_numpy(cache.embeddings(Level.NOUN))[others]
    texts = torch.cat([run.class_embeddings()[: len(base)], own]).float()
    detector = load_detector(run, texts.shape[1], us.device, config.weights.file)
    find = partial(object_scores, detector.eval(), texts.to(us.device), len(base))
    kept = Round(selection, [nouns[row] for row in others], _to_find(cache, split, texts, others, offered))
    folder, found_as = config.proposals.with_name(f"{config.proposals.stem}.parts"), origin | {"background": True}
    parts = Parts(folder, split, recipe.train.batch_size, found_as)  # which tell it: those of before are made anew
    find_parts(parts, Pictures(split, recipe), find, recipe, us, stop, kept, "relabel")
    if us.leads:
        _write(
            config,
            parts,
            sum(cache.counts(Source.PROPOSAL).values()),
            objects_per_mention(split, of_class, offered),
            origin,
        )


def _to_find(
    cache: FeatureCache, split: Split, texts: Tensor, others: list[int], offered: Mapping[int, Sequence[int]]
) -> dict[int, list[int]]:
    """By image the nouns, by place in `others`, that its captions hold and no base box of it is likelier to be than
    any base class, as a box of a person is a man: the captions may mean that. texts: as in `object_scores`.
    """
    place, found = {row: k for k, row in enumerate(others)}, dict[int, list[int]]()
    base, named = texts[: len(texts) - len(others)], texts[len(texts) - len(others) :]
    for image in split.images if offered else ():
        mine = [place[row] for row in offered.get(image.id, ()) if row in place]
        boxes = torch.from_numpy(cache.instances(image.id).base_boxes().embedding).float()
        taken = (boxes @ named[mine].T > (boxes @ base.T).amax(dim=1, keepdim=True)).any(dim=0).tolist()
        found[image.id] = [noun for noun, is_taken in zip(mine, taken, strict=True) if not is_taken]
    return found


def objects_per_mention(
    split: Split, of_class: Sequence[set[int]], offered: Mapping[int, Sequence[int]]
) -> float | None:
    """How many objects there are for each that the captions name, by base classes: their boxes, for each class of an
    image that has some and is named. None without any. of_class: the noun rows of each; offered: by image.
    """
    classes = [({*image.labels.tolist()}, {*offered.get(image.id, ())}) for image in split.images]
    named = sum(not of_class[label].isdisjoint(rows) for labels, rows in classes for label in labels)
    return sum(len(image.boxes) for image in split.images) / named if named else None


def _best(scores: Tensor, nouns: list[str]) -> tuple[dict[str, float], float]:
    """The nouns (N,) of the highest scores, and a score for all others, which is no higher."""
    best = scores.topk(min(NAMES + 1, len(nouns)))
    values = [float(f"{score:.4g}") for score in best.values.tolist()]
    names = {nouns[noun]: score for noun, score in zip(best.indices.tolist(), values, strict=True) if score > 0}
    return dict(list(names.items())[:NAMES]), values[NAMES] if len(values) > NAMES else 0.0


def _write(config: RelabelConfig, parts: Parts, before: int, per_mention: float | None, origin: dict[str, Any]) -> None:
    """The files of a round, of what its parts hold: `per_mention` proposals for each noun that captions hold, or as
    many as `before`; all, if there are fewer.
    """
    found = dict[int, Proposals]()
    for part in parts.numbers:
        boxes, told = parts.read(part)
        found |= boxes
        log(*(f"skipped: {problem}" for problem in told["unreadable"]))
    ranks = np.concatenate([np.zeros(0), *(own.scores for own in found.values())])
    if not len(ranks):
        raise HdovdError(f"{config.run} finds nothing on the training images besides base boxes")
    offered = int((ranks > 1).sum())
    wanted = round(offered * per_mention) if offered and per_mention else before
    best = np.argsort(-ranks, kind="stable")[: max(wanted, offered)]  # of equal scores the first images'
    image_of = np.repeat(list(found), [len(own.scores) for own in found.values()])
    most, scores = Counter(image_of[best].tolist()), _scores(ranks[best])

    def lines() -> Iterator[tuple[int, list[float], dict[str, float], float, float]]:
        for part in parts.numbers:  # once more: names of millions of boxes would take gigabytes
            boxes, told = parts.read(part)
            for (image_id, own), names in zip(boxes.items(), told["names"], strict=True):
                box = own.boxes[: most[image_id]].astype(np.float64)  # best first
                xywh = np.concatenate([box[:, :2], box[:, 2:] - box[:, :2]], axis=1).round(2).tolist()
                yield from ((image_id, one, *called) for one, called in zip(xywh, names, strict=False))

    write_verdicts(config.verdicts, lines())
    least = float(scores[offered:].min(initial=1.0))
    selection = origin["selection"] | {"min_score": least, "on_object": round(float(scores.mean()), 4)}
    made_by = origin | {"selection": selection, "verdicts_sha256": hash_file(config.verdicts)}
    kept = {
        image_id: Proposals(own.boxes[: most[image_id]], _scores(own.scores[: most[image_id]]))
        for image_id, own in found.items()
    }
    count = write_proposals(config.proposals, kept, made_by)  # the last: with what made them, both are there
    shutil.rmtree(parts.folder, ignore_errors=True)
    log(
        f"wrote {config.proposals} and {config.verdicts.name}: {count:,d} proposals for {len(kept):,d} images "
        f"({before:,d} before), {offered:,d} of them of nouns that captions hold, the others of score {least:.3f} or "
        f"more; {selection['on_object']:.3f} in the mean"
    )


def _scores(ranks: np.ndarray) -> np.ndarray:
    """Without what `Round` added to them."""
    return np.where(ranks > 1, ranks - 1, ranks)


def _origin(
    config: RelabelConfig, run: RunFolder, cache: FeatureCache, split: Split, base: tuple[str, ...], number: int
) -> dict[str, Any]:
    """What made the proposals of a round, as JSON has it; what `hdovd audit` asks for."""
    recipe = run.recipe()
    return {
        "detector": f"run of {recipe.detector.name}",
        "run": str(run.path.resolve()),
        "weights_sha256": weights_hash(run.path / config.weights.file),
        "round": number,
        "protocol": {"name": run.protocol().name, "base": list(base)},
        "annotations": {"file": str(split.annotations.resolve()), "sha256": hash_file(split.annotations)},
        "training_images": len(split.images),
        "training_boxes": boxes_by_class(split, base),
        "oracle": run.saw_novel,
        "init": (run.record().get("init") or {}).get("run"),
        "backbone": {"name": recipe.detector.backbone.name, "weights": str(recipe.detector.backbone.weights)},
        "before": cache.set.proposals,
        "labels": cache.key(Level.PSEUDO_LABEL),  # which follows from the nouns that images offer
        "hdovd": __version__,
    }


def _selection(features: FeatureSet) -> Selection:
    """What is kept of what a detector finds: as in the round before, where that is known, but for the score."""
    given = (features.proposals.get("made_by") or {}).get("selection")
    if not isinstance(given, dict) or not asdict(USUAL).keys() <= given.keys():
        return USUAL
    known = Selection(**{name: given[name] for name in asdict(USUAL)})
    return replace(known, min_score=0.0, min_side=max(1.0, known.min_side))


def _is_there(config: RelabelConfig, origin: dict[str, Any]) -> bool:
    """Whether the files are those of this round; damaged ones are made again."""
    try:
        made_by = read_table(config.proposals).made_by or {}
        verdicts = {"verdicts_sha256": hash_file(config.verdicts)}
    except (HdovdError, OSError):
        return False
    return made_by | {"selection": None} == origin | {"selection": None} | verdicts
