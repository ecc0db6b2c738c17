r"""A drawn world in LVIS v1's form: a long tail of classes, labels of a part of what is there, and a CLIP for it.

    python benchmarks/lvis_world.py OUT [--seed 0] [--train-images 1000] [--val-images 300] [--workers 2]

    hdovd propose --images OUT/world --annotations OUT/world/annotations/lvis_v1_train.json \
        --protocol OUT/world/protocol.toml --recipe demo --out OUT/proposals.json \
        --backbone-out OUT/backbone.safetensors
    hdovd extract-clip --images OUT/world --annotations OUT/world/annotations/lvis_v1_train.json \
        --protocol OUT/world/protocol.toml --cache OUT/cache --clip local-dir:OUT/teacher \
        --vocabulary OUT/world/vocabulary.txt --proposals OUT/proposals.json
    hdovd train --images OUT/world --annotations OUT/world/annotations/lvis_v1_train.json \
        --protocol OUT/world/protocol.toml --val-images OUT/world \
        --val-annotations OUT/world/annotations/lvis_v1_val.json --cache OUT/cache --recipe demo \
        --set detector.backbone.weights=OUT/backbone.safetensors --out OUT/run
    hdovd eval OUT/run --images OUT/world --annotations OUT/world/annotations/lvis_v1_val.json

OUT/world holds train2017/, val2017/, annotations/lvis_v1_{train,val}.json, protocol.toml and vocabulary.txt. Pictures
and the 60 classes are those of `other_world.py`, whose teacher OUT/teacher is. As in LVIS:

- Classes have a long tail. By the training pictures that show one it is rare (r: at most 5 of 1,000; LVIS: 10 of
  100,000), common (c: at most 40 of 1,000; LVIS: 100 of 100,000) or frequent (f). Base is f and c, novel is r. Each is
  in a training picture at least. Validation pictures show all classes about as often (the rarest at most 2.6 times the
  most frequent), so that AP_r says something.
- Labels are federated. A picture's annotations are complete for the classes that they name, but for those in its
  not_exhaustive_category_ids; neg_category_ids are some of the classes that are not there; of all others nothing is
  known, and some of them are in the picture. Counts and letters of the categories are of all that was drawn.
- Three of four validation pictures lie in train2017/, and `coco_url` alone says where a picture lies.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from other_world import FREQUENCY, NAMES, draw_scene, make_teacher, named_rightly, of_room, world_arguments

from hdovd.pipelines.common.atomic_write import write_picture, write_text
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.common.process import limit_threads
from hdovd.pipelines.demo.world import Scene, scenes

RANK = 1 + np.argsort(np.argsort(-FREQUENCY))  # of NAMES: 1 is the most frequent, as in the other world
TAIL_OFFSET, TRAIN_POWER, VAL_POWER = 10, -3.5, 0.5  # frequency: (rank + offset) ** power, Zipf-Mandelbrot's law
REPEATED = 0.25  # of the objects after a picture's first: of a class that is there already
RARE, COMMON = 0.005, 0.04  # of the training pictures, at most; in small worlds one picture and three
LEFT_OUT = 0.1  # of a class's pictures: it is there, without annotation and in no list
NOT_EXHAUSTIVE = 0.4  # of a class's other pictures that show two objects of it or more: some of these have no box
VERIFIED_ABSENT = 0.1  # of all pictures, for every class: it is not there, and the picture says so
VAL_OFFSET = 500_000  # place of the first validation picture among all that can be drawn
URL = "http://images.invalid"


@dataclass(slots=True)
class Labels:
    """What is told of a picture. `hidden`: places of the objects that have no annotation. Classes: `left_out` ones are
    there, though nothing says so; `not_exhaustive` ones lack a box; `absent` ones are verified not to be there.
    """

    hidden: set[int] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)
    not_exhaustive: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)


def next_class(power: float, first: str | None, room: int, names: list[str], rng: np.random.Generator) -> str:
    """Class of the next object; `first`: that of the first one, if it is not left to chance."""
    if names and rng.random() < REPEATED:
        return str(rng.choice(names))
    return first if first and not names else of_room((RANK + TAIL_OFFSET) ** power, room, rng)


def draw_train(seed: int, index: int) -> Scene:
    """A training picture; the first 60 begin with one class each, so that none is missing."""
    first = NAMES[index] if index < len(NAMES) else None
    return draw_scene(seed, index, partial(next_class, TRAIN_POWER, first))


def draw_val(seed: int, index: int) -> Scene:
    """A validation picture, the rarer classes somewhat more often; each begins with the class whose turn it is."""
    return draw_scene(seed, index, partial(next_class, VAL_POWER, NAMES[index % len(NAMES)]))


def frequencies(objects: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """r, c or f for every class, from the classes of the objects of all training pictures."""
    rare, common = max(1, int(RARE * len(objects))), max(3, int(COMMON * len(objects)))
    shown = {name: sum(name in names for names in objects) for name in NAMES}
    return {name: "r" if count <= rare else "c" if count <= common else "f" for name, count in shown.items()}


def federate(objects: Sequence[tuple[str, ...]], *seed: int) -> list[Labels]:
    """The labels of all pictures of a split, from the classes of their objects. A class that is there stays annotated
    in one picture at least.
    """
    labels = [Labels() for _ in objects]
    for k, name in enumerate(NAMES):
        rng = np.random.default_rng((*seed, k))
        there = rng.permutation([i for i, names in enumerate(objects) if name in names]).astype(int).tolist()
        left_out = max(0, min(int(LEFT_OUT * len(there) + rng.random()), len(there) - 1))
        for order, i in enumerate(there):
            its = [place for place, other in enumerate(objects[i]) if other == name]
            if order < left_out:
                labels[i].left_out.append(name)
                labels[i].hidden.update(its)
            elif len(its) > 1 and rng.random() < NOT_EXHAUSTIVE:
                labels[i].not_exhaustive.append(name)
                labels[i].hidden.update(rng.permutation(its)[: rng.integers(1, len(its))].tolist())
        elsewhere = np.setdiff1d(np.arange(len(objects)), there)
        asked = min(len(elsewhere), math.ceil(VERIFIED_ABSENT * len(objects)))
        for i in rng.choice(elsewhere, asked, replace=False).tolist():
            labels[i].absent.append(name)
    return labels


def categories(objects: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
    """LVIS's records of the classes, from those of the objects of all training pictures."""
    letters = frequencies(objects)
    return [
        {
            "id": number,
            "name": name,
            "synset": f"{name}.n.01",
            "synonyms": [name],
            "def": f"a pictogram that is called {name}",
            "frequency": letters[name],
            "image_count": sum(name in names for names in objects),
            "instance_count": sum(names.count(name) for names in objects),
        }
        for number, name in enumerate(NAMES, start=1)
    ]


