"""Extraction: what stands in the cache is what open_clip itself gives, whoever extracts it and in whatever portions."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import zarr
from PIL import Image
from torch import Tensor

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.extraction.config import ExtractConfig, LabelRule
from hdovd.pipelines.extraction.extract_clip import extract_clip

Config = Callable[..., ExtractConfig]
TEMPLATES = ("a photo of a {}", "{} in the snow", "a drawing of one {}")


@pytest.fixture(scope="module")
def reference(clip: str) -> tuple[Any, Any, Any]:
    """open_clip's own model, evaluation transform and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    return model.eval(), preprocess, open_clip.get_tokenizer(clip)


def _embed(reference: tuple[Any, Any, Any], pictures: list[Image.Image]) -> Tensor:
    model, preprocess, _ = reference
    with torch.no_grad():
        return torch.cat(
            [torch.nn.functional.normalize(model.encode_image(preprocess(p)[None]), dim=1) for p in pictures]
        )


def _cosine(a: Tensor, b: np.ndarray) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), torch.from_numpy(b).double(), dim=1)


def _tree(world: Path, name: str = "instances") -> dict[str, Any]:
    return dict(json.loads((world / "annotations" / f"{name}_train2017.json").read_text()))


def _picture(world: Path, entry: dict[str, Any]) -> Image.Image:
    return Image.open(world / "train2017" / entry["file_name"]).convert("RGB")


# --- embeddings ---


def test_image_embeddings_are_open_clips(world: Path, cache: Path, kept: list[int], reference: Any) -> None:
    reader = FeatureCache(cache)
    entries = [e for e in _tree(world)["images"] if e["id"] in kept]
    wanted = _embed(reference, [_picture(world, e) for e in entries])
    found = np.stack([reader.image_embedding(e["id"]) for e in entries])
    assert _cosine(wanted, found).min() >= 0.9999
    assert _cosine(wanted, np.roll(found, 1, axis=0)).max() < 0.999  # the pictures can be told apart


def test_base_box_embeddings_are_open_clips(world: Path, cache: Path, kept: list[int], reference: Any) -> None:
    reader, tree = FeatureCache(cache), _tree(world)
    name = {c["id"]: c["name"] for c in tree["categories"]}
    seen = 0
    for entry in (e for e in tree["images"] if e["id"] in kept):
        rows = reader.instances(entry["id"]).base_boxes()
        annotations = {
            a["id"]: a for a in tree["annotations"] if a["image_id"] == entry["id"] and name[a["category_id"]] in BASE
        }
        assert set(rows.annotation_id.tolist()) == set(annotations)
        crops = []
        for key, box in zip(rows.annotation_id.tolist(), rows.box.tolist(), strict=True):
            x, y, w, h = annotations[key]["bbox"]
            assert box == [x, y, x + w, y + h]  # the world's boxes are whole pixels inside the picture
            crops.append(_picture(world, entry).crop((int(x), int(y), int(x + w), int(y + h))))
        assert _cosine(_embed(reference, crops), rows.embedding).min() >= 0.9999
        seen += len(rows.box)
    assert seen > 30


def test_proposal_embeddings_are_of_the_box_widened_to_whole_pixels(
    world: Path, cache: Path, proposals: Path, kept: list[int], reference: Any
) -> None:
    reader = FeatureCache(cache)
    entries = {e["id"]: e for e in _tree(world)["images"]}
    listed: dict[int, list[Any]] = {}
    for proposal in (p for p in json.loads(proposals.read_text()) if p["image_id"] in kept):
        listed.setdefault(proposal["image_id"], []).append(proposal)
    found, wanted, shrunk = [], [], []
    for image_id, image_proposals in listed.items():
        rows = reader.instances(image_id).proposals()
        assert len(rows.box) == len(image_proposals)
        picture = _picture(world, entries[image_id])
        for row, proposal in enumerate(sorted(image_proposals, key=lambda p: -p["score"])):
            x, y, w, h = proposal["bbox"]
            box = max(x, 0), max(y, 0), min(x + w, picture.width), min(y + h, picture.height)
            np.testing.assert_allclose(rows.box[row], box, atol=1e-4)
            assert rows.score[row] == np.float32(proposal["score"])
            outwards = (math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3]))
            found.append(rows.embedding[row])
            wanted.append(picture.crop(outwards))
            shrunk.append(picture.crop((math.ceil(box[0]), math.ceil(box[1]), math.floor(box[2]), math.floor(box[3]))))
    assert len(found) > 100
    assert _cosine(_embed(reference, wanted), np.stack(found)).min() >= 0.9999
    assert _cosine(_embed(reference, shrunk), np.stack(found)).median() < 0.9999  # a pixel of difference would show


