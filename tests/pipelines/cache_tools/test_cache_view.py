"""What `gather_view` says of an image, against the tables and embeddings of the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hdovd.cache import Level, Source
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, Protocol, Split, load_protocol
from hdovd.pipelines.cache_tools.view import Reliability, find_reliability, gather_view
from hdovd.pipelines.extraction.config import ExtractConfig, LabelRule
from hdovd.pipelines.extraction.extract_clip import extract_clip

WEIGH = Reliability(0.2, 0.05, 1.3, "a test")


@pytest.fixture(scope="module")
def protocol(world: Path) -> Protocol:
    return load_protocol(str(world / "protocol.toml"))


@pytest.fixture(scope="module")
def split(world: Path, protocol: Protocol) -> Split:
    return DataPaths(world).load("train2017", protocol, base_only=True)


@pytest.fixture(scope="module")
def of_three_nouns(
    extraction: Callable[..., ExtractConfig], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> FeatureCache:
    folder = Path(shutil.copytree(cache, tmp_path_factory.mktemp("top k") / "cache"))
    extract_clip(extraction(folder, labels=LabelRule(3, 0.1), features="three"))
    return FeatureCache(folder, "three")


def _unit(rows: np.ndarray) -> np.ndarray:
    wide = rows.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=-1, keepdims=True))


def test_every_row_of_every_image(cache: Path, split: Split, protocol: Protocol) -> None:
    opened = FeatureCache(cache)
    classes, texts = opened.names(Level.CLASS), _unit(opened.embeddings(Level.CLASS))
    nouns = opened.names(Level.NOUN)
    proposals = 0
    for image in split.images:
        view, rows = (
            gather_view(opened, image.id, image, names=protocol.names, reliability=WEIGH),
            opened.instances(image.id),
        )
        assert (view.image_id, view.size, len(view.rows)) == (image.id, (image.width, image.height), len(rows.box))
        for k, row in enumerate(view.rows):
            cosines = texts @ _unit(rows.embedding[k])
            assert [n.name for n in row.nearest] == [classes[c] for c in np.argsort(-cosines)[:3]]
            assert [n.cosine for n in row.nearest] == pytest.approx(np.sort(cosines)[:-4:-1], abs=1e-5)
            assert row.box == tuple(rows.box[k].tolist())
            if row.source is Source.BASE_BOX:
                label = image.labels[image.annotation_ids.tolist().index(row.annotation_id)]
                assert row.class_name == row.name == protocol.base[label]
                assert row.cosine == pytest.approx(cosines[classes.index(row.name)], abs=1e-5)
                assert (row.nouns, row.weight, row.score) == ((), None, None)
            elif row.nouns:
                proposals += 1
                assert row.name == nouns[rows.noun[k]]
                assert row.cosine == pytest.approx(rows.noun_cosine[k], abs=1e-3)
                assert row.weight == pytest.approx(1.3 / (1 + np.exp((0.2 - row.cosine) / 0.05)))
            else:
                assert (rows.noun[k], row.cosine, row.weight, row.name) == (-1, None, None, "")
    assert proposals > 20


def test_the_cosine_of_several_nouns_is_that_of_their_mean(of_three_nouns: FeatureCache, split: Split) -> None:
    texts, names = _unit(of_three_nouns.embeddings(Level.NOUN)), of_three_nouns.names(Level.NOUN)
    several = 0
    for image in split.images:
        rows = of_three_nouns.instances(image.id)
        for k, row in enumerate(gather_view(of_three_nouns, image.id).rows):
            if len(row.nouns) < 2:
                continue
            several += 1
            share = [n.share for n in row.nouns]
            assert sum(share) == pytest.approx(1, abs=1e-5)
            assert share == sorted(share, reverse=True)
            crop, made_of = _unit(rows.embedding[k]), texts[[names.index(n.name) for n in row.nouns]]
            assert [n.cosine for n in row.nouns] == pytest.approx(made_of @ crop, abs=1e-5)
            assert row.cosine == pytest.approx(_unit(np.array(share) @ made_of) @ crop, abs=1e-5)
            assert row.cosine != pytest.approx(row.nouns[0].cosine, abs=1e-5)
    assert several > 20


def test_what_a_cache_lacks_is_said(
    cache: Path, extraction: Callable[..., ExtractConfig], split: Split, tmp_path: Path
) -> None:
    whole = gather_view(FeatureCache(cache), split.images[0].id)
    assert all(row.class_name is None for row in whole.rows)
    assert any("--calibration" in note for note in whole.notes)
    extract_clip(extraction(tmp_path / "bare", proposals=None, vocabulary=None, captions=None))
    bare = gather_view(FeatureCache(tmp_path / "bare"), split.images[0].id)
    assert [note for note in bare.notes if "no proposals" in note]
    assert {row.source for row in bare.rows} == {Source.BASE_BOX}
    extract_clip(extraction(tmp_path / "bare", vocabulary=None, captions=None, features="plain"))
    plain = gather_view(FeatureCache(tmp_path / "bare", "plain"), split.images[0].id, reliability=WEIGH)
    assert [note for note in plain.notes if "no nouns" in note]
    assert {(row.nouns, row.weight) for row in plain.rows} == {((), None)}
    with pytest.raises(HdovdError, match="no rows of image 4711"):
        gather_view(FeatureCache(cache), 4711)


def test_where_the_weights_come_from(cache: Path, extraction: Callable[..., ExtractConfig], tmp_path: Path) -> None:
    opened = FeatureCache(cache)
    fitted = find_reliability(opened)
    assert fitted is not None
    assert fitted.source == "auto: fitted to the set's base boxes"
    weights = opened.set.label_weights
    assert (fitted.centre, fitted.width, fitted.scale) == (weights["centre"], weights["width"], weights["scale"])
    found = find_reliability(
        opened,
        recipe=load_recipe(
            "demo",
            [
                "pseudo_boxes.reliability_centre=0.4",
                "pseudo_boxes.reliability_width=0.1",
                "pseudo_boxes.reliability_scale=2",
            ],
        ),
    )
    assert found == Reliability(0.4, 0.1, 2.0, "the recipe")
    assert found.weight(0.4) == 1.0
    extract_clip(extraction(tmp_path / "bare", vocabulary=None, captions=None))
    bare = FeatureCache(tmp_path / "bare")
    assert find_reliability(bare) is None  # a random CLIP is in no table, and there are no nouns to fit to
    with pytest.raises(HdovdError, match="hdovd calibrate"):
        find_reliability(bare, recipe=load_recipe("ov-coco-faster-rcnn-r50"))
