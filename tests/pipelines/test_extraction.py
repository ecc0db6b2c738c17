"""Extraction: what stands in the cache is what open_clip itself gives, and a second run does only what changed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.errors import HdovdError
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.extract_clip import extract_clip
from hdovd.pipelines.extract_config import ExtractConfig, Precision

Config = Callable[..., ExtractConfig]
TEMPLATES = ("a photo of a {}", "{} in the snow", "a drawing of one {}")


def _silent(_: str) -> None: ...


@pytest.fixture(scope="module")
def reference(clip: str) -> tuple[Any, Any, Any]:
    """open_clip's own model, evaluation transform and tokenizer."""
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    return model.eval(), preprocess, open_clip.get_tokenizer(clip)


def _embed(reference: tuple[Any, Any, Any], pictures: list[Image.Image]) -> Tensor:
    model, preprocess, _ = reference
    with torch.no_grad():
        return torch.cat([torch.nn.functional.normalize(model.encode_image(preprocess(p)[None]), dim=1) for p in pictures])


def _cosine(a: Tensor, b: np.ndarray) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double(), torch.from_numpy(b).double(), dim=1)


def _tree(world: Path, name: str = "instances") -> dict[str, Any]:
    return dict(json.loads((world / "annotations" / f"{name}_train2017.json").read_text()))


def _picture(world: Path, entry: dict[str, Any]) -> Image.Image:
    return Image.open(world / "train2017" / entry["file_name"]).convert("RGB")


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


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
        annotations = {a["id"]: a for a in tree["annotations"] if a["image_id"] == entry["id"] and name[a["category_id"]] in BASE}
        assert set(rows.annotation_id.tolist()) == set(annotations)
        crops = []
        for key, box in zip(rows.annotation_id.tolist(), rows.box.tolist(), strict=True):
            x, y, w, h = annotations[key]["bbox"]
            assert box == [x, y, x + w, y + h]  # the world's boxes are whole pixels inside the picture
            crops.append(_picture(world, entry).crop((int(x), int(y), int(x + w), int(y + h))))
        assert _cosine(_embed(reference, crops), rows.embedding).min() >= 0.9999
        seen += len(rows.box)
    assert seen > 30


def test_proposal_embeddings_are_of_the_box_widened_to_whole_pixels(world: Path, cache: Path, proposals: Path, kept: list[int],
                                                                     reference: Any) -> None:
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


def test_class_and_noun_embeddings_are_means_over_templates(cache: Path, tmp_path: Path, extraction: Config, reference: Any) -> None:
    extract_clip(extraction(tmp_path / "cache", templates=TEMPLATES), _silent)
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


def test_embeddings_do_not_depend_on_batch_size_or_workers(cache: Path, kept: list[int], tmp_path: Path, extraction: Config) -> None:
    extract_clip(extraction(tmp_path / "cache", batch_size=7, workers=1), _silent)
    one, other = FeatureCache(cache), FeatureCache(tmp_path / "cache")
    for image_id in kept:
        np.testing.assert_array_equal(one.instances(image_id).box, other.instances(image_id).box)
        np.testing.assert_allclose(one.instances(image_id).embedding, other.instances(image_id).embedding, atol=1e-3)
        np.testing.assert_allclose(one.image_embedding(image_id), other.image_embedding(image_id), atol=1e-3)
    assert one.key(Level.INSTANCE) == other.key(Level.INSTANCE)


def test_bf16_is_close_to_fp32_and_another_identity(cache: Path, kept: list[int], tmp_path: Path, extraction: Config) -> None:
    extract_clip(extraction(tmp_path / "cache", precision=Precision.BF16), _silent)
    one, other = FeatureCache(cache), FeatureCache(tmp_path / "cache")
    fine = np.concatenate([one.instances(i).embedding for i in kept] + [one.embeddings(Level.CLASS)])
    coarse = np.concatenate([other.instances(i).embedding for i in kept] + [other.embeddings(Level.CLASS)])
    assert _cosine(torch.from_numpy(fine), coarse).min() >= 0.999
    assert (fine != coarse).any()
    for level in Level:
        assert one.key(level) != other.key(level)