def test_class_and_noun_embeddings_are_means_over_templates(
    cache: Path, tmp_path: Path, extraction: Config, reference: Any
) -> None:
    extract_clip(extraction(tmp_path / "cache", templates=TEMPLATES))
    reader = FeatureCache(tmp_path / "cache")
    model, _, tokenizer = reference
    assert reader.names(Level.CLASS) == [*BASE, *NOVEL]
    for level in (Level.CLASS, Level.NOUN):
        with torch.no_grad():
            texts = [tokenizer([t.format(name) for name in reader.names(level)]) for t in TEMPLATES]
            each = torch.stack([torch.nn.functional.normalize(model.encode_text(rows), dim=1) for rows in texts])
        wanted = torch.nn.functional.normalize(each.mean(dim=0), dim=1)
        assert _cosine(wanted, reader.embeddings(level)).min() >= 0.9999
        np.testing.assert_allclose(np.linalg.norm(reader.embeddings(level), axis=1), 1, atol=1e-3)
    one = FeatureCache(cache).embeddings(Level.CLASS)  # of the first template alone
    assert _cosine(torch.from_numpy(one), reader.embeddings(Level.CLASS)).max() < 0.999


def _stored(cache: Path, level: Level, name: str = "embedding") -> np.ndarray:
    """An array of a level, whole."""
    product: Any = zarr.open_group(cache / level / FeatureCache(cache).key(level), mode="r")
    return np.asarray(product[name][:])


@pytest.mark.parametrize("part_rows", [64, 10], ids=lambda n: f"{n} rows a part")
def test_bytes_do_not_depend_on_workers(
    tmp_path: Path, extraction: Config, contents: Callable[..., Any], part_rows: int
) -> None:
    """All of the cache: embeddings, tables, metadata, records and the set."""
    for name, workers in (("one", 0), ("other", 1)):
        extract_clip(extraction(tmp_path / name, workers=workers, part_rows=part_rows, batch_size=16))
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_embeddings_do_not_depend_on_the_size_of_parts(cache: Path, tmp_path: Path, extraction: Config) -> None:
    """Exactly: parts of 10 rows cut images in two, and other crops share a batch. The keys say that the products are
    the same.
    """
    extract_clip(extraction(tmp_path / "cache", part_rows=10))
    assert FeatureCache(cache).set.levels == FeatureCache(tmp_path / "cache").set.levels
    starts = _stored(cache, Level.BOXES, "offset")
    assert sum(one // 10 < (stop - 1) // 10 for one, stop in pairwise(starts)) > 5
    for level in (Level.IMAGE, Level.INSTANCE):
        np.testing.assert_array_equal(_stored(cache, level), _stored(tmp_path / "cache", level))
    for level, name in (
        (Level.CLASS, "embedding"),
        (Level.NOUN, "embedding"),
        (Level.PSEUDO_LABEL, "noun"),
        (Level.PSEUDO_LABEL, "noun_cosine"),
    ):  # texts go through the model in the batches that come up
        np.testing.assert_allclose(_stored(cache, level, name), _stored(tmp_path / "cache", level, name), atol=1e-3)


def test_embeddings_hardly_depend_on_the_batch_size(cache: Path, tmp_path: Path, extraction: Config) -> None:
    """A matrix product of another shape may sum in another order, so this is a step of float16 at most, and no
    identity.
    """
    extract_clip(extraction(tmp_path / "cache", batch_size=1))
    assert FeatureCache(cache).set.levels == FeatureCache(tmp_path / "cache").set.levels
    for level in (Level.IMAGE, Level.INSTANCE):
        np.testing.assert_allclose(_stored(cache, level), _stored(tmp_path / "cache", level), atol=5e-4, rtol=0)


def test_bf16_is_close_to_fp32_and_another_identity(
    cache: Path, kept: list[int], tmp_path: Path, extraction: Config
) -> None:
    extract_clip(extraction(tmp_path / "cache", precision=Precision.BF16))
    one, other = FeatureCache(cache), FeatureCache(tmp_path / "cache")
    fine = np.concatenate([one.instances(i).embedding for i in kept] + [one.embeddings(Level.CLASS)])
    coarse = np.concatenate([other.instances(i).embedding for i in kept] + [other.embeddings(Level.CLASS)])
    assert _cosine(torch.from_numpy(fine), coarse).min() >= 0.999
    assert (fine != coarse).any()
    for level in Level:
        assert (one.key(level) != other.key(level)) == (level is not Level.BOXES)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path, extraction: Config) -> None:
    with pytest.raises(HdovdError, match="fp16 needs a GPU"):
        extract_clip(extraction(tmp_path / "cache", precision=Precision.FP16))


