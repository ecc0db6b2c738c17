"""Training from tar shards: the very samples of the Zarr cache, every image once an epoch, and the same refusals."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from orders import InOrder

from hdovd.cache import TAR_META
from hdovd.cache.reader import FeatureCache
from hdovd.cache.tar_shards import TarMeta
from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Protocol, load_protocol
from hdovd.modeling.faster_rcnn.model import FasterRCNN
from hdovd.pipelines.dataloading.loader import Dealing, Draw, Streams, TrainingBatches
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.loop import Hooks
from hdovd.pipelines.training.train import TrainConfig, loop_of, train
from hdovd.pipelines.training.training_set import Sample, TarTrainingSet, TrainingSet

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
OFF = {level: f"loss.{level}.enabled=false" for level in ("instance", "class", "image")}


def _in_order(data: TarTrainingSet) -> Iterator[Sample]:
    return (data[Draw(0, 0, number)] for number in range(len(data)))


@pytest.fixture(scope="module")
def shards(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro world's cache as shards of 5 images: five of them, the last of 3."""
    folder = tmp_path_factory.mktemp("tar") / "shards"
    export_tars(ExportConfig(cache=cache, out=folder, samples=5))
    return folder


@pytest.fixture(scope="module")
def protocol(world: Path) -> Protocol:
    return load_protocol(str(world / "protocol.toml"))


@pytest.fixture(scope="module")
def zarr_set(world: Path, cache: Path, protocol: Protocol) -> Callable[[Recipe], TrainingSet]:
    split = DataPaths(world).load("train2017", protocol, base_only=True)
    return lambda recipe: TrainingSet(split, FeatureCache(cache), recipe)


def _same(found: Sample, expected: Sample) -> None:
    assert found[2] == expected[2]
    assert torch.equal(found[0], expected[0])
    for name in expected[1].__slots__:
        one, two = getattr(found[1], name), getattr(expected[1], name)
        if one is None or two is None:
            assert one is two, name
            continue
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name


# --- samples ---


@pytest.mark.parametrize(
    "off", [(), ("class",), ("image",), ("instance", "class"), ("instance", "class", "image")], ids=" ".join
)
def test_samples_are_those_of_the_zarr_cache(
    shards: Path,
    protocol: Protocol,
    zarr_set: Callable[[Recipe], TrainingSet],
    kept: list[int],
    micro_recipe: MakeRecipe,
    off: tuple[str, ...],
) -> None:
    recipe = micro_recipe("input.flip=0.0", *(OFF[level] for level in off))
    expected = zarr_set(recipe)
    data = TarTrainingSet(str(shards), protocol, recipe)
    found = [data[Draw(0, 0, number)] for number in range(len(data))]
    assert [sample[2] for sample in found] == kept
    assert len(found) == len(expected)
    for sample, number in zip(found, range(len(expected)), strict=True):
        _same(sample, expected[Draw(0, 0, number)])


def test_image_without_proposals_keeps_its_base_boxes(
    shards: Path, protocol: Protocol, micro_recipe: MakeRecipe
) -> None:
    _, targets, _ = next(s for s in _in_order(TarTrainingSet(str(shards), protocol, micro_recipe())) if s[2] == 2)
    assert len(targets.boxes) > 0
    assert len(targets.pseudo_boxes) == 0


def test_flips_are_those_of_the_zarr_cache(
    shards: Path, protocol: Protocol, zarr_set: Callable[[Recipe], TrainingSet], micro_recipe: MakeRecipe
) -> None:
    recipe = micro_recipe("input.flip=0.5")
    tar, zarr = TarTrainingSet(str(shards), protocol, recipe), zarr_set(recipe)
    for epoch in (0, 3):
        for number in range(len(zarr)):
            _same(tar[Draw(epoch, 0, number)], zarr[Draw(epoch, 0, number)])


# --- epochs ---