def write_split(
    root: Path, split: str, pictures: list[Scene], labels: list[Labels], classes: list[dict[str, Any]], first_id: int
) -> None:
    """Write pictures, and lvis_v1_SPLIT.json. Three of four validation pictures go to train2017/."""
    id_of = {entry["name"]: entry["id"] for entry in classes}
    images, annotations = list[dict[str, Any]](), list[dict[str, Any]]()
    for place, (scene, told) in enumerate(zip(pictures, labels, strict=True)):
        image_id = first_id + place
        name = f"{'val2017' if split == 'val' and place % 4 == 0 else 'train2017'}/{image_id:012d}.jpg"
        write_picture(root / name, scene.image, "JPEG", quality=92)
        images.append(
            {
                "id": image_id,
                "width": scene.image.width,
                "height": scene.image.height,
                "coco_url": f"{URL}/{name}",
                "neg_category_ids": sorted(id_of[name] for name in told.absent),
                "not_exhaustive_category_ids": sorted(id_of[name] for name in told.not_exhaustive),
            }
        )
        for number, ((x0, y0, x1, y1), kind) in enumerate(zip(scene.boxes.tolist(), scene.names, strict=True)):
            if number not in told.hidden:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": id_of[kind],
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": (x1 - x0) * (y1 - y0),
                        "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    }
                )
    tree = {
        "info": {"description": "A drawn world in LVIS v1's form"},
        "licenses": list[Any](),
        "images": images,
        "annotations": annotations,
        "categories": classes,
    }
    write_text(root / "annotations" / f"lvis_v1_{split}.json", json.dumps(tree))


def protocol_text(letters: dict[str, str]) -> str:
    """The protocol's TOML: f and c are base, r is novel."""
    groups = {letter: [name for name in NAMES if letters[name] == letter] for letter in "rcf"}
    lines = {
        "name": "lvis-world",
        "base": groups["f"] + groups["c"],
        "novel": groups["r"],
        "max_detections": [300],
        "keep_empty_val": True,  # LVIS counts what is detected in pictures without an annotation, too
        "federated": True,
        "metric": "ap",
    }
    heading = "# Base classes: frequent, then common. Novel: rare. Labels are of a part of what is in a picture.\n"
    tables = (
        "\n".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "\n" for table in (lines, groups)
    )
    return heading + "\n[groups]\n".join(tables)