# --- nouns ---


def _check_nouns(reader: FeatureCache, kept: list[int], offered: Callable[[int], set[str]]) -> int:
    names, nouns = reader.names(Level.NOUN), reader.embeddings(Level.NOUN)
    named = 0
    for image_id in kept:
        rows = reader.instances(image_id)
        assert (rows.base_boxes().noun == -1).all()
        rows = rows.proposals()
        listed = sorted(names.index(word) for word in offered(image_id))
        if not listed:
            assert (rows.noun == -1).all()
            assert (rows.noun_cosine == 0).all()
            continue
        cosines = rows.embedding.astype(np.float32) @ nouns[listed].T
        best = cosines.max(axis=1, initial=-1)
        np.testing.assert_allclose(rows.noun_cosine, best, atol=2e-3)
        np.testing.assert_allclose(
            [c[listed.index(n)] for c, n in zip(cosines, rows.noun, strict=True)], best, atol=2e-3
        )
        named += len(rows.noun)
    return named


def test_nouns_come_from_the_images_own_captions(
    world: Path, copied_cache: Path, kept: list[int], extraction: Config
) -> None:
    extract_clip(extraction(copied_cache, labels=LabelRule(), features="paper"))
    vocabulary = set((world / "vocabulary.txt").read_text().split())
    captions = {c["image_id"]: c["caption"] for c in _tree(world, "captions")["annotations"]}
    assert (
        _check_nouns(
            FeatureCache(copied_cache, "paper"),
            kept,
            lambda i: vocabulary & set(re.findall("[a-z]+", captions[i].lower())),
        )
        > 100
    )


def test_without_captions_every_image_offers_all_nouns(
    world: Path, kept: list[int], tmp_path: Path, extraction: Config
) -> None:
    extract_clip(extraction(tmp_path / "cache", captions=None, labels=LabelRule()))
    vocabulary = set((world / "vocabulary.txt").read_text().split())
    reader = FeatureCache(tmp_path / "cache")
    assert _check_nouns(reader, kept, lambda _: vocabulary) > 100
    used = {int(n) for i in kept for n in reader.instances(i).proposals().noun}
    assert len(used) > 3  # the argmax is not one noun for all


def test_image_whose_captions_name_nothing_has_no_nouns(copied_world: Path, tmp_path: Path, extraction: Config) -> None:
    file = copied_world / "annotations" / "captions_train2017.json"
    tree = json.loads(file.read_text())
    for caption in tree["annotations"]:
        if caption["image_id"] == 3:
            caption["caption"] = "Something nobody has a word for."
    tree["annotations"] = [c for c in tree["annotations"] if c["image_id"] != 4]
    file.write_text(json.dumps(tree))
    extract_clip(extraction(tmp_path / "cache", data=copied_world, labels=LabelRule()))
    reader = FeatureCache(tmp_path / "cache")
    unnamed = [reader.instances(i).proposals().noun for i in (3, 4)]
    assert all(len(n) > 0 and (n == -1).all() for n in unnamed)
    assert (reader.instances(5).proposals().noun >= 0).any()


def test_without_vocabulary_there_is_no_noun_level(tmp_path: Path, extraction: Config) -> None:
    extract_clip(extraction(tmp_path / "cache", vocabulary=None, captions=None))
    reader = FeatureCache(tmp_path / "cache")
    assert reader.levels() == [Level.BOXES, Level.INSTANCE, Level.IMAGE, Level.CLASS]
    assert (reader.instances(1).noun == -1).all()


def test_novel_names_in_the_vocabulary_are_reported(world: Path, tmp_path: Path, extraction: Config) -> None:
    lines: list[str] = []
    with lines_to(lines.append):
        extract_clip(extraction(tmp_path / "cache"))
    (note,) = [line for line in lines if "novel names" in line]
    assert f"{len(NOVEL)} of the {len(NOVEL)}" in note
    assert NOVEL[0] in note
