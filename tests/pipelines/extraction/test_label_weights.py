"""What extraction decides by base boxes: which nouns name no proposal, and how far labels are trusted; all the way to a
run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hdovd.cache import Catalog, FeatureSet, Level, Source
from hdovd.cache.catalog import LABEL_WEIGHTS
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, Split, load_protocol
from hdovd.pipelines.cache_tools.verify import extract_command
from hdovd.pipelines.calibration.calibrate import calibrate
from hdovd.pipelines.calibration.config import CalibrateConfig
from hdovd.pipelines.calibration.values import origin_of, read_calibration, with_reliability
from hdovd.pipelines.demo.world import BASE, GROUNDS, NOVEL
from hdovd.pipelines.extraction.config import ExtractConfig, LabelChoice, LabelRule
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.label_weights import Evidence, label_evidence, on_object
from hdovd.pipelines.nouns.allowed import offered_nouns
from hdovd.pipelines.training.training_set import TarTrainingSet

Config = Callable[..., ExtractConfig]


def base_split(world: Path) -> Split:
    return DataPaths(world).load("train2017", load_protocol(str(world / "protocol.toml")), base_only=True)


def by_hand(
    cache: FeatureCache,
    split: Split,
    texts: np.ndarray,
    candidates: Callable[[int, int], dict[int, float]],
    row_of: dict[int, int],
    grounds: Sequence[int] = (),
) -> list[tuple[float, bool]]:
    """The cosine of every base box's label, and whether it is right. candidates: of an image and a class the rows of
    texts that its boxes may be called by, with what is added to their cosines. row_of: the row that names a class.
    grounds: rows of backgrounds, which are no labels.
    """
    wanted, unit = list[tuple[float, bool]](), texts / np.linalg.norm(texts, axis=1, keepdims=True)
    for image in split.images:
        crops = cache.instances(image.id).base_boxes().embedding.astype(np.float32)
        for fold in range(4):
            for label, crop in zip(image.labels.tolist(), crops, strict=True):
                if label % 4 == fold:
                    free, cosines = candidates(image.id, label), unit @ crop / np.linalg.norm(crop)
                    best = max(free, key=lambda k: cosines[k] + free[k])
                    if best not in grounds:
                        wanted.append((float(cosines[best]), best == row_of[label]))
    return wanted


def require_labels(found: Evidence, wanted: list[tuple[float, bool]]) -> None:
    assert found.right.tolist() == [right for _, right in wanted]
    np.testing.assert_allclose(found.cosines, [cosine for cosine, _ in wanted], atol=2e-3)  # rows are of float16


def test_no_proposal_is_called_by_a_base_name(cache: Path) -> None:
    opened = FeatureCache(cache)
    names, seen = opened.names(Level.NOUN), 0
    rows = opened.rows_between(0, sum(sum(opened.counts(source).values()) for source in Source))
    for row in np.flatnonzero(rows.noun >= 0).tolist():
        assert names[rows.noun[row]] not in BASE
        seen += 1
    assert seen > 50
    assert (rows.noun[rows.source == Source.BASE_BOX] == -1).all()


def test_labels_of_base_boxes_by_hand(cache: Path, world: Path) -> None:
    """Every base box may be called by the classes of its own quarter and by what is no base class, and by the best of
    these is, if that is no background.
    """
    opened, protocol = FeatureCache(cache), load_protocol(str(world / "protocol.toml"))
    split = base_split(world)
    nouns = offered_nouns(None, world / "vocabulary.txt", world / "annotations" / "captions_train2017.json")
    assert nouns is not None
    found = label_evidence(opened, split, [(name,) for name in protocol.base], nouns.by_image)
    mention = opened.key_inputs(Level.PSEUDO_LABEL)["mention"]
    assert mention > 0
    names, texts = opened.names(Level.NOUN), opened.embeddings(Level.NOUN)

    def candidates(image_id: int, label: int) -> dict[int, float]:
        free = [k for k, n in enumerate(names) if n not in BASE or protocol.base.index(n) % 4 == label % 4]
        return {k: mention * (k in nouns.offered(image_id)) for k in free}

    row_of = {label: names.index(name) for label, name in enumerate(protocol.base)}
    grounds = opened.key_inputs(Level.PSEUDO_LABEL)["backgrounds"]
    assert {names[row] for row in grounds} == set(GROUNDS)
    wanted = by_hand(opened, split, texts, candidates, row_of, grounds)
    require_labels(found, wanted)
    assert found.classes == len(BASE)
    assert found.unnamed == sum(len(image.labels) for image in split.images) - len(wanted) > 5
    fitted = found.fitted(on_object(opened.set.proposals), opened.named_share())
    assert fitted == pytest.approx(opened.set.label_weights)
    assert fitted.keys() == LABEL_WEIGHTS


def test_the_weights_are_the_sets_and_training_takes_them(
    copied_cache: Path, extraction: Config, world: Path, tmp_path: Path
) -> None:
    lines = list[str]()
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache))
    assert "everything is there: nothing to extract" in lines
    assert [line for line in lines if "with their classes held out in turn" in line]
    opened = FeatureCache(copied_cache)
    weights = opened.set.label_weights
    _, used, record = with_reliability(load_recipe("demo"), lambda: origin_of(opened), None, BASE)
    assert used.pseudo_boxes.reliability == (weights["centre"], weights["width"], weights["scale"])
    assert record["reliability"]["source"] == "auto: fitted to the set's base boxes"
    protocol = str(world / "protocol.toml")
    export_tars(
        ExportConfig(cache=copied_cache, out=tmp_path / "shards", data=DataPaths(world), protocol=protocol, samples=8)
    )
    tars = TarTrainingSet(str(tmp_path / "shards"), load_protocol(protocol), load_recipe("demo"))
    assert tars.label_origin().fitted == weights
    calibrated = calibrate(CalibrateConfig(cache=copied_cache, out=tmp_path / "c.toml"))
    assert (calibrated.centre, calibrated.scale) == pytest.approx((weights["centre"], weights["scale"]))
    assert read_calibration(tmp_path / "c.toml").found["boxes"] == weights["boxes"]


@pytest.mark.parametrize("choice", list(LabelChoice))
def test_where_nouns_name_no_base_class_the_classes_are_nouns_too(
    copied_cache: Path,
    extraction: Config,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choice: LabelChoice,
) -> None:
    """Every image offers them; those of other quarters alone are barred, if the set's rule bars base classes."""
    monkeypatch.setattr("hdovd.pipelines.calibration.calibrate.LEAST", 1)  # the CLIP of tests knows little
    words, captions = tmp_path / "words.txt", world / "annotations" / "captions_train2017.json"
    words.write_text("\n".join(NOVEL))
    extract_clip(extraction(copied_cache, vocabulary=words, labels=LabelRule(choice=choice), features="few"))
    opened, split, nouns = FeatureCache(copied_cache, "few"), base_split(world), offered_nouns(None, words, captions)
    assert nouns is not None
    found = label_evidence(opened, split, [(name,) for name in BASE], nouns.by_image)
    row_of = {label: len(NOVEL) + label for label in range(len(BASE))}

    def candidates(image_id: int, label: int) -> dict[int, float]:
        barring = choice is LabelChoice.LIKELY
        classes = [row for other, row in row_of.items() if not barring or other % 4 == label % 4]
        return dict.fromkeys((*nouns.offered(image_id), *classes), 0.0)

    texts = np.concatenate([opened.embeddings(Level.NOUN), opened.class_embeddings(BASE)])
    require_labels(found, by_hand(opened, split, texts, candidates, row_of))
    assert found.classes == len(BASE)
    assert opened.set.label_weights == pytest.approx(found.fitted(None))
    if choice is LabelChoice.LIKELY:  # by the other rule this CLIP names nothing rightly
        calibrated = calibrate(CalibrateConfig(cache=copied_cache, features="few", out=tmp_path / "c.toml"))
        assert calibrated.centre == opened.set.label_weights["centre"]


