"""The dense instance teacher through the commands: a cache of boxes of whole pictures is as safe as one of crops."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from typer.testing import CliRunner

from hdovd.cache import Catalog, Level, Product
from hdovd.cache.reader import FeatureCache
from hdovd.cache.rows import Rows
from hdovd.cli.main import app
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.listing import find_garbage
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.embedding.crop_recipe import DenseRecipe
from hdovd.pipelines.embedding.embedders import Batch, DenseBoxes, Pictures
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.teachers.dense import DenseClip, scale_boxes
from hdovd.pipelines.teachers.openclip import ClipTeacher, load_clip

Config = Callable[..., ExtractConfig]
SIDE = 64


@pytest.fixture
def dense(extraction: Config) -> Config:
    return lambda cache, **changes: extraction(
        cache, **({"recipe": DenseRecipe(SIDE), "part_rows": 100, "batch_size": 12} | changes)
    )


@pytest.fixture(scope="module")
def unbroken(extraction: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the dense teacher, in parts of 100 rows and batches of 3 pictures. Not to be changed."""
    folder = tmp_path_factory.mktemp("dense") / "cache"
    extract_clip(extraction(folder, recipe=DenseRecipe(SIDE), part_rows=100, batch_size=12))
    return folder


def _instances(cache: Path) -> Product:
    (product,) = Catalog(cache).products(Level.INSTANCE)
    return product


def _rows(cache: Path) -> np.ndarray:
    product = _instances(cache)
    return Rows(product, "embedding", parts=set(range(product.parts))).read(0, product.rows)


