"""Pseudo labels: the best nouns of a crop and u, against values computed by hand; and labels of several nouns all the
way to training.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hdovd.cache import Catalog, Level, Product
from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.core import HdovdError
from hdovd.data import DataPaths, ImageBoxes, load_protocol, load_split
from hdovd.pipelines.cache_tools.config import CheckConfig
from hdovd.pipelines.cache_tools.verify import check_cache
from hdovd.pipelines.dataloading.loader import Draw
from hdovd.pipelines.extraction.config import ExtractConfig, LabelChoice, LabelRule
from hdovd.pipelines.extraction.export import ExportConfig, export_tars, import_tars
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.extraction.pseudo_labels import (
    barred_in,
    best_nouns,
    label_texts,
    prior,
    rows_of_classes,
    rule_line,
    settled,
)
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.training.training_set import TarTrainingSet, TrainingSet

Config = Callable[..., ExtractConfig]
NOUNS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])


def test_the_best_noun_weighs_one() -> None:
    found, weights, cosine = best_nouns(torch.tensor([[0.0, 1.0], [0.8, 0.6]]), NOUNS, LabelRule())
    assert found.tolist() == [[2], [1]]
    assert weights.tolist() == [[1], [1]]
    torch.testing.assert_close(cosine, torch.tensor([1.0, 0.96]))


def test_several_nouns_by_hand() -> None:
    """Cosines of the crop: 0.8, 0.96, 0.6; at temperature 0.1 the best two weigh e^9.6 to e^8."""
    found, weights, cosine = best_nouns(torch.tensor([[0.8, 0.6]]), NOUNS, LabelRule(2, 0.1))
    first = 1 / (1 + np.exp(-1.6))
    assert found.tolist() == [[1, 0]]
    torch.testing.assert_close(weights, torch.tensor([[first, 1 - first]], dtype=torch.float32))
    torch.testing.assert_close(cosine, torch.tensor([0.96]))
    mean = np.array([0.6 * first + (1 - first), 0.8 * first])
    torch.testing.assert_close(
        label_texts(NOUNS, found, weights)[0], torch.tensor(mean / np.linalg.norm(mean), dtype=torch.float32)
    )


def test_what_is_most_like_a_background_has_no_label() -> None:
    """Cosines of the crops: 0.8, 0.96, 0.6 and 0, 0.8, 1."""
    crops = torch.tensor([[0.8, 0.6], [0.0, 1.0]])
    found, weights, cosine = best_nouns(crops, NOUNS, LabelRule(backgrounds=(1,)))
    assert (found.tolist(), weights.tolist(), cosine.tolist()) == ([[-1], [2]], [[0], [1]], [0, 1])
    found, weights, _ = best_nouns(crops, NOUNS, LabelRule(3, 0.1, backgrounds=(1,)))
    assert found.tolist() == [[-1, -1, -1], [2, -1, 0]]  # nor is one a part of what another crop is called
    torch.testing.assert_close(weights[1], torch.tensor([1, 0, np.exp(-10)]) / (1 + np.exp(-10)), check_dtype=False)
    assert not weights[0].any()
    rule = LabelRule(choice=LabelChoice.LIKELY, barred=(0,), mention=0.5, backgrounds=(1, 2))
    assert LabelRule.of(rule.inputs()) == rule
    assert "backgrounds" not in LabelRule(barred=(0,), mention=0.5).inputs()


def test_a_mentioned_noun_ranks_higher_and_a_barred_one_never() -> None:
    """Cosines of the crop: 0.8, 0.96, 0.6."""
    crop = torch.tensor([[0.8, 0.6]])
    offered: list[tuple[int, ...] | None] = [(0,), (2,), (), None, (1,)]

    def best(rule: LabelRule) -> list[tuple[list[int], list[float], float]]:
        found = [best_nouns(crop, NOUNS, rule, prior(own, 3, rule)) for own in offered]
        return [(nouns[0].tolist(), weights[0].tolist(), float(cosine)) for nouns, weights, cosine in found]

    likely = LabelRule(choice=LabelChoice.LIKELY, mention=0.2)
    assert [nouns for nouns, _, _ in best(likely)] == [[0], [1], [1], [1], [1]]
    barred = LabelRule(choice=LabelChoice.LIKELY, mention=0.3, barred=(1,))
    assert [nouns for nouns, _, _ in best(barred)] == [[0], [2], [0], [0], [0]]
    cosines = [cosine for _, _, cosine in best(barred)]
    assert cosines == pytest.approx([0.8, 0.6, 0.8, 0.8, 0.8])  # without what a mention adds
    only = best(LabelRule(2))
    assert [nouns for nouns, _, _ in only] == [[0, -1], [2, -1], [-1, -1], [1, 0], [1, -1]]
    assert [sum(weights) for _, weights, _ in only] == pytest.approx([1, 1, 0, 1, 1])
    assert only[2][2] == 0


def test_what_base_boxes_say_of_mentions_and_of_their_own_names() -> None:
    """Cats are mentioned in 2 of 3 pictures with one and in 1 of 2 without; no noun names dogs. Counts begin at one."""
    split = [_labelled(number, labels) for number, labels in enumerate(([0], [0, 1], [0], [1], [1]))]
    vocabulary = ("Cats", "kite", "tomcat", "Bricks")
    nouns = Nouns(vocabulary, {0: (0, 1), 1: (2,), 2: (1,), 3: (0,)})
    names = [("cat", "tomcat"), ("dog",)]
    rule = settled(LabelRule(choice=LabelChoice.LIKELY), nouns, split, names, 0.1)
    assert (rule.barred, rule.backgrounds) == ((0, 2), (3,))
    assert rule.mention == pytest.approx(0.1 * np.log((3 / 2) / (2 / 2)), abs=1e-4)
    assert settled(LabelRule(), nouns, split, names, 0.1) == LabelRule()
    everywhere = settled(LabelRule(choice=LabelChoice.LIKELY), Nouns(vocabulary, None), split, names, 0.1)
    assert (everywhere.barred, everywhere.mention) == ((0, 2), None)
    assert LabelRule.of(rule.inputs()) == rule
    assert rule_line(rule, nouns).endswith("cosine; what is most like a background gets no label (Bricks)")
    assert settled(rule, nouns, split, [("brick",)], 0.1).backgrounds == ()  # a base class of that name is an object
    with pytest.raises(HdovdError, match=r"names of base classes, .* alone: .*--label-choice mentioned"):
        settled(rule, Nouns(("cat",), None), split, names, 0.1)


def _labelled(number: int, labels: list[int], judged: list[bool] | None = None) -> ImageBoxes:
    boxes = np.tile(np.array([[0, 0, 9, 9]], np.float32), (len(labels), 1))
    known = None if judged is None else np.array(judged)
    return ImageBoxes(number, f"{number}.jpg", 10, 10, boxes, np.array(labels), np.arange(len(labels)), known)


def test_federated_names_of_base_classes_are_barred_where_their_objects_have_boxes() -> None:
    vocabulary, names = ("cat", "tree", "dogs", "tomcat"), [("cat", "tomcat"), ("dog",)]
    nouns, likely = Nouns(vocabulary, None), LabelRule(choice=LabelChoice.LIKELY)
    images = [_labelled(7, [0], [True, False]), _labelled(3, [], [False, False]), _labelled(5, [1], [True, True])]
    assert barred_in(likely, nouns, images, names) == {7: (0, 3), 3: (), 5: (0, 2, 3)}
    assert barred_in(LabelRule(), nouns, images, names) is None
    assert barred_in(likely, nouns, [_labelled(7, [0])], names) is None
    rule = settled(likely, nouns, images, names, 0.1)
    assert rule.barred == (0, 2, 3)
    assert LabelRule.of(rule.inputs()) == rule
    assert rule.judged is not None
    assert settled(likely, nouns, images[:2], names, 0.1).judged != rule.judged
    assert "judged" not in settled(likely, nouns, [_labelled(7, [0])], names, 0.1).inputs()
    assert "in an image that is judged by their class" in rule_line(rule, nouns)
    everything, none = torch.tensor([0.0] * 4), -torch.inf
    assert torch.equal(prior(None, 4, rule, ()), everything)
    assert prior(None, 4, rule, (0, 3)).tolist() == [none, 0.0, 0.0, none]
    assert prior(None, 4, rule).tolist() == [none, 0.0, none, none]


def test_a_list_that_is_shorter_gives_all_it_has() -> None:
    found, weights, _ = best_nouns(torch.tensor([[0.8, 0.6]]), NOUNS[:1], LabelRule(3))
    assert found.tolist() == [[0]]
    assert weights.tolist() == [[1]]
    filled = label_texts(NOUNS, torch.tensor([[0, -1, -1]]), torch.tensor([[1.0, 0.0, 0.0]]))
    torch.testing.assert_close(filled, NOUNS[:1])


@pytest.mark.parametrize(
    ("rule", "option"),
    [
        ((0, 0.1), "--label-top-k 0"),
        ((2, 0.0), "--label-temperature 0"),
        ((2, float("nan")), "--label-temperature nan"),
    ],
)
def test_senseless_rules_are_refused(rule: tuple[int, float], option: str) -> None:
    with pytest.raises(HdovdError, match=option):
        LabelRule(*rule)


def test_several_nouns_need_a_vocabulary(tmp_path: Path, extraction: Config) -> None:
    with pytest.raises(
        HdovdError,
        match="--label-top-k and --verdicts are of pseudo labels, and there are none without --nouns or --vocabulary",
    ):
        extraction(tmp_path, vocabulary=None, captions=None, labels=LabelRule(2))


# --- in the cache ---


@pytest.fixture(scope="module")
def two_ways(cache: Path, extraction: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the session's cache with the sets `plain`, of labels by the paper's rule, and `top`, of three nouns."""
    import shutil

    folder = Path(shutil.copytree(cache, tmp_path_factory.mktemp("labels") / "cache"))
    extract_clip(extraction(folder, labels=LabelRule(), features="plain"))
    extract_clip(extraction(folder, labels=LabelRule(3, 0.02), features="top"))
    return folder


