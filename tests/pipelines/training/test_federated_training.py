"""Training on federated annotations (LVIS): what each image is judged by reaches the detector, from Zarr and from tar
shards; and images of rare classes come more often.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Protocol, Split, load_protocol
from hdovd.pipelines.dataloading.loader import Draw
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.training.train import TrainConfig, train
from hdovd.pipelines.training.training_set import TarTrainingSet, TrainingSet, repeated

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def protocol(world: Path) -> Protocol:
    return replace(load_protocol(str(world / "protocol.toml")), federated=True)


@pytest.fixture(scope="module")
def protocol_file(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("protocol") / "federated.toml"
    file.write_text((world / "protocol.toml").read_text() + "\nfederated = true\n")
    return file


@pytest.fixture(scope="module")
def annotations(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's training annotations; of each image one base class that is not there, and one novel, is known; in
    every other image not all objects of a class have a box.
    """
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    base = set(load_protocol(str(world / "protocol.toml")).base)
    for image in tree["images"]:
        own = {a["category_id"] for a in tree["annotations"] if a["image_id"] == image["id"]}
        absent = [c for c in tree["categories"] if c["id"] not in own]
        of_base = [c["id"] for c in absent if c["name"] in base]
        image["neg_category_ids"] = [of_base[image["id"] % len(of_base)], *[c["id"] for c in absent][-1:]]
        image["not_exhaustive_category_ids"] = sorted(own)[: image["id"] % 2]
    file = tmp_path_factory.mktemp("federated") / "instances.json"
    file.write_text(json.dumps(tree))
    return file


@pytest.fixture(scope="module")
def split(world: Path, annotations: Path, protocol: Protocol) -> Split:
    data = DataPaths(images=world / "train2017", annotations=annotations)
    return data.load("train2017", protocol, base_only=True)