def test_fp16_on_a_cpu_is_refused(tmp_path: Path, extraction: Config) -> None:
    with pytest.raises(HdovdError, match="fp16 needs a GPU"):
        extract_clip(extraction(tmp_path / "cache", precision=Precision.FP16), _silent)


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
        cosines = rows.embedding @ nouns[listed].T
        best = cosines.max(axis=1, initial=-1)
        np.testing.assert_allclose(rows.noun_cosine, best, atol=2e-3)
        np.testing.assert_allclose([c[listed.index(n)] for c, n in zip(cosines, rows.noun, strict=True)], best, atol=2e-3)
        named += len(rows.noun)
    return named


def test_nouns_come_from_the_images_own_captions(world: Path, cache: Path, kept: list[int]) -> None:
    vocabulary = set((world / "vocabulary.txt").read_text().split())
    captions = {c["image_id"]: c["caption"] for c in _tree(world, "captions")["annotations"]}
    assert _check_nouns(FeatureCache(cache), kept, lambda i: vocabulary & set(re.findall("[a-z]+", captions[i].lower()))) > 100


def test_without_captions_every_image_offers_all_nouns(world: Path, kept: list[int], tmp_path: Path, extraction: Config) -> None:
    extract_clip(extraction(tmp_path / "cache", captions=None), _silent)
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
    report = extract_clip(extraction(tmp_path / "cache", data=copied_world), _silent)
    reader = FeatureCache(tmp_path / "cache")
    unnamed = [reader.instances(i).proposals().noun for i in (3, 4)]
    assert all(len(n) > 0 and (n == -1).all() for n in unnamed)
    assert report.rows["proposals without a noun"] >= sum(map(len, unnamed))


def test_without_vocabulary_there_is_no_noun_level(tmp_path: Path, extraction: Config) -> None:
    extract_clip(extraction(tmp_path / "cache", vocabulary=None, captions=None), _silent)
    reader = FeatureCache(tmp_path / "cache")
    assert reader.levels() == [Level.INSTANCE, Level.IMAGE, Level.CLASS]
    assert (reader.instances(1).noun == -1).all()


def test_novel_names_in_the_vocabulary_are_reported(world: Path, tmp_path: Path, extraction: Config) -> None:
    lines: list[str] = []
    extract_clip(extraction(tmp_path / "cache"), lines.append)
    (note,) = [line for line in lines if "novel names" in line]
    assert f"{len(NOVEL)} of the {len(NOVEL)}" in note
    assert NOVEL[0] in note


# --- identity ---

def test_second_run_is_a_hit_and_writes_nothing(copied_cache: Path, extraction: Config) -> None:
    before = _hash(copied_cache)
    report = extract_clip(extraction(copied_cache), _silent)
    assert set(report.levels.values()) == {"hit"}
    assert _hash(copied_cache) == before


def test_same_data_at_another_path_and_same_clip_in_another_folder_are_hits(copied_world: Path, copied_cache: Path, clip: str,
                                                                             proposals: Path, tmp_path: Path, extraction: Config) -> None:
    moved = shutil.copytree(clip.removeprefix("local-dir:"), tmp_path / "moved clip")
    shutil.copy(proposals, tmp_path / "other name.json")
    report = extract_clip(extraction(copied_cache, data=copied_world, clip=f"local-dir:{moved}", proposals=tmp_path / "other name.json"),
                          _silent)
    assert set(report.levels.values()) == {"hit"}


def test_novel_annotations_leave_no_trace_in_the_cache(copied_world: Path, copied_cache: Path, extraction: Config) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    novel = {c["id"] for c in tree["categories"] if c["name"] in NOVEL}
    kept = [a for a in tree["annotations"] if a["category_id"] not in novel]
    assert len(kept) < len(tree["annotations"])
    file.write_text(json.dumps(tree | {"annotations": kept}))
    report = extract_clip(extraction(copied_cache, data=copied_world), _silent)
    assert set(report.levels.values()) == {"hit"}