def _batches(data: TarTrainingSet, workers: int, batch_size: int = 4, world: int = 1) -> list[TrainingBatches[Sample]]:
    """Of each process."""
    found = []
    for rank in range(world):
        mine = copy.copy(data)
        mine.dealing = Dealing(
            mine.order(Streams(max(1, workers) * world, batch_size // world)), batch_size, rank, world
        )
        found.append(TrainingBatches(mine, mine.dealing, workers, device=CPU))
    return found


def _epochs(data: TarTrainingSet, workers: int, batch_size: int = 4, epochs: int = 2) -> list[list[int]]:
    """Image ids, epoch by epoch, of all batches."""
    (batches,) = _batches(data, workers, batch_size)
    found = []
    for epoch in range(epochs):
        batches.seek(epoch)
        lists = [[sample[2] for sample in batch] for batch in batches]
        assert len(lists) == len(batches)
        assert all(len(one) == batch_size for one in lists[:-1])
        found.append([image for one in lists for image in one])
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 7])
def test_every_image_once_an_epoch_however_many_workers(
    shards: Path, protocol: Protocol, kept: list[int], micro_recipe: MakeRecipe, workers: int
) -> None:
    """Five shards: fewer than workers, as many as two each and one left over, or all for one."""
    data = TarTrainingSet(str(shards), protocol, micro_recipe())
    first, second = _epochs(data, workers, batch_size=1)
    assert sorted(first) == sorted(second) == kept
    assert kept not in (first, second)
    assert first != second


def test_a_seed_repeats_the_order_and_another_does_not(
    shards: Path, protocol: Protocol, micro_recipe: MakeRecipe
) -> None:
    data = [TarTrainingSet(str(shards), protocol, micro_recipe(f"train.seed={seed}")) for seed in (4, 4, 5)]
    one, same, other = (_epochs(some, 2) for some in data)
    assert one == same
    assert one != other


def test_an_epoch_entered_in_the_middle_by_other_workers_is_the_same(
    shards: Path, protocol: Protocol, kept: list[int], micro_recipe: MakeRecipe
) -> None:
    """As a run that is resumed with other processes does: it keeps its streams, and each image is still seen once."""
    data = TarTrainingSet(str(shards), protocol, micro_recipe("input.flip=0.5"))
    order = data.order(Streams(2, 2))
    expected: list[int] = []
    for workers, world, steps in ((2, 1, range(2)), (0, 2, range(2, 4)), (3, 1, range(4, 11))):
        parts = []
        for rank in range(world):
            mine = copy.copy(data)
            mine.dealing = Dealing(order, 2, rank, world)
            batches = TrainingBatches(mine, mine.dealing, workers, device=CPU)
            batches.seek(1, steps.start)
            parts.append([[sample[2] for sample in batch] for batch, _ in zip(batches, steps, strict=False)])
        expected += [image for step in zip(*parts, strict=True) for part in step for image in part]
    ids = [sample[2] for sample in _in_order(data)]
    assert expected == [ids[index] for index in order(1)[:22]]
    assert len(set(expected)) == 22
    assert set(expected) < set(kept)


@pytest.mark.parametrize(("batch_size", "expected"), [(8, 16), (23, 23), (30, 23), (5, 20)])
def test_the_last_batch_that_is_not_full(
    shards: Path,
    protocol: Protocol,
    micro_recipe: MakeRecipe,
    batch_size: int,
    zarr_set: Callable[[Recipe], TrainingSet],
    expected: int,
) -> None:
    """As many steps an epoch as from the Zarr cache: the schedule and a comparison depend on it."""
    data = TarTrainingSet(str(shards), protocol, micro_recipe())
    (found,) = _epochs(data, 2, batch_size, 1)
    assert len(found) == len(set(found)) == expected
    other = zarr_set(micro_recipe())
    assert Dealing(other.order(Streams()), batch_size).steps == Dealing(data.order(Streams()), batch_size).steps


def test_shards_are_read_once_by_the_worker_that_owns_them(
    shards: Path, protocol: Protocol, micro_recipe: MakeRecipe
) -> None:
    data = TarTrainingSet(f"{shards}/{{000000..000003}}.tar", protocol, micro_recipe())
    for batches in _batches(data, 0, 4, world=2):
        mine = batches._loader.dataset.data  # type: ignore[attr-defined]
        opened: list[int] = []
        raw = mine.shards.raw
        mine.shards = copy.copy(mine.shards)
        mine.shards.raw = lambda number, opened=opened, raw=raw: (opened.append(number), raw(number))[1]
        assert sum(1 for _ in batches) == 5
        assert len(opened) == len(set(opened)) == 2