def test_one_noun_has_the_arrays_and_the_identity_that_it_had(two_ways: Path) -> None:
    sets, catalog = Catalog(two_ways).sets(), Catalog(two_ways)
    one, many = (
        Product(catalog.folder, Level.PSEUDO_LABEL, sets[name].levels[Level.PSEUDO_LABEL]) for name in ("plain", "top")
    )
    assert one.key_inputs.keys() == {"schema_version", "instance", "noun", "offered", "sources"}
    assert one.row_objects(0).keys() == {"noun", "noun_cosine"}
    assert one.dim == 0
    assert "labels" not in sets["plain"].made_from
    assert sets["default"].made_from["labels"] == {"choice": "likely"}
    assert many.key_inputs == one.key_inputs | {"top_k": 3, "temperature": 0.02}
    np.testing.assert_array_equal(many.table("noun"), one.table("noun"))
    np.testing.assert_allclose(many.table("noun_cosine"), one.table("noun_cosine"), atol=1e-6)
    others = {level: key for level, key in sets["top"].levels.items() if level is not Level.PSEUDO_LABEL}
    assert others == {level: key for level, key in sets["plain"].levels.items() if level is not Level.PSEUDO_LABEL}


def test_other_labels_and_other_nouns_ask_clip_for_no_picture(
    copied_cache: Path, extraction: Config, counting: Any, tmp_path: Path
) -> None:
    extract_clip(extraction(copied_cache, labels=LabelRule(2), features="two"), counting)
    assert (counting.batches, counting.names) == ([], [])
    (tmp_path / "words.txt").write_text("car\nstar\n")
    extract_clip(extraction(copied_cache, vocabulary=tmp_path / "words.txt", features="words"), counting)
    assert (counting.batches, counting.names) == ([], ["car", "star"])


