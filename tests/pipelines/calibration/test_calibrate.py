"""Calibration of the reliability weight: which labels it is fitted to, what it writes, and what training makes of
it."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.audit.audit import AuditConfig, audit
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.calibration.calibrate import CalibrateConfig, calibrate
from hdovd.pipelines.calibration.values import (
    KNOWN,
    Calibration,
    LabelOrigin,
    origin_of,
    read_calibration,
    with_reliability,
)
from hdovd.pipelines.common.options import refuse_two_sources
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.extraction.config import ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.training.train import TrainConfig, train

Config = Callable[..., ExtractConfig]
OPENAI = {"clip": "ViT-B-32", "pretrained": "openai"}


# --- which labels ---


@pytest.fixture(scope="module")
def knowing(cache: Path, world: Path, extraction: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache whose CLIP knows the base classes a little: their embeddings tell their boxes from others'; novel ones
    are noise.
    """
    folder, protocol = tmp_path_factory.mktemp("calibration"), load_protocol(str(world / "protocol.toml"))
    split, reader = DataPaths(world).load("train2017", protocol, base_only=True), FeatureCache(cache)
    rows = np.random.default_rng(0).normal(size=(len(protocol.names), reader.dim)).astype(np.float32)
    crops = np.concatenate([reader.instances(image.id).base_boxes().embedding for image in split.images]).astype(
        np.float32
    )
    labels = np.concatenate([image.labels for image in split.images])
    own = labels[:, None] == np.arange(len(protocol.base))
    rows[: len(protocol.base)] = np.linalg.solve(
        crops.T @ crops + 1e-4 * np.eye(reader.dim), crops.T @ own
    ).T  # regression on one-hot rows
    np.save(folder / "classes.npy", rows)
    extract_clip(extraction(folder / "cache", vocabulary=None, captions=None, class_embeddings=folder / "classes.npy"))
    return folder / "cache"