def test_nouns_that_name_some_base_classes_are_judged_by_those_alone(
    copied_cache: Path, extraction: Config, world: Path, tmp_path: Path
) -> None:
    named = BASE[::2]
    (tmp_path / "words.txt").write_text("\n".join([*named, *NOVEL]))
    extract_clip(extraction(copied_cache, vocabulary=tmp_path / "words.txt", captions=None, features="half"))
    split, weights = base_split(world), FeatureCache(copied_cache, "half").set.label_weights
    boxes = [BASE[label] for image in split.images for label in image.labels.tolist()]
    assert weights["classes"] == len(named)
    assert weights["boxes"] == sum(name in named for name in boxes) < len(boxes)


def test_classes_of_other_prompts_are_no_nouns(copied_cache: Path, extraction: Config, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("zeppelin\nspoon\n")
    opened = FeatureCache(copied_cache)
    np.save(tmp_path / "classes.npy", opened.embeddings(Level.CLASS))
    lines, more = list[str](), {"vocabulary": tmp_path / "words.txt", "class_embeddings": tmp_path / "classes.npy"}
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache, captions=None, features="few", **more))
    assert [line for line in lines if line.startswith("note: 0 labels of base boxes are too few")]
    assert FeatureCache(copied_cache, "few").set.label_weights == {}
    with pytest.raises(HdovdError, match="the nouns are of the prompts"):
        calibrate(CalibrateConfig(cache=copied_cache, features="few", out=tmp_path / "c.toml"))