def test_rows_are_those_of_each_picture_alone(unbroken: Path, world: Path, clip: str, kept: list[int]) -> None:
    """From open_clip's own way to squash a picture and nothing else of ours."""
    teacher, cache = load_clip(clip, None, device="cpu"), FeatureCache(unbroken)
    boxes = DenseClip(teacher.model.visual, SIDE)
    names = {
        e["id"]: e["file_name"]
        for e in json.loads((world / "annotations" / "instances_train2017.json").read_text())["images"]
    }
    mean, std = (torch.tensor(getattr(teacher.transform, name)).view(3, 1, 1) for name in ("mean", "std"))
    for image_id in kept:
        picture, rows = Image.open(world / "train2017" / names[image_id]).convert("RGB"), cache.instances(image_id)
        squashed = (
            torch.from_numpy(np.array(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
        )
        wanted = boxes.embed_boxes(
            ((squashed - mean) / std)[None],
            [scale_boxes(torch.from_numpy(rows.box), picture.width, picture.height, SIDE)],
        )
        assert F.cosine_similarity(torch.from_numpy(rows.embedding).double(), wanted.double()).min() > 0.9999
        assert len(np.unique(wanted.numpy().round(3), axis=0)) > 1


def test_pictures_of_the_image_level_are_those_of_crops(unbroken: Path, cache: Path, kept: list[int]) -> None:
    """One cache can hold both instance teachers, and shares all else."""
    for level in Level:
        keys = [{product.key for product in Catalog(folder).products(level)} for folder in (unbroken, cache)]
        assert (keys[0] == keys[1]) == (level not in (Level.INSTANCE, Level.PSEUDO_LABEL))
    for image_id in kept:
        np.testing.assert_array_equal(
            FeatureCache(unbroken).image_embedding(image_id), FeatureCache(cache).image_embedding(image_id)
        )


def test_identity_tells_side_and_teacher_apart(dense: Config, unbroken: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with lines_to(lines.append):
        report = extract_clip(dense(unbroken, recipe=DenseRecipe(2 * SIDE), dry_run=True))
    assert {level for level, plan in report.levels.items() if plan != "hit"} == {Level.INSTANCE, Level.PSEUDO_LABEL}
    assert any("dense.side differs: expected 128, the cache has 64" in line for line in lines)
    assert set(extract_clip(dense(unbroken, dry_run=True)).levels.values()) == {"hit"}


def test_bytes_do_not_depend_on_workers_or_on_having_been_killed(dense: Config, unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    extract_clip(dense(folder, workers=2))
    product = _instances(folder)
    assert product.parts == 3
    for part in (1, 2):  # what was not written yet
        (folder / product.record_name(part)).unlink()
    extract_clip(dense(folder))
    np.testing.assert_array_equal(_rows(folder).view(np.uint16), _rows(unbroken).view(np.uint16))


def test_new_proposals_extend_it(dense: Config, proposals: Path, tmp_path: Path, unbroken: Path) -> None:
    folder = tmp_path / "cache"
    extract_clip(dense(folder, proposals=None, vocabulary=None, captions=None))
    report = extract_clip(dense(folder))
    assert report.levels[Level.INSTANCE] == "extend"
    assert 0 < report.new_rows[Level.INSTANCE] < report.rows[Level.INSTANCE]
    product = next(p for p in Catalog(folder).products(Level.INSTANCE) if p.key == _instances(unbroken).key)
    found = Rows(product, "embedding", parts=set(range(product.parts))).read(0, product.rows)
    np.testing.assert_array_equal(found.view(np.uint16), _rows(unbroken).view(np.uint16))


def test_unreadable_picture_has_rows_of_zeros(
    dense: Config, copied_world: Path, kept: list[int], tmp_path: Path, unbroken: Path
) -> None:
    bad = kept[5]
    names = {
        e["id"]: e["file_name"]
        for e in json.loads((copied_world / "annotations" / "instances_train2017.json").read_text())["images"]
    }
    (copied_world / "train2017" / names[bad]).write_bytes(b"no picture")
    report = extract_clip(dense(tmp_path / "cache", data=copied_world))
    assert report.failed.keys() == {bad}
    found, whole = FeatureCache(tmp_path / "cache"), FeatureCache(unbroken)
    for image_id in kept:
        wanted = whole.instances(image_id).embedding
        np.testing.assert_array_equal(found.instances(image_id).embedding, 0 * wanted if image_id == bad else wanted)


def test_verify_samples_and_repairs_it(dense: Config, tmp_path: Path, unbroken: Path) -> None:
    folder, lines = tmp_path / "cache", list[str]()
    extract_clip(dense(folder))
    with lines_to(lines.append):
        assert not check_cache(CheckConfig(cache=folder, sample=40)).findings
    assert any("sample of instance" in line and "40 rows encoded again, cosine min 1.0000" in line for line in lines)
    file = next((folder / _instances(folder).prefix / "embedding" / "c" / "2").iterdir())
    data = bytearray(file.read_bytes())
    data[100] ^= 0x41
    file.write_bytes(data)
    check_cache(CheckConfig(cache=folder, repair=True))
    extract_clip(dense(folder))
    np.testing.assert_array_equal(_rows(folder).view(np.uint16), _rows(unbroken).view(np.uint16))


def test_a_batch_has_the_pixels_of_so_many_crops(clip: str) -> None:
    way = _way(load_clip(clip, None, device="cpu"), counts=[2, 0, 1, 4])
    assert [way.places(size) for size in (1, 4, 8, 64)] == [1, 1, 2, 16]
    assert [rows.tolist() for rows in way.groups(np.arange(7), 8)] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [rows.tolist() for rows in way.groups(np.array([1, 2, 6]), 4)] == [[1], [2], [6]]
    assert way.groups(np.zeros(0, np.int64), 8) == []
    assert _way(load_clip(clip, None, device="cpu"), counts=[1], side=None).input_size == (96, 96)


def test_a_batch_that_does_not_fit_is_done_in_halves(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_clip(clip, None, device="cpu")
    way, whole = _way(teacher, counts=[2, 3, 1]), DenseClip.embed_boxes
    rng, pixels = np.random.default_rng(0), torch.randint(256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    boxes = [np.sort(rng.uniform(0, SIDE, (n, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32) for n in (2, 3, 1)]
    batch = Batch(pixels, {}, boxes)
    wanted = way.encode(batch)

    def small(self: DenseClip, some: torch.Tensor, *others: Any) -> torch.Tensor:
        if len(some) > 1:
            raise torch.OutOfMemoryError("no room")
        return whole(self, some, *others)

    monkeypatch.setattr(DenseClip, "embed_boxes", small)
    np.testing.assert_allclose(way.encode(batch), wanted, atol=1e-6)
    assert teacher.halves == [2, 1]


@pytest.mark.parametrize("level", [Level.IMAGE, Level.CLASS])
def test_gc_takes_nothing_from_an_extraction_that_may_be_running(unbroken: Path, tmp_path: Path, level: Level) -> None:
    """Products of which one is not finished: those that are finished can be of the same extraction."""
    folder = Path(shutil.copytree(unbroken, tmp_path / "cache"))
    product = _instances(folder)
    (folder / product.record_name(0)).unlink()
    for other in Level:
        if other not in (level, Level.INSTANCE):
            shutil.rmtree(folder / other)
    shutil.rmtree(folder / "sets")
    garbage = find_garbage(Catalog(folder))
    assert {entry.level for entry in garbage.unfinished} == {Level.INSTANCE, level}
    assert not garbage.unused


def test_another_model_has_no_dense_features(dense: Config, counting: Any, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="--instance-teacher dense needs a CLIP of open_clip's"):
        extract_clip(dense(tmp_path / "cache"), counting)
    assert not (tmp_path / "cache").exists()


def test_side_must_fit_the_patches(dense: Config, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"side 65: .*multiple"):
        extract_clip(dense(tmp_path / "cache", recipe=DenseRecipe(65)))


def test_a_set_remembers_it(dense: Config, tmp_path: Path) -> None:
    config = dense(tmp_path)
    assert ExtractConfig.from_dict(json.loads(json.dumps(config.to_dict())), tmp_path).recipe == DenseRecipe(SIDE)
    assert ExtractConfig.from_dict(dense(tmp_path, recipe=DenseRecipe()).to_dict(), tmp_path).recipe == DenseRecipe(
        None
    )


# --- the command ---


def test_the_command(world: Path, clip: str, proposals: Path, tmp_path: Path, unbroken: Path) -> None:
    words = [
        "extract-clip",
        "--data",
        str(world),
        "--protocol",
        str(world / "protocol.toml"),
        "--clip",
        clip,
        "--proposals",
        str(proposals),
        "--cache",
        str(tmp_path / "cache"),
        "--device",
        "cpu",
    ]
    words += ["--instance-teacher", "dense", "--dense-side", str(SIDE)]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert _instances(tmp_path / "cache").key == _instances(unbroken).key
    np.testing.assert_allclose(_rows(tmp_path / "cache"), _rows(unbroken), atol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dense-side", "64"], "--dense-side needs --instance-teacher dense"),
        (["--instance-teacher", "dense", "--crop", "square"], "--crop and --crop-scales are of crops"),
        (["--instance-teacher", "dense", "--crop-scales", "1,1.5"], "--crop and --crop-scales are of crops"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=message):
        CliRunner().invoke(
            app, ["extract-clip", "--cache", str(tmp_path / "cache"), "--clip", "x", *words], catch_exceptions=False
        )


def _way(teacher: ClipTeacher, counts: list[int], side: int | None = SIDE) -> DenseBoxes:
    return DenseBoxes(teacher, Pictures([], Path, np.cumsum([0, *counts]), np.zeros((sum(counts), 4))), side)