def test_a_cache_is_calibrated(knowing: Path, world: Path, tmp_path: Path) -> None:
    """Without nouns, every base box is called by the base class that it is most like."""
    said: list[str] = []
    with lines_to(said.append):
        found = calibrate(CalibrateConfig(cache=knowing, out=tmp_path / "new" / "c.toml"))
    again, cache = read_calibration(tmp_path / "new" / "c.toml"), FeatureCache(knowing)
    assert again == found
    tree = tomllib.loads((tmp_path / "new" / "c.toml").read_text())
    assert tree["fitted_on"]["levels"]["instance"] == cache.key(Level.INSTANCE)
    assert any("AUC" in line for line in said)
    split = DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True)
    crops = np.concatenate([cache.instances(image.id).base_boxes().embedding for image in split.images]).astype(float)
    texts, labels = cache.class_embeddings(BASE), np.concatenate([image.labels for image in split.images])
    cosines = crops @ texts.T / np.linalg.norm(crops, axis=1, keepdims=True) / np.linalg.norm(texts, axis=1)
    right = cosines.argmax(axis=1) == labels
    assert (found.found["boxes"], found.found["named_rightly"]) == (len(labels), right.sum())
    assert 10 <= right.sum() <= len(labels) - 10
    assert found.found["right_mean"] == pytest.approx(cosines.max(axis=1)[right].mean(), abs=1e-3)
    assert found.found["wrong_mean"] == pytest.approx(cosines.max(axis=1)[~right].mean(), abs=1e-3)
    weights = found.scale / (1 + np.exp((found.centre - cosines.max(axis=1)) / found.width))
    assert found.found["weight_of_right"] == pytest.approx(weights[right].mean(), abs=1e-3)
    assert found.found["weight_of_wrong"] == pytest.approx(weights[~right].mean(), abs=1e-3)
    assert weights[right].mean() > weights[~right].mean() + 0.05
    with Image.open(tmp_path / "new" / "c.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20) or ()}
    assert len(colours) > 5


def test_novel_names_and_boxes_have_no_part_in_it(
    knowing: Path, world: Path, copied_world: Path, tmp_path: Path
) -> None:
    """Other novel boxes, and none of the novel names among the classes that are asked for: the same values."""
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    protocol = load_protocol(str(world / "protocol.toml"))
    novel = {c["id"] for c in tree["categories"] if c["name"] in protocol.novel}
    tree["annotations"] = [a for a in tree["annotations"] if a["category_id"] not in novel]
    file.write_text(json.dumps(tree))
    one = calibrate(CalibrateConfig(cache=knowing, out=tmp_path / "one.toml"))
    other = calibrate(CalibrateConfig(cache=knowing, out=tmp_path / "other.toml", data=DataPaths(copied_world)))
    assert other == one
    assert set(one.fitted_on["classes"]) == set(protocol.base)


def test_other_boxes_are_refused(knowing: Path, copied_world: Path, tmp_path: Path) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    for annotation in tree["annotations"]:
        annotation["id"] += 1000
    file.write_text(json.dumps(tree))
    with pytest.raises(HdovdError, match=r"boxes level of .* does not fit this data"):
        calibrate(CalibrateConfig(cache=knowing, out=tmp_path / "c.toml", data=DataPaths(copied_world)))
    assert not (tmp_path / "c.toml").exists()


def test_classes_of_other_prompts_than_the_nouns_are_refused(knowing: Path, extraction: Config, tmp_path: Path) -> None:
    both = extraction(tmp_path / "cache", class_embeddings=knowing.parent / "classes.npy")
    extract_clip(both)
    with pytest.raises(
        HdovdError, match=r"the nouns are of the prompts .*the classes of a file of embeddings.*--features plain"
    ):
        calibrate(CalibrateConfig(cache=tmp_path / "cache", out=tmp_path / "c.toml"))


def test_one_base_class_is_refused(extraction: Config, world: Path, tmp_path: Path) -> None:
    """There is no wrong name to tell a right one from."""
    protocol = tmp_path / "one.toml"
    protocol.write_text(f'name = "one"\nbase = ["{BASE[0]}"]\nnovel = ["{NOVEL[0]}"]\n')
    extract_clip(extraction(tmp_path / "cache", protocol=str(protocol), vocabulary=None, captions=None))
    split = DataPaths(world).load("train2017", load_protocol(str(protocol)), base_only=True)
    boxes = sum(len(image.labels) for image in split.images)
    expected = f"set default of .*cache, {boxes} base boxes of 1 classes: {boxes} right and 0 wrong labels are too few"
    with pytest.raises(HdovdError, match=expected):
        calibrate(CalibrateConfig(cache=tmp_path / "cache", out=tmp_path / "c.toml"))
    assert not (tmp_path / "c.toml").exists()


# --- what training makes of it ---


def _calibration(cache: Path) -> Calibration:
    way = {"cache": str(cache), "features": "default", "way": origin_of(FeatureCache(cache)).way()}
    return Calibration(0.2, 0.03, 1.1, way, {})


def test_a_run_takes_and_records_the_values(
    training_cache: Path, world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(_calibration(training_cache).to_toml())
    job = TrainConfig(
        data=DataPaths(world),
        cache=training_cache,
        out=tmp_path / "run",
        recipe=micro_recipe("pseudo_boxes.reliability_width=auto"),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        calibration=file,
    )
    run = train(job)
    assert run.recipe().pseudo_boxes.reliability == (0.2, 0.03, 1.1)
    record = run.record()["reliability"]
    assert (record["centre"], record["width"], record["scale"]) == (0.2, 0.03, 1.1)
    assert record["fitted_on"]["way"] == origin_of(FeatureCache(training_cache)).way()
    with pytest.raises(HdovdError, match="reliability_centre differs"):
        train(replace(job, calibration=None, recipe=micro_recipe(), resume=True))


def test_the_audit_reads_what_it_was_fitted_on(
    knowing: Path, world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    calibrate(CalibrateConfig(cache=knowing, out=tmp_path / "c.toml"))
    cache, protocol = FeatureCache(knowing), str(world / "protocol.toml")
    _, _, record = with_reliability(micro_recipe(), lambda: origin_of(cache), tmp_path / "c.toml", BASE)
    record |= {"protocol": load_protocol(protocol).to_dict(), "cache": cache.identity(), "resumed": []}
    (tmp_path / "run.json").write_text(json.dumps(record))
    report = audit(AuditConfig(data=DataPaths(world), cache=knowing, run=tmp_path, protocol=protocol))
    (check,) = (check for check in report.checks if check.name == "calibration")
    assert (check.verdict, check.text) == (
        Verdict.OK,
        "fitted on the names of 16 base classes and this cache's base boxes",
    )


def test_a_calibration_of_another_clip_or_prompts_is_refused(
    cache: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file, origin = tmp_path / "c.toml", origin_of(FeatureCache(cache))
    file.write_text(_calibration(cache).to_toml())
    inputs = origin.inputs
    noun, instance, labels = (inputs[level] for level in (Level.NOUN, Level.INSTANCE, Level.PSEUDO_LABEL))
    for level, changed, line in [
        (
            Level.NOUN,
            noun | {"templates": ["a drawing of a {}"]},
            r"texts.templates differs: fitted on .*a photo of a .*a drawing",
        ),
        (
            Level.INSTANCE,
            instance | {"clip": instance["clip"] | {"weights_sha256": "f00"}},
            r"crops.clip.weights_sha256 differs",
        ),
        (Level.INSTANCE, instance | {"crop": {"shape": "square", "scales": [1.0]}}, r"crops.crop.shape differs"),
        (Level.PSEUDO_LABEL, labels | {"top_k": 3, "temperature": 0.01}, r"labels.top_k differs"),
    ]:
        other = replace(origin, inputs=inputs | {level: changed})
        with pytest.raises(HdovdError, match=f"(?s)was fitted on set default of {cache}.*{line}"):
            with_reliability(micro_recipe(), lambda other=other: other, file, BASE)
    others = replace(origin, inputs=inputs | {Level.NOUN: noun | {"names": ["x"], "tokens": "t"}})
    assert with_reliability(micro_recipe(), lambda: others, file, BASE)[1].pseudo_boxes.reliability == (0.2, 0.03, 1.1)


@pytest.mark.parametrize("text", ["", "[pseudo_boxes]\nreliability_centre = 0.2\n", "not toml", None])
def test_what_is_no_calibration_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "c.toml").write_text(text)
    with pytest.raises(HdovdError, match=r"c.toml is no calibration .*hdovd calibrate"):
        read_calibration(tmp_path / "c.toml")


def test_a_calibration_on_classes_that_are_novel_now_is_refused(
    cache: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    fitted, file = _calibration(cache), tmp_path / "c.toml"
    file.write_text(replace(fitted, fitted_on=fitted.fitted_on | {"classes": [*BASE, NOVEL[0]]}).to_toml())
    with pytest.raises(HdovdError, match=f"fitted on boxes of {NOVEL[0]}, which the protocol does not call base"):
        with_reliability(micro_recipe(), lambda: origin_of(FeatureCache(cache)), file, BASE)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"PK\x03\x04\xff" * 10_000, "is no calibration"), (b"", r"lacks 'pseudo_boxes'"), (None, "no such file")],
)
def test_what_is_no_calibration_is_said_in_a_line(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(HdovdError, match=expected) as error:
        read_calibration(tmp_path / "c.toml")
    assert len(str(error.value)) < 600


def test_a_weight_has_one_source(tmp_path: Path) -> None:
    refuse_two_sources(["pseudo_boxes.reliability_scale=1"], None)
    refuse_two_sources(["train.lr=1"], tmp_path)
    with pytest.raises(
        HdovdError, match=r"pseudo_boxes.reliability_scale=1: --calibration .* says what the reliability weight is"
    ):
        refuse_two_sources(["train.lr=1", "pseudo_boxes.reliability_scale=1"], tmp_path)


def test_a_width_of_zero_is_refused(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(replace(_calibration(cache), width=0.0).to_toml())
    with pytest.raises(HdovdError, match="width and scale above 0"):
        read_calibration(tmp_path / "c.toml")


# --- auto ---


def _origin(
    made_with: dict[str, Any],
    *,
    activation: str = "quickgelu",
    templates: bool = True,
    crop: bool = True,
    top: bool = False,
    imported: str = "",
    dim: int = 512,
) -> LabelOrigin:
    clip = {"origin": "?", "format": imported} if imported else {"activation": activation}
    return LabelOrigin(
        "a cache",
        {
            Level.INSTANCE: {"clip": clip, **({"crop": {"shape": "box"}} if crop and not imported else {})},
            Level.NOUN: {"clip": clip, **({"templates": ["{}"]} if templates and not imported else {})},
            Level.PSEUDO_LABEL: {"top_k": 2, "temperature": 0.01} if top else {},
        },
        made_with,
        dim,
    )


@pytest.mark.parametrize(
    ("origin", "values"),
    [
        (_origin(OPENAI), (0.25, 0.026, 1.0)),
        (_origin({"clip": "ViT-B-32-quickgelu", "pretrained": "openai"}), (0.25, 0.026, 1.0)),
        (_origin({"clip": "ViT-B-32", "pretrained": "mine.pt", "weights": "openai"}), (0.25, 0.026, 1.0)),
        (_origin({"clip": "hf-hub:timm/resnet50_clip.openai", "pretrained": None}), (0.20, 0.03, 1.0)),
        (_origin({"clip": "RN50", "pretrained": "openai"}), (0.20, 0.03, 1.0)),
        (_origin({"clip": "?"}, imported="hd-ovd"), (0.31, 0.026, 1.3)),
    ],
)
def test_auto_is_the_table_of_the_method(origin: LabelOrigin, values: tuple[float, ...]) -> None:
    written, used, record = with_reliability(load_recipe("ov-coco-faster-rcnn-r50"), lambda: origin, None, BASE)
    assert used.pseudo_boxes.reliability == values
    assert values in KNOWN.values()
    assert written.pseudo_boxes.reliability_centre == "auto"
    assert "METHOD section 2" in record["reliability"]["source"]


@pytest.mark.parametrize(
    "origin",
    [
        _origin({"clip": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"}),
        _origin({"clip": "ViT-B-16", "pretrained": "openai"}),
        _origin({"clip": "ViT-B-32", "pretrained": "openai.pt"}),
        _origin(OPENAI, activation="gelu"),
        _origin(OPENAI, crop=False),
        _origin(OPENAI, templates=False),
        _origin(OPENAI, top=True),
        _origin({"clip": "?"}, imported="oadp"),
        _origin({"clip": "?"}, imported="hd-ovd", dim=768),
        _origin({"clip": "local-dir", "pretrained": None}),
    ],
)
def test_auto_of_what_is_not_known_says_what_to_do(origin: LabelOrigin) -> None:
    recipe = load_recipe("ov-coco-faster-rcnn-r50")
    with pytest.raises(HdovdError, match=r"a cache is of none of them.*hdovd calibrate --cache a cache"):
        with_reliability(recipe, lambda: origin, None, BASE)
    without = load_recipe("ov-coco-faster-rcnn-r50", ["loss.class.enabled=false"])
    assert with_reliability(without, lambda: origin, None, BASE) == (without, without, {})


def test_a_number_beside_auto_stays(micro_recipe: Callable[..., Recipe]) -> None:
    recipe = load_recipe("ov-coco-faster-rcnn-r50", ["pseudo_boxes.reliability_scale=1.7"])
    assert with_reliability(recipe, lambda: _origin(OPENAI), None, BASE)[1].pseudo_boxes.reliability == (
        0.25,
        0.026,
        1.7,
    )
    with pytest.raises(HdovdError, match="training needs numbers"):
        _ = recipe.pseudo_boxes.reliability