def test_weights_follow_from_the_stored_rows(two_ways: Path, kept: list[int]) -> None:
    reader, seen = FeatureCache(two_ways, "top"), 0
    nouns = reader.embeddings(Level.NOUN)
    for image in kept:
        rows = reader.instances(image)
        assert (rows.base_boxes().top_noun == -1).all()
        assert not rows.base_boxes().top_weight.any()
        for row in range(len(rows.noun)):
            offered = rows.top_noun[row][rows.top_noun[row] >= 0]
            if not len(offered):
                continue
            cosines = nouns[offered] @ rows.embedding[row].astype(np.float32)
            assert (np.diff(cosines) <= 1e-6).all()
            wanted = np.exp((cosines - cosines.max()) / 0.02)
            np.testing.assert_allclose(rows.top_weight[row][: len(offered)], wanted / wanted.sum(), atol=1e-4)
            seen += len(offered) > 1
    assert seen > 50


def test_verify_knows_them(two_ways: Path) -> None:
    assert not check_cache(CheckConfig(cache=two_ways)).findings
    product = Product(
        Catalog(two_ways).folder, Level.PSEUDO_LABEL, Catalog(two_ways).sets()["top"].levels[Level.PSEUDO_LABEL]
    )
    assert product.row_objects(0).keys() == {"noun", "noun_cosine", "top_noun", "top_weight"}