def test_an_image_is_judged_by_what_is_in_it_and_what_is_known_not_to_be(
    split: Split, cache: Path, annotations: Path, protocol: Protocol, micro_recipe: MakeRecipe
) -> None:
    tree = json.loads(annotations.read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    absent, unfinished = (
        {image["id"]: {names[c] for c in image[key]} for image in tree["images"]}
        for key in ("neg_category_ids", "not_exhaustive_category_ids")
    )
    data = TrainingSet(split, FeatureCache(cache), micro_recipe())
    sizes = set()
    for index in range(len(data)):
        _, targets, image_id = data[Draw(0, 0, index)]
        assert targets.judged is not None
        assert targets.judged.shape == (len(protocol.base),)
        found = {protocol.base[k] for k in targets.judged.nonzero().flatten().tolist()}
        present = {protocol.base[k] for k in targets.labels.tolist()}
        assert found == (present | (absent[image_id] & set(protocol.base))) - unfinished[image_id]
        assert found & absent[image_id]
        sizes.add((len(found), len(present - found)))
    assert len(sizes) > 2


def test_an_object_without_a_box_may_be_named_by_its_base_class(
    world: Path,
    cache: Path,
    copied_cache: Path,
    annotations: Path,
    protocol_file: Path,
    split: Split,
    protocol: Protocol,
    extraction: Callable[..., ExtractConfig],
) -> None:
    """Of the same crops and nouns: proposals of images that are not judged by a class may have its name, others not."""
    data = DataPaths(images=world / "train2017", annotations=annotations)
    extract_clip(replace(extraction(copied_cache, features="federated"), data=data, protocol=str(protocol_file)))
    plain, federated = FeatureCache(cache), FeatureCache(copied_cache, "federated")
    names, base = federated.names(Level.NOUN), protocol.base
    given, before = (
        [(image, names[n]) for image in split.images for n in found.instances(image.id).noun.tolist() if n >= 0]
        for found in (federated, plain)
    )
    of_base = [(image, name) for image, name in given if name in base]
    assert of_base
    assert not any(name in base for _, name in before)
    for image, name in of_base:
        assert image.judged is not None
        assert not image.judged[base.index(name)]
    assert federated.key(Level.INSTANCE) == plain.key(Level.INSTANCE)


def test_tar_shards_hold_the_same(
    world: Path, split: Split, cache: Path, annotations: Path, protocol: Protocol, protocol_file: Path,
    micro_recipe: MakeRecipe, tmp_path: Path,
) -> None:  # fmt: skip
    data = DataPaths(images=world / "train2017", annotations=annotations)
    export_tars(ExportConfig(cache=cache, out=tmp_path / "tar", samples=9, data=data, protocol=str(protocol_file)))
    plain = TrainingSet(split, FeatureCache(cache), micro_recipe())
    shards = TarTrainingSet(str(tmp_path / "tar"), protocol, micro_recipe())
    assert len(shards) == len(plain)
    for index in range(len(plain)):
        one, two = shards[Draw(0, 0, index)][1].judged, plain[Draw(0, 0, index)][1].judged
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
    with pytest.raises(HdovdError, match=r"tar shards are read once an epoch.*train\.repeat_threshold=0"):
        TarTrainingSet(str(tmp_path / "tar"), protocol, micro_recipe("train.repeat_threshold=0.1"))


def test_a_run_trains_on_them(
    world: Path, copied_cache: Path, annotations: Path, protocol_file: Path, micro_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """The loss is another one than without; and so is its length, with images that come several times."""
    logs = []
    for number, settings in enumerate(((), ("loss.class.federated=true",), ("train.repeat_threshold=0.5",))):
        run = train(
            TrainConfig(
                recipe=micro_recipe(*settings),
                data=DataPaths(images=world / "train2017", annotations=annotations),
                protocol=str(protocol_file),
                cache=copied_cache,
                out=tmp_path / str(number),
                device="cpu",
            )
        )
        logs.append([json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()])
    plain, federated, rare = logs
    assert federated[0]["classification"] < plain[0]["classification"]
    assert rare[-1]["step"] > plain[-1]["step"]


def test_a_loss_of_judged_images_without_any_is_told(
    world: Path, copied_cache: Path, micro_recipe: MakeRecipe, tmp_path: Path
) -> None:
    lines = list[str]()
    with lines_to(lines.append):
        train(
            TrainConfig(
                recipe=micro_recipe("loss.class.federated=true"),
                data=DataPaths(world),
                protocol=str(world / "protocol.toml"),
                cache=copied_cache,
                out=tmp_path / "run",
                device="cpu",
                val_every=0,
            )
        )
    assert sum("loss.class.federated changes nothing" in line for line in lines) == 1


def test_federated_annotations_that_are_taken_for_complete_are_told(
    world: Path, annotations: Path, protocol: Protocol
) -> None:
    data, lines = DataPaths(images=world / "train2017", annotations=annotations), list[str]()
    with lines_to(lines.append):
        data.load("train2017", replace(protocol, federated=False), base_only=True)
        told = [line for line in lines if "takes them for complete" in line]
        data.load("train2017", protocol, base_only=True)
        DataPaths(world).load("train2017", replace(protocol, federated=False), base_only=True)
    assert len(told) == 1 == sum("takes them for complete" in line for line in lines)


def test_annotations_of_cocos_form_are_refused(world: Path, protocol: Protocol) -> None:
    with pytest.raises(HdovdError, match=r"image \d+ has no neg_category_ids.*for LVIS's annotations"):
        DataPaths(world).load("train2017", protocol, base_only=True)


def _image(split: Split, number: int, *labels: int) -> Any:
    boxes = np.zeros((len(labels), 4), np.float32)
    return replace(split.images[0], id=number, labels=np.array(labels, np.int64), boxes=boxes)


def test_images_of_rare_classes_come_more_often(split: Split, micro_recipe: MakeRecipe) -> None:
    """Class 0 is in all of 400 images, class 1 in four of them: sqrt(0.16 / 0.01) = 4 times; class 2 in 64, 0.16 of
    all, once.
    """
    images = [_image(split, k, *([0, 1] if k < 4 else [0, 2] if k < 68 else [0])) for k in range(400)]
    assert repeated(images, micro_recipe()) is images
    chosen = repeated(images, micro_recipe("train.repeat_threshold=0.16"))
    times = Counter(image.id for image in chosen)
    assert [times[k] for k in range(4)] == [4] * 4
    assert all(times[k] == 1 for k in range(4, 400))
    assert [image.id for image in chosen] == sorted(image.id for image in chosen)


def test_what_is_left_over_of_a_whole_number_comes_by_chance(split: Split, micro_recipe: MakeRecipe) -> None:
    """sqrt(0.5625 / 0.25) = 1.5 times: half of them twice, others by another seed, and those of no class once."""
    images = [_image(split, k, *([0] if k < 500 else [])) for k in range(2000)]
    first, again, other = (
        repeated(images, micro_recipe("train.repeat_threshold=0.5625", f"train.seed={seed}")) for seed in (0, 0, 1)
    )
    assert [image.id for image in first] == [image.id for image in again] != [image.id for image in other]
    assert 690 < sum(image.id < 500 for image in first) < 810
    assert sum(image.id >= 500 for image in first) == 1500
