"""What extraction decides by base boxes: which nouns name no proposal, and how far labels are trusted; all the way to a
run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hdovd.cache.catalog import LABEL_WEIGHTS, Catalog, FeatureSet
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level, Source
from hdovd.config.recipe import load_recipe
from hdovd.core.errors import HdovdError
from hdovd.core.log import lines_to
from hdovd.data.coco import DataPaths, load_split
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.cache_tools.verify import extract_command
from hdovd.pipelines.calibration.calibrate import calibrate
from hdovd.pipelines.calibration.config import CalibrateConfig
from hdovd.pipelines.calibration.values import origin_of, read_calibration, with_reliability
from hdovd.pipelines.demo.world import BASE, GROUNDS
from hdovd.pipelines.extraction.config import ExtractConfig, LabelRule
from hdovd.pipelines.extraction.export import ExportConfig, export_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.label_weights import label_evidence, on_object
from hdovd.pipelines.nouns.allowed import offered_nouns
from hdovd.pipelines.training.training_set import TarTrainingSet

Config = Callable[..., ExtractConfig]


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
    split = load_split(
        world / "annotations" / "instances_train2017.json", world / "train2017", protocol, base_only=True
    )
    nouns = offered_nouns(None, world / "vocabulary.txt", world / "annotations" / "captions_train2017.json")
    assert nouns is not None
    found = label_evidence(opened, split, [(name,) for name in protocol.base], nouns.by_image)
    mention = opened.key_inputs(Level.PSEUDO_LABEL)["mention"]
    assert mention > 0
    names, texts = opened.names(Level.NOUN), torch.from_numpy(opened.embeddings(Level.NOUN))
    assert {names[row] for row in opened.key_inputs(Level.PSEUDO_LABEL)["backgrounds"]} == set(GROUNDS)
    wanted, unnamed = list[tuple[float, bool]](), 0
    for image in split.images:
        crops = torch.from_numpy(opened.instances(image.id).base_boxes().embedding).float()
        for fold in range(4):
            for label, crop in zip(image.labels.tolist(), crops, strict=True):
                if label % 4 != fold:
                    continue
                free = [k for k, n in enumerate(names) if n not in BASE or protocol.base.index(n) % 4 == fold]
                cosines = {k: float(torch.nn.functional.cosine_similarity(texts[k], crop, dim=0)) for k in free}
                best = max(free, key=lambda k: cosines[k] + mention * (k in nouns.offered(image.id)))
                unnamed += names[best] in GROUNDS
                if names[best] not in GROUNDS:
                    wanted.append((cosines[best], names[best] == protocol.base[label]))
    assert found.right.tolist() == [right for _, right in wanted]
    np.testing.assert_allclose(found.cosines, [cosine for cosine, _ in wanted], atol=2e-3)  # rows are of float16
    assert (found.classes, found.unnamed) == (len(BASE), unnamed)
    assert unnamed > 5
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


def test_nouns_that_name_no_base_class_fit_nothing(copied_cache: Path, extraction: Config, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("zeppelin\nspoon\n")
    lines = list[str]()
    with lines_to(lines.append):
        extract_clip(extraction(copied_cache, vocabulary=tmp_path / "words.txt", captions=None, features="few"))
    assert [line for line in lines if line.startswith("note: the nouns name no base class")]
    assert FeatureCache(copied_cache, "few").set.label_weights == {}


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
    with pytest.raises(HdovdError, match="names of base classes alone"):
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
    expected = "no file" if change == "gone" else "is not what set default of .* was made from any more"
    with pytest.raises(HdovdError, match=expected):
        calibrate(CalibrateConfig(cache=tmp_path / "cache", out=tmp_path / "c.toml"))


def test_a_set_of_the_papers_rule_is_repaired_by_the_papers_rule(copied_cache: Path, extraction: Config) -> None:
    extract_clip(extraction(copied_cache, labels=LabelRule(), features="paper"))
    sets = Catalog(copied_cache).sets()
    assert "--label-choice mentioned" in extract_command("cache", "paper", sets["paper"].made_from)
    assert "--label-choice likely" in extract_command("cache", "default", sets["default"].made_from)