def test_training_takes_u_of_all_of_them_from_the_cache_and_from_tar_shards(
    two_ways: Path, world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    protocol = load_protocol(str(world / "protocol.toml"))
    split = load_split(
        world / "annotations" / "instances_train2017.json", world / "train2017", protocol, base_only=True
    )
    recipe, reader = micro_recipe("input.flip=0.0"), FeatureCache(two_ways, "top")
    data = TrainingSet(split, reader, recipe)
    export_tars(
        ExportConfig(
            cache=two_ways,
            out=tmp_path / "shards",
            data=DataPaths(world),
            protocol=str(world / "protocol.toml"),
            features="top",
            samples=8,
        )
    )
    tars = TarTrainingSet(str(tmp_path / "shards"), protocol, recipe)
    nouns, several = reader.embeddings(Level.NOUN), 0
    for index, image in enumerate(data.images):
        rows = reader.instances(image.id).proposals()
        rows = rows.select(rows.noun >= 0)
        wanted = (nouns[rows.top_noun] * rows.top_weight[..., None]).sum(axis=1)
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        texts = data[Draw(0, 0, index)][1].pseudo_texts
        np.testing.assert_allclose(texts, wanted, atol=1e-5)
        torch.testing.assert_close(tars[Draw(0, 0, index)][1].pseudo_texts, texts)
        several += int((abs(texts.numpy() - nouns[rows.noun]).max(axis=1) > 1e-3).sum()) if len(rows.noun) else 0
    assert several > 20
    import_tars(tmp_path / "shards", tmp_path / "back")
    again = FeatureCache(tmp_path / "back", "top")
    assert again.key(Level.PSEUDO_LABEL) == reader.key(Level.PSEUDO_LABEL)
    np.testing.assert_array_equal(
        again.instances(data.images[3].id).top_weight, reader.instances(data.images[3].id).top_weight
    )


def test_a_set_remembers_its_rule(extraction: Config, tmp_path: Path) -> None:
    config = extraction(tmp_path, labels=LabelRule(4, 0.5))
    assert ExtractConfig.from_dict(config.to_dict(), tmp_path).labels == LabelRule(4, 0.5)
    assert "labels" not in extraction(tmp_path, labels=LabelRule(1, 0.5)).to_dict()


def test_what_lvis_adds_in_brackets_does_not_tell_a_noun_from_a_class() -> None:
    vocabulary = ("cars", "bow tie", "monitor", "(odd)")
    names = [("car_(automobile)",), ("bow-tie",), ("monitor_(computer_equipment)", "x"), ("(odd)",), ("bow_(weapon)",)]
    assert rows_of_classes(vocabulary, names) == [{0}, {1}, {2}, {3}, set()]