def _other_proposals(tmp_path: Path, proposals: Path) -> dict[str, Any]:
    entries = json.loads(proposals.read_text())
    entries[0]["bbox"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(entries))
    return {"proposals": tmp_path / "other.json"}


def _other_clip(tmp_path: Path, save_clip: Callable[..., str]) -> dict[str, Any]:
    return {"clip": save_clip(tmp_path / "other clip", seed=1)}


def _other_preprocessing(tmp_path: Path, save_clip: Callable[..., str]) -> dict[str, Any]:
    return {"clip": save_clip(tmp_path / "other clip", preprocess={"mean": [0.5, 0.5, 0.5]})}


def _other_vocabulary(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "words.txt").write_text("car\nstar\n")
    return {"vocabulary": tmp_path / "words.txt"}


@pytest.mark.parametrize(("change", "named", "differ"), [
    (_other_proposals, r"proposals\.hash", {Level.INSTANCE}),
    (lambda: {"templates": TEMPLATES}, "templates", {Level.INSTANCE, Level.CLASS, Level.NOUN}),
    (lambda: {"captions": None}, r"nouns\.offered", {Level.INSTANCE}),
    (_other_vocabulary, r"nouns\.vocabulary", {Level.INSTANCE, Level.NOUN}),
    (_other_clip, r"clip\.weights_sha256", set(Level)),
    (_other_preprocessing, r"clip\.preprocessing\.mean", set(Level)),
    (lambda: {"precision": Precision.BF16}, r"clip\.precision", set(Level)),
], ids=["proposals", "templates", "captions", "vocabulary", "clip", "preprocessing", "precision"])
def test_other_input_is_refused_by_name_and_overwrite_renews_only_what_differs(
        request: pytest.FixtureRequest, copied_cache: Path, extraction: Config, change: Callable[..., dict[str, Any]], named: str,
        differ: set[Level]) -> None:
    wanted = [n for n in ("tmp_path", "proposals", "save_clip") if n in change.__code__.co_varnames[:change.__code__.co_argcount]]
    changes = change(**{name: request.getfixturevalue(name) for name in wanted})
    before = {level: _hash(copied_cache / level) for level in Level}
    with pytest.raises(HdovdError, match=named) as error:
        extract_clip(extraction(copied_cache, **changes), _silent)
    assert "--overwrite" in str(error.value)
    assert {level: _hash(copied_cache / level) for level in Level} == before
    report = extract_clip(extraction(copied_cache, overwrite=True, **changes), _silent)
    assert {level for level, decision in report.levels.items() if decision != "hit"} == differ
    for level in Level:
        assert (_hash(copied_cache / level) == before[level]) == (level not in differ)
    assert set(extract_clip(extraction(copied_cache, **changes), _silent).levels.values()) == {"hit"}


def test_cache_of_another_schema_can_be_overwritten(copied_cache: Path, extraction: Config) -> None:
    """The reader says "extract it again": that must then work."""
    import zarr

    zarr.open_group(copied_cache, mode="r+").attrs["schema_version"] = 99
    with pytest.raises(HdovdError):
        extract_clip(extraction(copied_cache), _silent)
    extract_clip(extraction(copied_cache, overwrite=True), _silent)
    assert FeatureCache(copied_cache).levels() == list(Level)


def test_empty_folder_can_take_a_cache(tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "cache").mkdir()
    extract_clip(extraction(tmp_path / "cache"), _silent)
    assert FeatureCache(tmp_path / "cache").levels() == list(Level)


def test_folder_with_something_else_is_never_replaced(tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"precious")
    with pytest.raises(HdovdError, match="photos"):
        extract_clip(extraction(tmp_path / "photos", overwrite=True), _silent)
    assert (tmp_path / "photos" / "mine.jpg").read_bytes() == b"precious"