def test_where_nobody_knows_what_images_offer_all_nouns_are_offered(
    copied_cache: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hdovd.pipelines.calibration.calibrate.LEAST", 1)  # the CLIP of tests knows little
    catalog, opened, split = Catalog(copied_cache), FeatureCache(copied_cache), base_split(world)
    catalog.write_set("default", replace(opened.set, made_from={}, label_weights={}))
    given = {"data": DataPaths(world), "protocol": str(world / "protocol.toml")}
    found = calibrate(CalibrateConfig(cache=copied_cache, out=tmp_path / "c.toml", **given)).found
    names, row_of = opened.names(Level.NOUN), dict(enumerate(map(opened.names(Level.NOUN).index, BASE)))

    def candidates(image_id: int, label: int) -> dict[int, float]:
        return {k: 0.0 for k, n in enumerate(names) if n not in BASE or BASE.index(n) % 4 == label % 4}

    grounds = opened.key_inputs(Level.PSEUDO_LABEL)["backgrounds"]
    wanted = by_hand(opened, split, opened.embeddings(Level.NOUN), candidates, row_of, grounds)
    assert (found["boxes"], found["named_rightly"]) == (len(wanted), sum(right for _, right in wanted))
    assert found["right_mean"] == pytest.approx(np.mean([cosine for cosine, right in wanted if right]), abs=2e-3)


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"centre": None}, {"scale": "1"}, {"auc": float("nan")}, {"boxes": True}]
)
def test_weights_that_are_no_numbers_are_a_damaged_set(cache: Path, change: dict[str, object]) -> None:
    tree = FeatureCache(cache).set.to_tree()
    assert FeatureSet.from_tree(tree).label_weights == tree["label_weights"]
    tree["label_weights"] = {**tree["label_weights"], **change}
    with pytest.raises(ValueError, match="label_weights are"):
        FeatureSet.from_tree(json.loads(json.dumps(tree)))


def test_a_vocabulary_of_base_names_alone_is_refused(tmp_path: Path, extraction: Config) -> None:
    (tmp_path / "words.txt").write_text("\n".join(BASE))
    with pytest.raises(HdovdError, match="nothing is left to name pseudo boxes by"):
        extract_clip(extraction(tmp_path / "c", vocabulary=tmp_path / "words.txt", captions=None))
    assert not (tmp_path / "c").exists() or not Catalog(tmp_path / "c").sets()


@pytest.mark.parametrize("change", ["gone", "other words", "other captions"])
def test_calibrate_needs_the_nouns_that_the_set_was_made_from(
    copied_world: Path, extraction: Config, tmp_path: Path, change: str
) -> None:
    extract_clip(extraction(tmp_path / "cache", data=copied_world))
    captions = copied_world / "annotations" / "captions_train2017.json"
    if change == "gone":
        captions.unlink()
    elif change == "other words":
        (copied_world / "vocabulary.txt").write_text("car\nstar\n")
    else:
        tree = json.loads(captions.read_text())
        tree["annotations"] = tree["annotations"][::2]
        captions.write_text(json.dumps(tree))
    expected = (
        "cannot read .*captions_train2017.json: No such file"
        if change == "gone"
        else "is not what set default of .* was made from any more"
    )
    with pytest.raises(HdovdError, match=expected):
        calibrate(CalibrateConfig(cache=tmp_path / "cache", out=tmp_path / "c.toml"))


def test_a_set_of_the_papers_rule_is_repaired_by_the_papers_rule(copied_cache: Path, extraction: Config) -> None:
    extract_clip(extraction(copied_cache, labels=LabelRule(), features="paper"))
    sets = Catalog(copied_cache).sets()
    assert "--label-choice mentioned" in extract_command("cache", "paper", sets["paper"].made_from)
    assert "--label-choice likely" in extract_command("cache", "default", sets["default"].made_from)