def summary(split: str, objects: Sequence[tuple[str, ...]], labels: list[Labels], letters: dict[str, str]) -> list[str]:
    """What a split holds: a line for all, and one for each letter."""
    pairs = sum(len(set(names)) for names in objects)
    left_out, partly, absent = (
        sum(len(getattr(one, key)) for one in labels) for key in ("left_out", "not_exhaustive", "absent")
    )
    lines = [
        f"{split}: {len(objects):,d} pictures; of {pairs:,d} pairs of picture and class {left_out:,d} are left out, "
        f"{partly:,d} not exhaustive; {absent:,d} pairs verified absent"
    ]
    for letter in "fcr":
        names = [name for name in NAMES if letters[name] == letter]
        drawn = {name: sum(one.count(name) for one in objects) for name in names}
        boxes = dict.fromkeys(names, 0)
        for one, told in zip(objects, labels, strict=True):
            for place, name in enumerate(one):
                if name in boxes and place not in told.hidden:
                    boxes[name] += 1
        lines.append(
            f"  {letter}: {len(names)} classes, {sum(drawn.values()):,d} objects, {sum(boxes.values()):,d} with a box, "
            f"{min(boxes.values(), default=0)} to {max(boxes.values(), default=0)} a class"
        )
    return lines


def make_world(root: Path, train_images: int, val_images: int, seed: int, workers: int = 2) -> dict[str, str]:
    """Write pictures, annotations, protocol.toml and vocabulary.txt under `root`, and print what they hold. Returns r,
    c or f for every class.

    The same arguments give the same bytes, whatever `workers` is.
    """
    splits = {
        "train": (0, scenes(train_images, seed, 0, workers, draw_train)),
        "val": (VAL_OFFSET, scenes(val_images, seed, VAL_OFFSET, workers, draw_val)),
    }
    classes = categories([scene.names for scene in splits["train"][1]])
    letters = {entry["name"]: entry["frequency"] for entry in classes}
    for split, (offset, pictures) in splits.items():
        objects = [scene.names for scene in pictures]
        labels = federate(objects, seed, offset)
        write_split(root, split, pictures, labels, classes, offset + 1)
        print(*summary(split, objects, labels, letters), sep="\n", flush=True)
    write_text(root / "protocol.toml", protocol_text(letters))
    write_text(root / "vocabulary.txt", "\n".join(shipped("general")) + "\n")
    return letters


def next_commands(out: Path, clip: str) -> list[str]:
    """From proposals to AP, by the demo's recipe."""
    world = f"{out}/world"
    train, val = (f"{world}/annotations/lvis_v1_{split}.json" for split in ("train", "val"))
    data = f"--images {world} --annotations {train} --protocol {world}/protocol.toml"
    return [
        f"hdovd propose {data} --recipe demo --out {out}/proposals.json --backbone-out {out}/backbone.safetensors",
        f"hdovd extract-clip {data} --cache {out}/cache --clip {clip} --vocabulary {world}/vocabulary.txt "
        f"--proposals {out}/proposals.json",
        f"hdovd train {data} --val-images {world} --val-annotations {val} --cache {out}/cache --recipe demo "
        f"--set detector.backbone.weights={out}/backbone.safetensors --out {out}/run",
        f"hdovd eval {out}/run --images {world} --annotations {val}",
    ]


def main() -> None:
    limit_threads()
    given = world_arguments(__doc__, val_images=300)
    since = time.monotonic()
    letters = make_world(given.out / "world", given.train_images, given.val_images, given.seed, given.workers)
    print(f"world: {given.out / 'world'}, {time.monotonic() - since:.0f} s", flush=True)
    since = time.monotonic()
    clip = make_teacher((given.out / "teacher").absolute(), given.seed, workers=given.workers)
    print(f"teacher: {clip}, {time.monotonic() - since:.0f} s; names rightly, in percent:")
    rare = [name for name, letter in letters.items() if letter == "r"]
    for whom, share in named_rightly(clip, given.seed, workers=given.workers, novel=rare).items():
        print(f"{100 * share:6.1f}  {whom}")
    print("\nnext:", *next_commands(given.out, clip), sep="\n  ")


if __name__ == "__main__":
    main()
