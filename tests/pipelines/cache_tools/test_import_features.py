"""Published folders become caches: the micro world's own cache is written out in the authors' formats and imported
again.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdovd.cache import Catalog, Level
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.audit.audit import AuditConfig, audit
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.cache_tools.config import ForeignFormat, ImportConfig
from hdovd.pipelines.cache_tools.importing import UNKNOWN_ORIGIN, import_features
from hdovd.pipelines.calibration.calibrate import calibrate
from hdovd.pipelines.calibration.config import CalibrateConfig

Import = Callable[..., list[str]]


@pytest.fixture
def published(tmp_path: Path, world: Path, cache: Path) -> Path:
    """The micro world's features as HD-OVD's authors publish theirs: features/*.pth and proposals.pkl."""
    reader, tree = FeatureCache(cache), json.loads((world / "annotations" / "instances_train2017.json").read_text())
    nouns, known = reader.embeddings(Level.NOUN), set(reader._rows_by_image(Level.BOXES))
    (tmp_path / "features").mkdir()
    boxes = []
    for entry in tree["images"]:
        if entry["id"] not in known:
            boxes.append(np.zeros((0, 5), np.float32))
            continue
        rows = reader.instances(entry["id"])
        base, extra = rows.base_boxes(), rows.proposals()
        boxes.append(np.concatenate([extra.box, extra.score[:, None]], axis=1))
        torch.save(
            {
                "gt_clip_image_embedding": torch.from_numpy(base.embedding),
                "proposal_clip_image_embedding": torch.from_numpy(extra.embedding),
                "proposal_clip_text_embedding": torch.from_numpy(nouns[extra.noun]),
                "clip_full_image_embedding": torch.from_numpy(reader.image_embedding(entry["id"])[None]),
            },
            tmp_path / "features" / f"{Path(entry['file_name']).stem}.pth",
        )
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(boxes))
    return tmp_path


@pytest.fixture
def run(published: Path, world: Path, clip: str) -> Import:
    """Import the published folder; returns what was logged."""

    def run(**changes: Any) -> list[str]:
        lines: list[str] = []
        values = {
            "format": ForeignFormat.HD_OVD,
            "source": published / "features",
            "data": DataPaths(world),
            "cache": published / "imported",
            "proposals": published / "proposals.pkl",
            "protocol": str(world / "protocol.toml"),
            "clip": clip,
            "device": "cpu",
        }
        with lines_to(lines.append):
            import_features(ImportConfig(**(values | changes)))
        return lines

    return run


def test_features_come_back_as_they_were(published: Path, run: Import, cache: Path, kept: list[int]) -> None:
    run()
    one, other = FeatureCache(cache), FeatureCache(published / "imported")
    nouns, texts = one.embeddings(Level.NOUN), other.embeddings(Level.NOUN)
    assert len(texts) <= len(nouns)  # one row for every different text, not one a proposal
    for image_id in kept:
        a, b = one.instances(image_id), other.instances(image_id)
        for name in ("box", "source", "annotation_id", "score"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.embedding, b.embedding, atol=1e-3)  # normalised again
        np.testing.assert_allclose(one.image_embedding(image_id), other.image_embedding(image_id), atol=1e-3)
        named = a.noun >= 0  # a proposal that is most like a background has none; published texts have one for each
        np.testing.assert_allclose(nouns[a.noun[named]], texts[b.noun[named]], atol=1e-3)
        np.testing.assert_allclose(a.noun_cosine[named], b.noun_cosine[named], atol=4e-3)
        assert (b.base_boxes().noun == -1).all()


def test_identity_says_that_the_origin_is_unknown(published: Path, run: Import) -> None:
    run()
    reader = FeatureCache(published / "imported")
    for level in (Level.INSTANCE, Level.IMAGE, Level.CLASS, Level.NOUN):
        assert reader.key_inputs(level)["clip"]["origin"] == UNKNOWN_ORIGIN
    reader.require_together()
    assert reader.set.proposals.keys() == {"file", "identity", "made_by"}
    assert reader.set.proposals["made_by"] is None


def test_audit_does_not_pass_what_the_publishers_do_not_say(published: Path, run: Import, world: Path) -> None:
    """Neither what made the proposals nor which words the texts are."""
    run()
    report = audit(
        AuditConfig(data=DataPaths(world), cache=published / "imported", protocol=str(world / "protocol.toml"))
    )
    unknown = {check.name for check in report.checks if check.verdict is Verdict.UNKNOWN}
    assert {"proposals: made by", "novel names"} <= unknown
    assert report.leaks == 0


def test_an_import_is_calibrated_by_its_classes(published: Path, run: Import, world: Path, cache: Path) -> None:
    """Nobody knows the words of its texts, so these are no nouns that a base box may be called by. Every other image's
    boxes look as their class's name does.
    """
    given = {"data": DataPaths(world), "protocol": str(world / "protocol.toml")}
    protocol = load_protocol(given["protocol"])
    split, texts = given["data"].load("train2017", protocol, base_only=True), FeatureCache(cache)
    for image in split.images[::2]:
        file = published / "features" / f"{Path(image.file_name).stem}.pth"
        own = torch.from_numpy(texts.class_embeddings([protocol.base[label] for label in image.labels.tolist()]))
        torch.save(torch.load(file, weights_only=True) | {"gt_clip_image_embedding": own}, file)
    run()
    reader = FeatureCache(published / "imported")
    assert reader.known_nouns() == []
    assert len(reader.names(Level.NOUN)) > 5
    found = calibrate(CalibrateConfig(cache=published / "imported", out=published / "c.toml", **given)).found
    crops = np.concatenate([reader.instances(image.id).base_boxes().embedding for image in split.images]).astype(float)
    cosines, labels = crops @ reader.class_embeddings(protocol.base).T, [image.labels for image in split.images]
    right = cosines.argmax(axis=1) == np.concatenate(labels)
    assert right.sum() >= sum(map(len, labels[::2])) >= 10
    assert (found["boxes"], found["named_rightly"]) == (len(right), right.sum())
    assert found["right_mean"] == pytest.approx(cosines.max(axis=1)[right].mean(), abs=2e-3)
    assert found["wrong_mean"] == pytest.approx(cosines.max(axis=1)[~right].mean(), abs=2e-3)


def test_other_rows_give_another_key(published: Path, run: Import) -> None:
    run()
    before = FeatureCache(published / "imported")
    file = sorted((published / "features").glob("*.pth"))[3]
    tensors = torch.load(file, weights_only=True)
    tensors["gt_clip_image_embedding"] = tensors["gt_clip_image_embedding"].roll(1, dims=1)
    torch.save(tensors, file)
    run()
    after = FeatureCache(published / "imported")
    changed = {level for level in Level if before.key(level) != after.key(level)}
    assert changed == {Level.INSTANCE, Level.PSEUDO_LABEL}


def test_training_runs_from_an_import(
    published: Path, run: Import, train_micro: Callable[..., Any], tmp_path: Path
) -> None:
    run()
    train_micro(tmp_path / "run", from_cache=published / "imported")
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(last[name] > 0 for name in ("instance_alignment", "classification", "image_alignment"))


def test_image_that_does_not_fit_becomes_a_tombstone(
    published: Path, run: Import, kept: list[int], train_micro: Callable[..., Any], tmp_path: Path
) -> None:
    files = sorted((published / "features").glob("*.pth"))
    files[0].unlink()
    tensors = torch.load(files[5], weights_only=True)
    torch.save(tensors | {"proposal_clip_image_embedding": tensors["proposal_clip_image_embedding"][1:]}, files[5])
    lines = run()
    failed = FeatureCache(published / "imported").failed()
    assert len(failed) == 2
    assert any("2 images have no embeddings" in line for line in lines)
    logged: list[str] = []
    train_micro(tmp_path / "run", from_cache=published / "imported", log=logged.append)
    assert any("skipped 2" in line for line in logged)
    assert any(f"{len(kept) - 2} images" in line for line in logged)


def test_second_import_writes_nothing(published: Path, run: Import) -> None:
    run()
    before = {p: p.stat().st_mtime_ns for p in (published / "imported").rglob("c/*") if p.is_file()}
    run()
    assert {p: p.stat().st_mtime_ns for p in (published / "imported").rglob("c/*") if p.is_file()} == before


def test_parts_are_cut_where_they_must_be(
    published: Path, run: Import, cache: Path, kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdovd.pipelines.cache_tools.importing.PART_ROWS", 7)
    monkeypatch.setattr("hdovd.pipelines.cache_tools.importing.IMAGE_PART_ROWS", 4)
    run()
    one, other = FeatureCache(cache), FeatureCache(published / "imported")
    assert len(Catalog(published / "imported").find(Level.INSTANCE, other.key(Level.INSTANCE)).finished()) > 10
    for image_id in kept:
        np.testing.assert_allclose(one.instances(image_id).embedding, other.instances(image_id).embedding, atol=1e-3)


def test_clip_of_another_size_is_refused(run: Import, save_clip: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match="it is not the CLIP that was used"):
        run(clip=save_clip(tmp_path / "wide", embed_dim=48))


def test_without_clip_there_is_no_class_level_and_training_says_so(
    published: Path, run: Import, train_micro: Callable[..., Any], tmp_path: Path
) -> None:
    assert any("no --clip" in line for line in run(clip=None))
    with pytest.raises(HdovdError, match="no class level"):
        train_micro(tmp_path / "run", from_cache=published / "imported")


def test_nothing_fits(published: Path, run: Import) -> None:
    for file in (published / "features").glob("*.pth"):
        torch.save({"gt_clip_image_embedding": torch.zeros(99, 4)}, file)
    with pytest.raises(HdovdError, match=r"all \d+ images were left out"):
        run()
    assert not (published / "imported").exists()


def test_proposals_go_with_hd_ovd_alone(run: Import) -> None:
    with pytest.raises(HdovdError, match="needs --proposals"):
        run(proposals=None)
    with pytest.raises(HdovdError, match="takes none"):
        run(format=ForeignFormat.OADP)


def test_oadp_has_no_base_boxes_and_training_names_that(
    published: Path,
    run: Import,
    world: Path,
    cache: Path,
    kept: list[int],
    train_micro: Callable[..., Any],
    tmp_path: Path,
) -> None:
    reader = FeatureCache(cache)
    for kind in ("objects", "globals"):
        (published / "oake" / kind / "train2017").mkdir(parents=True)
    for image_id in kept:
        rows = reader.instances(image_id).proposals()
        torch.save(
            {
                "embeddings": torch.from_numpy(rows.embedding),
                "bboxes": torch.from_numpy(rows.box).half(),
                "objectness": torch.from_numpy(rows.score).half()[:, None],
            },
            published / "oake" / "objects" / "train2017" / f"{image_id:012d}.pth",
        )
        whole = torch.from_numpy(reader.image_embedding(image_id))
        torch.save(whole, published / "oake" / "globals" / "train2017" / f"{image_id:012d}.pth")
    lines = run(format=ForeignFormat.OADP, source=published / "oake", proposals=None)
    assert any("no embeddings of base boxes" in line for line in lines)
    imported = FeatureCache(published / "imported")
    for image_id in kept:
        np.testing.assert_allclose(
            reader.instances(image_id).proposals().embedding, imported.instances(image_id).embedding, atol=1e-3
        )
    with pytest.raises(HdovdError, match=r"base_boxes\.count differs"):
        train_micro(tmp_path / "run", from_cache=published / "imported")
    given = {"data": DataPaths(world), "protocol": str(world / "protocol.toml")}
    with pytest.raises(HdovdError, match=r"boxes level of .*imported does not fit this data:\n.*base_boxes\.count"):
        calibrate(CalibrateConfig(cache=published / "imported", out=tmp_path / "c.toml", **given))
