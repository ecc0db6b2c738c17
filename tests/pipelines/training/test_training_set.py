"""The training set: cached rows joined to boxes by annotation id, and caches that do not fit refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image

from hdovd.cache import DEFAULT_SET, Catalog, FeatureSet, Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import load_protocol, load_split
from hdovd.pipelines.dataloading.loader import Dealing, Draw, TrainingBatches, plain_shuffle
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.training.training_set import TrainingSet

MakeRecipe = Callable[..., Recipe]


def _training_set(world: Path, cache: Path, recipe: Recipe, features: str = DEFAULT_SET) -> TrainingSet:
    split = load_split(
        world / "annotations" / "instances_train2017.json",
        world / "train2017",
        load_protocol(str(world / "protocol.toml")),
        base_only=True,
    )
    return TrainingSet(split, FeatureCache(cache, features), recipe)


def _product(cache: Path, level: Level, mode: Any = "r") -> Any:
    """A level of the default set, as plain Zarr shows it."""
    return zarr.open_group(cache / level / FeatureCache(cache).key(level), mode=mode)


def _edit(world: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


# --- rows ---


def test_rows_are_those_of_the_annotations(world: Path, cache: Path, kept: list[int], micro_recipe: MakeRecipe) -> None:
    stored = {int(a): row for row, a in enumerate(_product(cache, Level.BOXES)["annotation_id"][:]) if a >= 0}
    embedding = _product(cache, Level.INSTANCE)["embedding"][:].astype(np.float32)
    images = _product(cache, Level.IMAGE)
    image_row = {int(i): row for row, i in enumerate(images["image_id"][:])}
    annotations = {
        a["id"]: a for a in json.loads((world / "annotations" / "instances_train2017.json").read_text())["annotations"]
    }
    data = _training_set(world, cache, micro_recipe("input.flip=0.0"))
    assert [image.id for image in data.images] == kept
    for index in range(len(data)):
        picture, targets, image_id = data[Draw(0, 0, index)]
        image = data.images[index]
        assert picture.shape == (3, image.height, image.width)
        assert picture.dtype == torch.uint8
        for box, annotation_id, row in zip(
            targets.boxes, image.annotation_ids.tolist(), targets.embeddings, strict=True
        ):
            x, y, w, h = annotations[annotation_id]["bbox"]
            assert annotations[annotation_id]["image_id"] == image_id
            assert box.tolist() == [x, y, x + w, y + h]
            torch.testing.assert_close(row, torch.from_numpy(embedding[stored[annotation_id]]), atol=1e-3, rtol=0)
        for rows, tolerance in (
            (targets.embeddings, 1e-5),
            (targets.pseudo_embeddings, 1e-5),
            (targets.pseudo_texts, 1e-3),
        ):
            torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)), atol=tolerance, rtol=0)
        whole = torch.from_numpy(images["embedding"][image_row[image_id]].astype(np.float32))
        torch.testing.assert_close(targets.image_embedding, whole, atol=1e-3, rtol=0)


def test_pseudo_boxes_come_best_first_with_their_noun(world: Path, cache: Path, micro_recipe: MakeRecipe) -> None:
    reader = FeatureCache(cache)
    nouns = reader.embeddings(Level.NOUN)
    data = _training_set(world, cache, micro_recipe("input.flip=0.0"))
    seen = 0
    for index in range(len(data)):
        _, targets, image_id = data[Draw(0, 0, index)]
        rows = reader.instances(image_id).proposals()
        named = rows.noun >= 0
        assert (np.diff(rows.score) <= 0).all()
        np.testing.assert_array_equal(targets.pseudo_boxes.numpy(), rows.box[named])
        np.testing.assert_allclose(targets.pseudo_texts.numpy(), nouns[rows.noun[named]], atol=1e-3)
        np.testing.assert_allclose(targets.pseudo_embeddings.numpy(), rows.embedding[named], atol=1e-3)
        seen += int(named.sum())
    assert seen > 50


def test_flip_keeps_boxes_pseudo_boxes_rows_and_pixels_together(
    world: Path, cache: Path, micro_recipe: MakeRecipe
) -> None:
    plain = _training_set(world, cache, micro_recipe("input.flip=0.0"))
    mirrored = _training_set(world, cache, micro_recipe("input.flip=1.0"))
    for index in range(len(plain)):
        picture, targets, _ = plain[Draw(0, 0, index)]
        flipped, other, _ = mirrored[Draw(0, 0, index)]
        assert torch.equal(flipped, picture.flip(-1))
        for name in ("labels", "embeddings", "pseudo_embeddings", "pseudo_texts", "image_embedding"):
            assert torch.equal(getattr(other, name), getattr(targets, name)), name
        width = picture.shape[2]
        for one, two in ((targets.boxes, other.boxes), (targets.pseudo_boxes, other.pseudo_boxes)):
            torch.testing.assert_close(two[:, 0] + one[:, 2], torch.full((len(one),), float(width)))
            torch.testing.assert_close(two[:, 2] + one[:, 0], torch.full((len(one),), float(width)))
            assert torch.equal(two[:, 1::2], one[:, 1::2])
        for one, two in zip(
            targets.boxes.int().tolist(), other.boxes.int().tolist(), strict=True
        ):  # whole pixels in this world
            inside = picture[:, one[1] : one[3], one[0] : one[2]]
            assert torch.equal(flipped[:, two[1] : two[3], two[0] : two[2]], inside.flip(-1))


def test_flips_are_as_frequent_as_asked_and_drawn_anew_each_epoch(
    world: Path, cache: Path, micro_recipe: MakeRecipe
) -> None:
    plain, random, again, other = (
        _training_set(world, cache, micro_recipe(f"input.flip={flip}", f"train.seed={seed}"))
        for flip, seed in ((0.0, 0), (0.5, 0), (0.5, 0), (0.5, 1))
    )
    found = [
        [
            [epoch for epoch in range(4) if not torch.equal(data[Draw(epoch, 0, i)][0], plain[Draw(0, 0, i)][0])]
            for i in range(len(plain))
        ]
        for data in (random, again, other)
    ]
    assert 30 < sum(map(len, found[0])) < 62  # of 92
    assert len({tuple(epochs) for epochs in found[0]}) > 1
    assert found[0] == found[1] != found[2]


def test_shuffled_and_flipped_samples_keep_their_rows(world: Path, cache: Path, micro_recipe: MakeRecipe) -> None:
    """Through the loader with its order, its workers and flips: what belongs to a box is still at its box."""
    data = _training_set(world, cache, micro_recipe("input.flip=0.5"))
    plain = {
        data.images[i].id: _training_set(world, cache, micro_recipe("input.flip=0.0"))[Draw(0, 0, i)]
        for i in range(len(data))
    }
    batches = TrainingBatches(data, Dealing(partial(plain_shuffle, len(data), 3), 5), 1, device=torch.device("cpu"))
    batches.seek(2)
    seen, mirrored = [], 0
    for picture, targets, image_id in (sample for batch in batches for sample in batch):
        pixels, expected, _ = plain[image_id]
        seen.append(image_id)
        if not torch.equal(picture, pixels):
            mirrored += 1
            pixels, expected = pixels.flip(-1), expected.flipped(pixels.shape[-1])
        assert torch.equal(picture, pixels)
        assert targets.judged is expected.judged is None
        for name in set(targets.__slots__) - {"judged"}:
            assert torch.equal(getattr(targets, name), getattr(expected, name)), name
    assert seen != sorted(seen)
    assert 0 < mirrored < len(seen) == 20


def test_switches_decide_what_is_read(world: Path, cache: Path, micro_recipe: MakeRecipe) -> None:
    base_only = [f"loss.{level}.enabled=false" for level in ("instance", "class", "image")]
    _, targets, _ = _training_set(world, cache, micro_recipe(*base_only))[Draw(0, 0, 0)]
    assert len(targets.pseudo_boxes) == 0
    assert not targets.embeddings.any()
    assert not targets.image_embedding.any()
    _, targets, _ = _training_set(world, cache, micro_recipe(*base_only[:2]))[Draw(0, 0, 0)]
    assert len(targets.pseudo_boxes) == 0
    assert targets.image_embedding.any()
    _, targets, _ = _training_set(world, cache, micro_recipe(*base_only[1:]))[Draw(0, 0, 0)]
    assert len(targets.pseudo_boxes) > 0
    assert targets.embeddings.any()


# --- refusals ---


def _move_box(tree: dict[str, Any]) -> None:
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    next(a for a in tree["annotations"] if a["category_id"] in base)["bbox"][2] -= 1


def _renumber(tree: dict[str, Any]) -> None:
    for a in tree["annotations"]:
        a["id"] += 1000


def _drop_image(tree: dict[str, Any]) -> None:
    tree["images"] = [i for i in tree["images"] if i["id"] != 3]
    tree["annotations"] = [a for a in tree["annotations"] if a["image_id"] != 3]


def _rename(tree: dict[str, Any]) -> None:
    tree["images"][2]["file_name"] = tree["images"][3]["file_name"]


def _resize(tree: dict[str, Any]) -> None:
    tree["images"][2]["width"] += 1


@pytest.mark.parametrize(
    ("change", "named", "other"),
    [
        (_move_box, "base_boxes.hash", "images."),
        (_renumber, "base_boxes.hash", "images."),
        (_drop_image, "images.count", "nothing"),
        (_rename, "1 picture is not what .* was made from", "base_boxes."),
        (_resize, "images.hash", "base_boxes."),
    ],
    ids=["moved box", "other annotation ids", "image left out", "other file", "other size"],
)
def test_cache_of_other_data_is_refused_naming_the_input(
    copied_world: Path,
    cache: Path,
    micro_recipe: MakeRecipe,
    change: Callable[[dict[str, Any]], None],
    named: str,
    other: str,
) -> None:
    _edit(copied_world, change)
    with pytest.raises(HdovdError, match=named) as error:
        _training_set(copied_world, cache, micro_recipe())
    assert other not in str(error.value).replace(str(cache), "")
    assert "hdovd extract-clip" in str(error.value)


def test_image_level_alone_checks_the_image_list_alone(
    copied_world: Path, cache: Path, micro_recipe: MakeRecipe
) -> None:
    recipe = micro_recipe("loss.instance.enabled=false", "loss.class.enabled=false")
    _edit(copied_world, _move_box)
    _training_set(copied_world, cache, recipe)
    _edit(copied_world, _drop_image)
    with pytest.raises(HdovdError, match=r"image level.*\n.*images"):
        _training_set(copied_world, cache, recipe)


def test_validation_split_is_refused(world: Path, cache: Path, micro_recipe: MakeRecipe) -> None:
    split = load_split(
        world / "annotations" / "instances_val2017.json",
        world / "val2017",
        load_protocol(str(world / "protocol.toml")),
        base_only=True,
    )
    with pytest.raises(HdovdError, match="does not fit"):
        TrainingSet(split, FeatureCache(cache), micro_recipe())


def _mix(cache: Path, one: str, other: str, *levels: Level) -> None:
    """Name a set "mixed": that of `one`, but for `levels`, which are those of `other`."""
    catalog = Catalog(cache)
    sets = catalog.sets()
    catalog.write_set("mixed", FeatureSet(sets[one].levels | {level: sets[other].levels[level] for level in levels}))


def test_class_level_of_another_clip_is_refused(
    world: Path,
    copied_cache: Path,
    tmp_path: Path,
    save_clip: Callable[..., str],
    extraction: Callable[..., ExtractConfig],
    micro_recipe: MakeRecipe,
) -> None:
    extract_clip(extraction(copied_cache, clip=save_clip(tmp_path / "clip", seed=1), features="other"))
    _training_set(world, copied_cache, micro_recipe(), "other")  # on its own it is as good as the first
    _mix(copied_cache, "default", "other", Level.CLASS)
    with pytest.raises(
        HdovdError, match=r"cannot be used together:\n  instance and class: clip\.weights_sha256"
    ) as error:
        _training_set(world, copied_cache, micro_recipe(), "mixed")
    assert "clip.activation" not in str(error.value)


def test_embeddings_of_other_proposals_are_refused(
    world: Path,
    copied_cache: Path,
    tmp_path: Path,
    proposals: Path,
    extraction: Callable[..., ExtractConfig],
    micro_recipe: MakeRecipe,
) -> None:
    """The base boxes are the same, so the data fit both; but the rows are of other proposals than the boxes say."""
    entries = json.loads(proposals.read_text())
    entries[0]["bbox"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(entries))
    extract_clip(extraction(copied_cache, proposals=tmp_path / "other.json", features="other"))
    _mix(copied_cache, "default", "other", Level.BOXES)
    with pytest.raises(HdovdError, match=r"instance and boxes: boxes\.hash"):
        _training_set(world, copied_cache, micro_recipe(), "mixed")


def test_pseudo_labels_of_other_nouns_are_refused(
    world: Path, copied_cache: Path, extraction: Callable[..., ExtractConfig], micro_recipe: MakeRecipe
) -> None:
    extract_clip(extraction(copied_cache, templates=("{} in the snow",), features="other"))
    _mix(copied_cache, "default", "other", Level.NOUN)
    with pytest.raises(HdovdError, match="pseudo_label and noun: it was made from"):
        _training_set(world, copied_cache, micro_recipe(), "mixed")
    _mix(copied_cache, "default", "other", Level.NOUN, Level.PSEUDO_LABEL)
    _training_set(world, copied_cache, micro_recipe(), "mixed")


def test_class_level_needs_nouns(
    world: Path, tmp_path: Path, extraction: Callable[..., ExtractConfig], micro_recipe: MakeRecipe
) -> None:
    extract_clip(extraction(tmp_path / "cache", vocabulary=None, captions=None))
    with pytest.raises(HdovdError, match=r"--vocabulary.*loss\.class\.enabled=false"):
        _training_set(world, tmp_path / "cache", micro_recipe())
    data = _training_set(world, tmp_path / "cache", micro_recipe("loss.class.enabled=false"))
    assert len(data[Draw(0, 0, 0)][1].pseudo_boxes) > 0


def test_tampered_annotation_ids_are_refused(world: Path, copied_cache: Path, micro_recipe: MakeRecipe) -> None:
    ids = _product(copied_cache, Level.BOXES, "r+")["annotation_id"]
    values = ids[:]
    first, second = np.flatnonzero(values >= 0)[:2]
    values[[first, second]] = values[[second, first]]
    ids[:] = values
    with pytest.raises(HdovdError, match=r"annotation_id/c/0 is damaged"):
        _training_set(world, copied_cache, micro_recipe())
    record = next((copied_cache / "boxes").glob("*/parts/tables.json"))
    tree = json.loads(record.read_text())
    tree["objects"]["annotation_id/c/0"]["sha256"] = sha256(
        (record.parent.parent / "annotation_id/c/0").read_bytes()
    ).hexdigest()
    record.write_text(json.dumps(tree))  # its checksum was changed with it
    data = _training_set(world, copied_cache, micro_recipe())
    with pytest.raises(HdovdError, match="image 1 are of annotations"):
        data[Draw(0, 0, 0)]


@pytest.mark.parametrize("damage", ["missing", "truncated", "other size"])
def test_picture_broken_after_extraction_is_named(
    copied_world: Path, cache: Path, micro_recipe: MakeRecipe, damage: str
) -> None:
    data, file = _training_set(copied_world, cache, micro_recipe()), copied_world / "train2017" / "000000000001.jpg"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:1500])
    else:
        Image.new("RGB", (10, 10)).save(file)
    with pytest.raises(HdovdError, match=r"image 1: .*000000000001.jpg"):
        data[Draw(0, 0, 0)]