def test_some_shards_are_some_images(
    shards: Path, protocol: Protocol, kept: list[int], micro_recipe: MakeRecipe
) -> None:
    data = TarTrainingSet(f"{shards}/{{000001..000002}}.tar", protocol, micro_recipe())
    assert len(data) == 10
    assert sorted(_epochs(data, 3, 1, epochs=1)[0]) == kept[5:15]


def test_a_copy_in_another_process_reads_the_same(shards: Path, protocol: Protocol, micro_recipe: MakeRecipe) -> None:
    """What workers that are spawned get."""
    data = TarTrainingSet(str(shards), protocol, micro_recipe("input.flip=0.0"))
    for found, expected in zip(_in_order(pickle.loads(pickle.dumps(data))), _in_order(data), strict=True):
        _same(found, expected)


@pytest.fixture(scope="module")
def broken(
    world: Path, extraction: Callable[..., ExtractConfig], tmp_path_factory: pytest.TempPathFactory, kept: list[int]
) -> Path:
    """Shards of a world in which the third image could not be read, nor any of the last shard."""
    folder = tmp_path_factory.mktemp("broken")
    copied = Path(shutil.copytree(world, folder / "world"))
    for image in (kept[2], *kept[20:]):
        (copied / "train2017" / f"{image:012d}.jpg").unlink()
    extract_clip(extraction(folder / "cache", data=copied))
    export_tars(ExportConfig(cache=folder / "cache", out=folder / "shards", samples=5))
    return folder / "shards"


def test_images_that_failed_are_skipped_by_name(
    broken: Path, protocol: Protocol, kept: list[int], micro_recipe: MakeRecipe
) -> None:
    lines: list[str] = []
    left = [image for image in kept[:20] if image != kept[2]]
    with lines_to(lines.append):
        data = TarTrainingSet(str(broken), protocol, micro_recipe())
    assert any(line.startswith("skipped 4: image without embeddings") and str(kept[2]) in line for line in lines)
    assert len(data) == len(left)
    for workers in (0, 2):
        assert sorted(_epochs(data, workers, 1, epochs=1)[0]) == left
    with pytest.raises(HdovdError, match=r"no image of .*000004\.tar has embeddings; first reason: .*no such file"):
        TarTrainingSet(str(broken / "000004.tar"), protocol, micro_recipe())


# --- the whole stage ---


def _job(shards: Path | str, out: Path, recipe: Recipe, world: Path) -> TrainConfig:
    return TrainConfig(
        data=DataPaths(), cache=shards, out=out, recipe=recipe, protocol=str(world / "protocol.toml"), device="cpu"
    )


class _Entries(Hooks):
    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        self.told.append(
            {name: value for name, value in entry.items() if name not in ("images_per_s", "data_wait", "memory_gb")}
        )


