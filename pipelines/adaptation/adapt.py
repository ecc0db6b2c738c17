"""Adaptation: a run is trained on new classes, held to what CLIP says of every picture, to its own earlier pictures, to
what it says itself of the new ones, and to its own weights. It is a data set and a recipe laid over `train`.

Weights in between those of before and after (WiSE-FT, arXiv 2109.01903) keep what fine-tuning forgets. How far between
is chosen by AP50: the best for the classes of the new data, on pictures held out of training, which costs the run's
other base classes little, on validation pictures of its data, else on earlier pictures held out now, else by the boxes
of which the run is sure. Novel classes have no part in it.

What became of classes is told in the end: AP50 of runs before and after, and the objects that are missed since.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou, clip_boxes_to_image

from hdovd.cache import differences
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError, log, quiet, shorten
from hdovd.core.text_files import read_json
from hdovd.data import DataPaths, ImageBoxes, Protocol, load_protocol, parse_protocol, read_instances
from hdovd.evaluation.coco import found_of
from hdovd.evaluation.matching import find_overlaps, match
from hdovd.modeling.base import Detector
from hdovd.modeling.boxes import Detections
from hdovd.pipelines.adaptation.config import AdaptConfig
from hdovd.pipelines.adaptation.data import (
    SAME_OBJECT,
    JudgedSet,
    adapted_from,
    chain_of,
    class_rows,
    groups_between,
    joined_protocol,
    mix_examples,
    plain,
    planned,
)
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.device import pick_device, team
from hdovd.pipelines.common.process import StopSignal
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.dataloading.loader import key_of
from hdovd.pipelines.detection.names import Gap
from hdovd.pipelines.evaluation.config import SHOWN_SCORE, EvalConfig
from hdovd.pipelines.evaluation.evaluate import Validation, load_detector, results
from hdovd.pipelines.extraction.source import data_of_cache, extraction_of, set_of_run
from hdovd.pipelines.runs import RunFolder, Weights, ap, table_lines
from hdovd.pipelines.training.loop import weights_of
from hdovd.pipelines.training.train import tell_cache, train_on

SURE = 0.5  # score of a box that the run teaches
MOST_LOST = 1.5  # points of AP50 that interpolation may cost the old base classes
BY_HEART = 3  # times as much as of others is lost of pictures that the run was trained on
MOST_JUDGED = 500  # validation images
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)


def adapt(config: AdaptConfig) -> RunFolder:
    """Adapt a run to new classes and return the folder of the new one; what became of its classes goes to `log`.

    Raises HdovdError for bad input or a loss that is not sound, and Stopped if a signal ended it: it is saved, and can
    be resumed.
    """
    config.check()
    run, new = RunFolder.open(config.init, trusted=config.trust), RunFolder(config.out)
    with team(config.device) as us, StopSignal(interrupts=True) as stop, quiet(not us.leads):
        own, joined, data = _data(config, run)
        olds = _old_validation(config, run)
        shown = _with_examples(data, run) if config.examples and data.recipe.loss.uses_pseudo_boxes else []
        judges = _old_judges(run, data, olds)  # before training: what cannot be read is an error at once
        recipe = planned(run, data, config.settings, config.share, us.world)
        earlier = [data.replay] if data.replay is not None else []
        for part in (data, *earlier):
            part.recipe = recipe
        about = {
            "protocol": own.to_dict(),
            "share": config.share,
            "teacher": config.teacher,
            "examples": shown,
            "replay": {str(level): key for part in earlier for level, key in part.cache.set.levels.items()},
        }
        goes_on, file = config.resume and (config.out / "checkpoint.pt").is_file(), config.out / "teacher.json"
        if lines := goes_on and differences(about, new.record().get("adapted", {}), sides=("asked for", "began with")):
            raise HdovdError(f"{config.out} began otherwise: {'; '.join(lines)}; or give another --out")
        if us.leads and not goes_on:
            file.unlink(missing_ok=True)  # of a run that is overwritten
        if config.teacher:
            if us.leads and not file.is_file():
                write_text(file, json.dumps(taught_boxes(load_detector(run, data.dim, us.device), data, us.device)))
            us.wait()
            data.taught = {int(i): torch.tensor(boxes) for i, boxes in read_json(file, "taught boxes").items() if boxes}
        train_on(replace(config, recipe=recipe), us, stop, joined, data, {"adapted": about})
        if us.leads:
            for part in earlier:
                tell_cache(part.cache, new)
            if (known := new.record().get("mix")) is None or config.mix not in (None, known["factor"]):
                new.add_to_record(mix=_mix(run, new, data, judges, config.mix, us.device))
        us.wait()
        runs = {"before": run, "after": new}
        if config.compare_naive:
            log("plain fine-tuning, to compare with:")
            naive = plain(new, len(data.images), us.world)
            alone = JudgedSet(data.split, data.cache, naive, own, data.rows, joined.base)
            of_naive = {"adapted": about | {"naive": True, "teacher": False, "replay": {}}}
            runs["naive"] = train_on(
                replace(config, out=config.out / "naive", recipe=naive), us, stop, joined, alone, of_naive
            )
        if us.leads:
            every = [*([config.validation] if config.validation else []), *(old for old, _ in olds)]
            once = {one.annotation_file("val2017").resolve(): one for one in every}
            log(retention(runs, [*once.values()], us.device))
        us.wait()
    return new


def _data(config: AdaptConfig, run: RunFolder) -> tuple[Protocol, Protocol, JudgedSet]:
    """The protocol of the new data, the joined one, and what is trained on. Raises HdovdError."""
    recipe = load_recipe(str(run.path / "config.toml"), ["loss.class.federated=true", *config.settings])
    cache = FeatureCache(config.cache, config.features, checked=config.checksums)
    own = load_protocol(config.protocol or extraction_of(cache.set, cache.url, config.features, "--protocol").protocol)
    joined = joined_protocol(run.protocol(), own)
    rows = class_rows(run, cache, joined.names)
    split = config.data.load("train2017", own, base_only=True, exif=recipe.input.exif)
    replay = None if config.replay is None else _replayed(config, run, recipe, joined, rows)
    return own, joined, JudgedSet(split, cache, recipe, own, rows, joined.base, replay)


def _with_examples(data: JudgedSet, run: RunFolder) -> list[str]:
    """The data's embeddings of classes that the run does not know become those of their boxes, where `mix_examples`
    finds these better. Returns the classes whose embeddings are not of their names alone, of earlier adaptations too.
    """
    known, before = run.protocol(), value_at(run.record(), "adapted.examples") or []
    if not (names := [name for name in data.base if name not in known.names]):
        return before
    source, base = (data.replay, known.base) if data.replay is not None else (data, data.base)
    mixed = mix_examples(data, names, Gap.of(source.cache, torch.from_numpy(data.class_embeddings(base))))
    data.rows.update(mixed)
    return sorted({*mixed, *before})


def _replayed(config: AdaptConfig, run: RunFolder, recipe: Recipe, joined: Protocol, rows: Any) -> JudgedSet:
    """The training set of the run, or of one whose weights it began with. Raises HdovdError for another cache."""
    chain, reasons = chain_of(run), list[str]()
    for one in chain:
        try:
            where, name, _ = set_of_run(one, config.replay)
        except HdovdError as error:
            reasons.append(str(error))
            continue
        own = parse_protocol(one.record().get("adapted", one.record())["protocol"])
        data = (
            DataPaths(config.replay_data) if config.replay_data else data_of_cache(one, config.replay, "--replay-data")
        )
        split = data.load("train2017", own, base_only=True, exif=recipe.input.exif)
        return JudgedSet(split, FeatureCache(where, name, checked=config.checksums), recipe, own, rows, joined.base)
    raise HdovdError(f"--replay {config.replay} is not the cache that RUN was trained from: {reasons[0]}")


def _old_validation(config: AdaptConfig, run: RunFolder) -> list[tuple[DataPaths, Protocol]]:
    """The data of the run, and of those before it, that have validation images and are there, and their classes."""
    found, chain = dict[Path, tuple[DataPaths, Protocol]](), adapted_from(run)
    for one in chain:
        moved = config.replay_data is not None and one == chain[-1]
        try:
            old = DataPaths(config.replay_data) if moved else data_of_cache(one)
        except HdovdError as error:
            log(f"note: no validation on the data of {one.path}: {error}")
            continue
        if old.root is not None and old.has("val2017"):
            old, own = DataPaths(old.root, form=old.form), one.record().get("adapted", one.record())["protocol"]
            found.setdefault(old.annotation_file("val2017").resolve(), (old, parse_protocol(own)))
    return [*found.values()]


def _old_judges(run: RunFolder, data: JudgedSet, olds: Sequence[tuple[DataPaths, Protocol]]) -> list[JudgedSet]:
    """What the old base classes are judged by: validation images that the run was not trained on, or, where there are
    none, earlier pictures that are held out now.
    """
    parts = list[JudgedSet]()
    recipe = load_recipe(
        str(run.path / "config.toml"), [f"loss.{one}.enabled=false" for one in ("instance", "class", "image")]
    )
    for where, own in olds:
        with quiet():
            split = where.load("val2017", own, base_only=True, exif=recipe.input.exif)
        part = JudgedSet(split, data.cache, recipe, own, data.rows, data.base)
        told = sorted((image for image in split.images if len(image.labels)), key=lambda image: key_of(0, -3, image.id))
        part.judging = told[:MOST_JUDGED]
        parts.append(part)
    return parts or [part for part in [data.replay] if part is not None]


def _judging(
    data: JudgedSet, images: Sequence[tuple[JudgedSet, ImageBoxes]], device: torch.device, every: bool = False
) -> Validation:
    """Detection and AP on images, in their order, of the joined base classes, as LVIS counts it: in each image of the
    classes that it is judged by, or of `every` one, by the boxes that the run taught.
    """
    targets = [part.targets(image) for part, image in images]
    judged = [set(np.flatnonzero(every | np.asarray(t.judged)).tolist()) for t in targets]
    boxes = [
        {"image_id": number, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for number, (own, known) in enumerate(zip(targets, judged, strict=True))
        for (x0, y0, x1, y1), label in zip(own.boxes.tolist(), own.labels.tolist(), strict=True)
        if label in known  # boxes that the run taught say nothing beside earlier pictures
    ]
    tree = {
        "images": [
            {
                "id": number,
                "file_name": str(part.split.path(image).resolve()).lstrip("/"),
                "width": image.width,
                "height": image.height,
                "neg_category_ids": sorted(known - {*own.labels.tolist()}),
            }
            for number, ((part, image), own, known) in enumerate(zip(images, targets, judged, strict=True))
        ],
        "annotations": [{"id": number, **box} for number, box in enumerate(boxes)],
        "categories": [{"id": label, "name": name} for label, name in enumerate(data.base)],
    }
    names, mine = tuple(data.base), {*data.place.tolist()}
    groups = {
        group: tuple(name for label, name in enumerate(names) if (label in mine) is new)
        for group, new in (("new", True), ("old base", False))
    }
    protocol = Protocol("held out", names, (), keep_empty_val=True, federated=True, groups=groups)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "instances.json"
        write_text(file, json.dumps(tree))
        return Validation(
            DataPaths(images=Path("/"), annotations=file),
            protocol,
            device,
            exif=data.recipe.input.exif,
            batch_size=data.recipe.train.batch_size,
        )


def taught_boxes(model: Detector, data: JudgedSet, device: torch.device) -> dict[int, list[list[float]]]:
    """By new picture the boxes (x0, y0, x1, y1, label) in which a run is sure of one of the classes for which nobody
    looked there, away from all that have a box. With distillation those that a pseudo box lies on, whose row they take.
    How many is told. Held-out pictures are among them where they have to stand for earlier ones.
    """
    images = [*{i.id: i for i in [*data.images, *([] if data.replay else data.judging)]}.values()]
    validation, taught, sure = _judging(data, [(data, image) for image in images], device), {}, 0
    found, _ = validation.detect(model, torch.from_numpy(data.class_embeddings(data.base)).to(device))
    for image, one in zip(images, found, strict=True):
        targets, boxes = data.targets(image), clip_boxes_to_image(one.boxes.float(), (image.height, image.width))
        free = (box_iou(boxes, targets.boxes) < SAME_OBJECT).all(dim=1) & (boxes[:, 2:] - boxes[:, :2] > 1).all(dim=1)
        keep = (one.scores >= SURE) & ~torch.isin(one.labels, data.place) & free
        sure += int(keep.sum())
        on_row = (box_iou(boxes, targets.pseudo_boxes) >= SAME_OBJECT).any(dim=1)
        keep &= on_row | (not data.recipe.loss.uses_pseudo_boxes)
        taught[image.id] = torch.cat([boxes, one.labels[:, None].float()], dim=1)[keep].tolist()
    log(
        f"the run is sure of {sure:,d} boxes of its classes on {len(images):,d} new pictures; "
        f"{sum(map(len, taught.values())):,d} of them are taught, on {sum(map(bool, taught.values())):,d} pictures: "
        f"those that have an embedding in the cache"
    )
    return taught


def _mix(
    run: RunFolder,
    new: RunFolder,
    data: JudgedSet,
    others: Sequence[JudgedSet],
    factor: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """Replace the new run's weights by the best mix with those of the run that it began with, or by that of `factor`;
    returns what its record says of it. Memories and counters stay as they were trained. `others`: by what the old base
    classes are judged.
    """
    trained, texts = new.path / "trained.safetensors", torch.from_numpy(data.class_embeddings(data.base))
    if not trained.is_file():
        replace_file(trained, lambda partial: shutil.copyfile(new.path / "model.safetensors", partial))
    model, before = (
        load_detector(new, data.dim, device, trained.name),
        load_detector(run, data.dim, device).state_dict(),
    )
    after = {name: value.clone() for name, value in model.state_dict().items()}
    names = [n for n in weights_of(model) if n in before and n in after and before[n].shape == after[n].shape]
    judging = [(part, image) for part in (data, *others) for image in part.judging]
    lost = MOST_LOST * (BY_HEART if not others or data.replay in others else 1)
    validation = _judging(data, judging, device, every=not others and bool(data.taught))
    table, best = list[dict[str, Any]](), (-1.0, 0.0)
    # Pictures that were trained on find the new weights alone the best, always.
    factors = FACTORS[:-1] if data.few else FACTORS
    for one in factors if factor is None else (factor,):
        model.load_state_dict(after | {name: torch.lerp(before[name], after[name], one) for name in names})
        found = validation.run(model, texts).combined.summary()["ap50"]
        table.append({"factor": one, "new": found["new"], "old base": found["old base"]})
        log(f"weights {one:g} new: AP50 new {ap(found['new'])}, old base {ap(found['old base'])}")
        kept = (found["old base"] or 0) >= (table[0]["old base"] or 0) - lost
        if kept and (reached := (found["new"] or 0, one)) > best:
            best = reached
            new.save_model(model)
    for name in ("metrics.json", "detections.json"):  # of other weights
        (new.path / name).unlink(missing_ok=True)
    trained_on = f", {len(data.judging)} of which were trained on" if data.few else ""
    log(
        f"the weights of {new.path} are {best[1]:g} new and {1 - best[1]:g} of RUN, by {len(judging)} pictures"
        f"{trained_on}: the best for the new classes that cost the old base classes {lost:g} points or less"
    )
    tried = {row["factor"]: row for row in [*new.record().get("mix", {}).get("table", []), *table]}
    return {
        "factor": best[1],
        "given": factor is not None,
        "tensors": len(names),
        "judged": len(judging),
        "table": [tried[one] for one in sorted(tried)],
    }


def compare(job: EvalConfig) -> str:
    """`hdovd eval --before`: `retention` of a run on one data set. Raises HdovdError for bad input."""
    paths, weights = {"before": job.before or job.run, "after": job.run}, {"after": job.weights}
    runs = {which: RunFolder.open(path, trusted=job.trust) for which, path in paths.items()}
    return retention(runs, [job.data], pick_device(job.device), weights, job.batch_size, job.workers)


def retention(
    runs: Mapping[str, RunFolder],
    data: Sequence[DataPaths],
    device: torch.device,
    weights: Mapping[str, Weights] = {},
    batch_size: int = 16,
    workers: int | None = None,
) -> str:
    """AP50 of each run ("before", "after" and others) on each data set, by groups of classes, and the objects that were
    found before and are missed after, by image and annotation id: written into the run after, and returned as a table.
    Counted are those of its classes that the annotations know, by all runs alike: one without boxes before is novel to
    the run before, and found by its name.

    Args:
        weights: which of a run's, where it is not the last.

    Raises HdovdError for data without any of the classes.
    """
    before, after = runs["before"].protocol(), runs["after"].protocol()
    rows, lines, tree = list[list[str]](), list[str](), list[dict[str, Any]]()
    texts = dict(zip(after.names, runs["after"].class_embeddings().float(), strict=True))
    for one in data:
        known = read_instances(*one.locate("val2017"))
        names = [name for name in after.names if name in known.names.values()]
        if not names:
            raise HdovdError(f"{known.file} knows none of the {len(after.names)} classes of {runs['after'].path}")
        of = {group: tuple(n for n in own if n in names) for group, own in groups_between(before, after).items()}
        ap50, seen, groups = dict[str, Any](), dict[str, set[Any]](), {group: own for group, own in of.items() if own}
        for which, run in runs.items():
            own = (before if which == "before" else after).base
            protocol = replace(
                after,
                base=tuple(name for name in names if name in own),
                novel=tuple(name for name in names if name not in own),
                groups=groups,
                federated=bool(known.absent),
            )
            with quiet(which != "before"):  # what is left out is the same for all
                validation = Validation(
                    one, protocol, device, exif=run.recipe().input.exif, batch_size=batch_size, workers=workers
                )
            every = torch.stack([texts[name] for name in protocol.names])
            said = validation.run(
                load_detector(run, every.shape[1], device, weights.get(which, Weights.LAST).file), every
            )
            ap50[which], seen[which] = said.combined.summary()["ap50"], _found(validation, said.detections)
        missed = sorted(seen["before"] - seen["after"])
        rows += [
            [str(known.file), g, str(len(own)), *(ap(ap50[which][g]) for which in runs)] for g, own in groups.items()
        ]
        lines.append(
            f"{known.file}: {len(missed)} of {len(seen['before'])} objects found before are missed now: "
            f"{shorten([f'{name} in image {image}' for image, _, name in missed], 4) or 'none'}"
        )
        tree += [{"data": str(known.file), "groups": groups, "ap50": ap50, "missed": missed}]
    write_text(runs["after"].path / "retention.json", json.dumps(tree, indent=1))
    head, nothing = ["AP50 in percent on", "classes", "", *runs], "no validation images: no AP before and after"
    return "\n".join([*table_lines(head, rows, {*head[2:]}), *lines]) if lines else nothing


def _found(validation: Validation, detections: list[Detections]) -> set[tuple[int, int, str]]:
    """Image, annotation and class of the objects that were found, with a score that is shown. Of an image, objects are
    in the split's order, and after them crowds that hold all of it.
    """
    split, protocol, objects = validation.split, validation.protocol, validation.truth.objects
    sure = [Detections(d.boxes[k], d.scores[k], d.labels[k]) for d in detections for k in [d.scores >= SHOWN_SCORE]]
    found, order = found_of(results(split, sure), split.coco_ids), np.argsort(objects.image_ids, kind="stable")
    matching = match(found, objects, find_overlaps(found, objects), max(protocol.max_detections))
    first = np.searchsorted(objects.image_ids, [image.id for image in split.images], sorter=order)
    return {
        (image.id, number, protocol.names[label])
        for at, image in zip(first.tolist(), split.images, strict=True)
        for k, (number, label) in enumerate(zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True))
        if matching.finder[order[at + k]] >= 0
    }