def test_fixed_order_trains_the_same_weights_as_zarr(
    shards: Path, protocol: Protocol, zarr_set: Callable[[Recipe], TrainingSet], micro_recipe: MakeRecipe
) -> None:
    recipe, told, weights = micro_recipe(), [], []
    for data in (zarr_set(recipe), TarTrainingSet(str(shards), protocol, recipe)):
        torch.manual_seed(7)
        model, texts = FasterRCNN(recipe, data.dim), torch.from_numpy(data.class_embeddings(protocol.names))
        batches, hooks = TrainingBatches(data, Dealing(InOrder(len(data)), 8), 0, device=CPU), _Entries()
        loop_of(model, batches, texts[: len(protocol.base)], recipe, CPU).run(hooks)
        told.append(hooks.told)
        weights.append(model.state_dict())
    assert told[0] == told[1]
    assert told[0][-1]["step"] == 2
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_trains_from_shards_alone_by_command(
    shards: Path,
    world: Path,
    cache: Path,
    micro_settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hdovd.cli.main import main

    monkeypatch.setattr(
        sys,
        "argv",
        [
            "hdovd",
            "train",
            "--cache",
            f"{shards}/{{000000..000004}}.tar",
            "--out",
            str(tmp_path / "run"),
            "--device",
            "cpu",
            "--protocol",
            str(world / "protocol.toml"),
            *micro_settings,
            "--debug",
        ],
    )
    main()
    assert "23 images, boxes of 16 base classes" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    reader = FeatureCache(cache)
    assert record["cache"]["levels"] == reader.identity()["levels"]
    assert record["skipped"] == reader.set.skipped
    run = RunFolder.open(tmp_path / "run")
    np.testing.assert_array_equal(run.class_embeddings().numpy(), reader.class_embeddings(run.protocol().names))


def test_same_seed_gives_the_same_bits(shards: Path, world: Path, micro_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = [train(_job(shards, tmp_path / name, micro_recipe("train.epochs=2"), world)) for name in ("a", "b")]
    assert (runs[0].path / "model.safetensors").read_bytes() == (runs[1].path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_picture_stops_naming_image_and_shards(
    shards: Path, world: Path, micro_recipe: MakeRecipe, tmp_path: Path, kept: list[int], workers: int
) -> None:
    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    data = bytearray((copied / "000001.tar").read_bytes())
    data[512:3000] = b"\0" * 2488  # of the first picture in it
    (copied / "000001.tar").write_bytes(data)
    with pytest.raises(HdovdError, match=rf"000001\.tar: sample {kept[5]:012d} is damaged") as error:
        train(_job(copied, tmp_path / "run", micro_recipe(f"train.workers={workers}", "train.batch_size=1"), world))
    assert "Traceback" not in str(error.value)


# --- refusals ---


def _refused(shards: Path, world: Path, recipe: Recipe, said: str, **changes: Any) -> None:
    with pytest.raises(HdovdError, match=said):
        train(replace(_job(shards, shards / "run", recipe, world), **changes))
    assert not (shards / "run").exists()


def test_other_protocols_are_refused_naming_the_classes(
    shards: Path, world: Path, micro_recipe: MakeRecipe, tmp_path: Path, protocol: Protocol
) -> None:
    text = (world / "protocol.toml").read_text()
    (tmp_path / "fewer.toml").write_text(text.replace(f'"{protocol.base[0]}", ', ""))
    _refused(
        shards, world, micro_recipe(), f"base differs: .*{protocol.base[0]}", protocol=str(tmp_path / "fewer.toml")
    )
    (tmp_path / "side.toml").write_text(text + "\nmin_image_side_px = 40\n")
    _refused(
        shards,
        world,
        micro_recipe(*PRESETS["base-only"]),
        "min_image_side_px differs",
        protocol=str(tmp_path / "side.toml"),
    )
    (tmp_path / "novel.toml").write_text(text.replace(f'"{protocol.novel[0]}"', '"unicorn"'))
    _refused(
        shards,
        world,
        micro_recipe(*PRESETS["base-only"]),
        "no text embedding of.*unicorn",
        protocol=str(tmp_path / "novel.toml"),
    )


def test_class_level_needs_nouns(
    world: Path, tmp_path: Path, extraction: Callable[..., ExtractConfig], micro_recipe: MakeRecipe, protocol: Protocol
) -> None:
    extract_clip(extraction(tmp_path / "cache", vocabulary=None, captions=None))
    export_tars(ExportConfig(cache=tmp_path / "cache", out=tmp_path / "shards"))
    _refused(tmp_path / "shards", world, micro_recipe(), r"--vocabulary.*loss\.class\.enabled=false")
    data = TarTrainingSet(str(tmp_path / "shards"), protocol, micro_recipe(OFF["class"]))
    assert max(len(sample[1].pseudo_boxes) for sample in _in_order(data)) > 0


def test_levels_that_do_not_belong_together_are_refused(
    shards: Path, world: Path, micro_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Such a set is not exported; somebody may put one together."""
    from hdovd.cache import Level, key_of

    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    meta = TarMeta.from_bytes((copied / TAR_META).read_bytes(), TAR_META)
    meta.attributes(Level.CLASS)["key_inputs"]["clip"]["weights_sha256"] = "another"
    meta.features.levels[Level.CLASS] = key_of(meta.attributes(Level.CLASS)["key_inputs"])
    (copied / TAR_META).write_bytes(meta.to_bytes())
    _refused(copied, world, micro_recipe(), r"cannot be used together:\n.*clip\.weights_sha256")
    _refused(copied, world, micro_recipe(), "not other", features="other")


def test_truncated_shard_is_refused_before_a_run_is_begun(
    shards: Path, world: Path, micro_recipe: MakeRecipe, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(shards, tmp_path / "shards"))
    (copied / "000003.tar").write_bytes((copied / "000003.tar").read_bytes()[:-10240])
    _refused(copied, world, micro_recipe(), r"000003\.tar")
