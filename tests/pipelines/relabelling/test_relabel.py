"""A round: what a run finds and names on the training images becomes a new set of its cache, of which the next run is
trained; base boxes and novel annotations take no part; a killed round goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_scenes import check_of, report_of
from torchvision.ops import box_iou

from hdovd.cache import Catalog, Level, Source
from hdovd.cache.identity import sealed
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, Stopped, lines_to
from hdovd.data import DataPaths, ImageBoxes
from hdovd.modeling.base import build_detector
from hdovd.modeling.boxes import combine_scores
from hdovd.pipelines.audit.checks import Verdict
from hdovd.pipelines.demo.world import BASE, GROUNDS
from hdovd.pipelines.evaluation.evaluate import read_pixels
from hdovd.pipelines.extraction.extract_clip import extract_clip
from hdovd.pipelines.proposal_files.file import read_table
from hdovd.pipelines.proposals import propose as proposal_parts
from hdovd.pipelines.proposals.propose import USUAL, Selection
from hdovd.pipelines.relabelling.config import RelabelConfig, next_round
from hdovd.pipelines.relabelling.relabel import Round, _best, _to_find, objects_per_mention, relabel
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.train import TrainConfig, train


@pytest.fixture(scope="module")
def scene(
    training_cache: Path, distilled: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, RelabelConfig, list[str]]:
    """A cache with a second round in it, what was asked for, and what was said."""
    folder = tmp_path_factory.mktemp("round")
    cache = Path(shutil.copytree(training_cache, folder / "cache"))
    config, lines = RelabelConfig(run=distilled.path, cache=cache, out=folder / "r.npz", device="cpu"), list[str]()
    with lines_to(lines.append):
        report, name = relabel(config)
    assert report.whole
    assert name == "default-round2"
    return cache, config, lines


def verdicts_of(config: RelabelConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in config.verdicts.read_text().splitlines()]


def test_the_boxes_are_the_likeliest_objects_beside_base_boxes(
    scene: tuple[Path, RelabelConfig, list[str]], distilled: RunFolder, world: Path
) -> None:
    """Counted once more by the model itself: of all boxes that overlap neither a base box nor a better one, the best
    for each noun of the image's captions, and then the likeliest objects, until there are as many for each such noun
    as base boxes for each named base class.
    """
    cache, config, lines = scene
    before, after = FeatureCache(cache), FeatureCache(cache, "default-round2")
    found = read_table(config.proposals).by_image()
    count = sum(map(len, (own.boxes for own in found.values())))
    assert sum(after.counts(Source.PROPOSAL).values()) == count
    protocol = distilled.protocol()
    split = DataPaths(world).load("train2017", protocol, base_only=True)
    model = build_detector(distilled.recipe(), before.dim, initialise=False)
    distilled.load_model(model)
    nouns = before.names(Level.NOUN)
    others = [k for k, name in enumerate(nouns) if name not in (*BASE, *GROUNDS)]
    captions = json.loads((world / "annotations" / "captions_train2017.json").read_text())["annotations"]
    said = {one["image_id"]: set(one["caption"].lower().replace(".", "").split()) for one in captions}
    texts = torch.cat(
        [distilled.class_embeddings()[: len(BASE)], torch.from_numpy(before.embeddings(Level.NOUN))[others]]
    )
    every, named, recipe, offered = list[float](), dict[int, list[Any]](), distilled.recipe(), 0
    size, is_noun = recipe.train.batch_size, torch.arange(len(texts)) >= len(BASE)
    for first in range(0, len(split.images), size):  # padding reaches into what is found
        some = split.images[first : first + size]
        for image, one in zip(
            some, model.eval().predict([read_pixels(split, image) for image in some], texts), strict=True
        ):
            objects = one.class_probability[:, :-1].sum(dim=1)
            assert one.distillation_score is not None
            shares = recipe.inference.alpha, recipe.inference.beta
            scores = combine_scores(one.class_probability, one.distillation_score, is_noun, *shares)
            scores, base = scores[:, len(BASE) : -1], torch.from_numpy(image.boxes)
            best, ranks = scores.argmax(dim=1), objects.clone()
            free = (box_iou(one.boxes, base) <= USUAL.overlap).all(dim=1)
            free &= (one.boxes[:, 2:] - one.boxes[:, :2] >= USUAL.min_side).all(dim=1)
            likely = texts @ torch.from_numpy(before.instances(image.id).base_boxes().embedding).float().T
            least = likely[: len(BASE)].amax(dim=0)
            mine = [k for k, row in enumerate(others) if nouns[row] in said[image.id]]
            mine = [k for k in mine if (likely[len(BASE) + k] <= least).all()]
            for k in sorted(mine, key=lambda k: scores[free, k].max(), reverse=True):
                row = int(torch.where(free, scores[:, k], -1).argmax())
                best[row], ranks[row] = k, ranks[row] + 1
                free = free & (box_iou(one.boxes, one.boxes[[row]])[:, 0] <= USUAL.overlap)
            offered += len(mine)
            keep = USUAL.keep(one.boxes, ranks, base)
            every += ranks[keep].tolist()
            named[image.id] = [(one.boxes[k], nouns[others[int(best[k])]]) for k in keep]
    scores = np.concatenate([own.scores for own in found.values()])
    expected = np.sort(every)[-len(scores) :]
    assert 0 < offered == int((expected > 1).sum()) < len(scores)
    mentions = [
        sum(name in said[image.id] for name in {protocol.base[label] for label in image.labels.tolist()})
        for image in split.images
    ]
    assert count == min(round(offered * sum(len(image.boxes) for image in split.images) / sum(mentions)), len(every))
    np.testing.assert_allclose(np.sort(scores), np.sort(np.where(expected > 1, expected - 1, expected)), atol=1e-5)
    for verdict in verdicts_of(config):
        assert not set(verdict["names"]) & {*BASE, *GROUNDS}
        x, y, w, h = verdict["bbox"]
        box = torch.tensor([x, y, x + w, y + h])
        own = [name for other, name in named[verdict["image_id"]] if (other - box).abs().max() < 0.1]
        assert own == [max(verdict["names"], key=verdict["names"].get)]
    assert any(f"({sum(before.counts(Source.PROPOSAL).values()):,d} before)" in line for line in lines)


def test_a_noun_of_the_captions_has_its_best_box_however_low_its_score() -> None:
    boxes = torch.tensor([[0, 0, 30, 30], [0, 0, 30, 20], [40, 0, 70, 30], [0, 40, 30, 70], [80, 0, 85, 30]]).float()
    scores = torch.tensor(  # of an object; of a key, a star, a heart
        [[0.9, 0.2, 0.6, 0.1], [0.3, 0.7, 0.5, 0.1], [0.2, 0.1, 0.4, 0.3], [0.1, 0.0, 0.1, 0.2], [0.9, 0.9, 0.9, 0.9]]
    )
    image = ImageBoxes(7, "", 100, 100, np.zeros((1, 4), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64))
    kept = Round(Selection(10, 0.2, 8.0, 0.0), ["key", "star", "heart"], {7: [0, 1, 2]})
    found, ranks, names = kept(image, boxes, scores)
    # The second is the key, so that the first, which it overlaps, is no star; the last one is too narrow.
    assert found.tolist() == boxes[[1, 2, 3]].tolist()
    assert ranks.tolist() == pytest.approx([1.3, 1.2, 1.1])
    # Odds of there being no object: of scores of 0.3, 0.2 and 0.1.
    assert names == [({"key": 1.0}, 0.0, 2.333), ({"star": 1.0}, 0.0, 4.0), ({"heart": 1.0}, 0.0, 9.0)]
    found, ranks, names = replace(kept, offered={7: [2]})(image, boxes, scores)
    assert found.tolist() == boxes[[2, 0, 3]].tolist()
    assert ranks.tolist() == pytest.approx([1.2, 0.9, 0.1])
    assert [max(one, key=lambda name: one[name]) for one, *_ in names] == ["heart", "star", "heart"]
    assert [ground for *_, ground in names] == [4.0, pytest.approx(0.1), 2.7]  # against the sum of names
    assert replace(kept, offered={})(image, boxes, scores)[1].tolist() == pytest.approx([0.9, 0.2, 0.1])
    assert kept(image, boxes[:1], scores[:1] * 0)[1] > 1
    assert replace(kept, offered={})(image, boxes[:1], scores[:1] * 0 + 1.0000001)[1] == 1  # a sum of probabilities
    nothing = kept(image, boxes[4:], scores[4:])
    assert (len(nothing[0]), len(kept(image, boxes[:0], scores[:0])[0])) == (0, 0)


def test_backgrounds_count_against_all_names_those_that_are_not_written_too() -> None:
    image = ImageBoxes(7, "", 100, 100, np.zeros((1, 4), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64))
    kept = Round(Selection(10, 0.2, 8.0, 0.0), [f"noun {number}" for number in range(30)], {})
    _, _, [(names, others, background)] = kept(
        image, torch.tensor([[0.0, 0.0, 30.0, 30.0]]), torch.tensor([[0.9, *[0.03] * 30]])
    )
    assert (len(names), others, background) == (20, 0.03, 0.1)


def test_objects_are_counted_for_each_named_class_of_an_image(distilled: RunFolder, world: Path) -> None:
    split = DataPaths(world).load("train2017", distilled.protocol(), base_only=True)
    first = next(image for image in split.images if len({*image.labels.tolist()}) == 2)
    one, two = dict.fromkeys(first.labels.tolist())
    of_class = [{10 + label, 40 + label} for label in range(len(BASE))]
    own = replace(split, images=[first])
    assert objects_per_mention(own, of_class, {first.id: [10 + one, 40 + one, 99]}) == len(first.boxes)
    assert objects_per_mention(own, of_class, {first.id: [10 + one, 40 + two]}) == len(first.boxes) / 2
    assert objects_per_mention(own, of_class, {first.id: [99], 0: [10]}) is None


def test_a_noun_that_a_base_box_is_likelier_to_be_than_any_base_class_is_not_looked_for(
    training_cache: Path, distilled: RunFolder, world: Path
) -> None:
    """The captions may mean that box: "a man" may be the person that has one."""
    cache = FeatureCache(training_cache)
    split = DataPaths(world).load("train2017", distilled.protocol(), base_only=True)
    first, second = [image for image in split.images if len(image.boxes) == 1][:2]
    its, other = (
        torch.from_numpy(cache.instances(image.id).base_boxes().embedding).float() for image in (first, second)
    )
    texts = torch.cat([other, its, -its])  # one base class, two nouns
    found = _to_find(cache, split, texts, [4, 9], {first.id: [4, 2, 9], second.id: [4]})  # 2 is the class's own
    assert (found[first.id], found[second.id]) == ([1], [0])
    assert {image.id for image in split.images} == found.keys()
    assert _to_find(cache, split, texts, [4, 9], {}) == {}


def test_the_set_says_where_it_came_from_and_the_audit_proves_it(
    scene: tuple[Path, RelabelConfig, list[str]], world: Path, distilled: RunFolder
) -> None:
    cache, config, _ = scene
    features = FeatureCache(cache, "default-round2").set
    made_by = features.proposals["made_by"]
    assert features.proposals["verdicts"] == {"file": config.verdicts.name, "sha256": made_by["verdicts_sha256"]}
    assert (made_by["run"], made_by["round"]) == (str(distilled.path.resolve()), 2)
    assert set(made_by["training_boxes"]) <= set(BASE)
    report = report_of(world, cache, features="default-round2")
    for name in ("proposals: made by", "verdicts: made by"):  # the micro world's first proposals are of nobody known
        assert check_of(report, name).verdict is (Verdict.UNKNOWN if name.startswith("p") else Verdict.OK)
    assert "the round before: what made its proposals is not known" in check_of(report, "proposals: made by").text
    first = {key: made_by[key] for key in ("detector", "training_boxes", "protocol", "annotations")}
    known = made_by | {"before": {"made_by": first}}

    def judged(record: dict[str, Any]) -> Verdict:
        changed = features.to_tree()
        changed["proposals"] = changed["proposals"] | {"made_by": record}
        Catalog(cache).folder.write("sets/changed.json", json.dumps(sealed(changed)).encode())
        found = report_of(world, cache, features="changed")
        return check_of(found, "proposals: made by").verdict

    assert judged(known) is Verdict.OK
    assert judged(known | {"oracle": True}) is Verdict.LEAK
    assert judged(known | {"init": "other run"}) is Verdict.UNKNOWN
    assert judged(known | {"before": {"made_by": first | {"training_boxes": {"key": 3}}}}) is Verdict.LEAK
    assert judged(known | {"before": {"made_by": first, "verdicts": {"sha256": "0"}}}) is Verdict.UNKNOWN
    named = {"made_by": first | {"verdicts_sha256": "0"}, "verdicts": {"sha256": "0"}}
    assert judged(known | {"before": named}) is Verdict.OK
    for lost in ("before", "init", "oracle"):  # what is not recorded is not passed
        assert judged({key: value for key, value in known.items() if key != lost}) is Verdict.UNKNOWN
    changed = features.to_tree()
    del changed["proposals"]["verdicts"]
    Catalog(cache).folder.write("sets/changed.json", json.dumps(sealed(changed)).encode())
    assert check_of(report_of(world, cache, features="changed"), "verdicts: made by").verdict is Verdict.UNKNOWN
    Catalog(cache).folder.delete("sets/changed.json")


def test_the_next_run_is_trained_from_it(
    scene: tuple[Path, RelabelConfig, list[str]], world: Path, tmp_path: Path, micro_recipe: Any
) -> None:
    cache, _, lines = scene
    run = train(
        TrainConfig(
            data=DataPaths(world),
            cache=cache,
            out=tmp_path / "run",
            recipe=micro_recipe(),
            protocol=str(world / "protocol.toml"),
            features="default-round2",
            device="cpu",
        )
    )
    third = RelabelConfig(run=run.path, cache=cache, device="cpu")
    _, name = relabel(third)
    assert name == "default-round3"
    made_by = FeatureCache(cache, name).set.proposals["made_by"]
    assert (made_by["round"], made_by["before"]["made_by"]["round"]) == (3, 2)
    assert third.proposals == run.path / "relabelled.json"
    assert any(line.startswith("labels of ") for line in lines)


def test_a_killed_round_goes_on_and_a_done_one_is_not_done_again(
    scene: tuple[Path, RelabelConfig, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, config, _ = scene
    again = RelabelConfig(run=config.run, cache=cache, out=tmp_path / "r.npz", features="again", device="cpu")
    monkeypatch.setattr(proposal_parts, "IMAGES", 8)
    write, seen = proposal_parts.Parts.write, list[int]()

    def write_or_die(self: proposal_parts.Parts, part: int, found: Any, **told: Any) -> None:
        if part == 1 and not seen:
            raise Stopped("killed", 75)
        write(self, part, found, **told)

    look = proposal_parts.found_in

    def counted(pictures: Any, numbers: list[int], *rest: Any) -> Iterator[Any]:
        seen.extend(numbers)
        return look(pictures, numbers, *rest)

    monkeypatch.setattr(proposal_parts.Parts, "write", write_or_die)
    with pytest.raises(Stopped):
        relabel(again)
    monkeypatch.setattr(proposal_parts, "found_in", counted)
    relabel(again)
    assert seen
    assert min(seen) >= 8
    assert again.verdicts.read_bytes() == config.verdicts.read_bytes()
    assert read_table(again.proposals).identity() == read_table(config.proposals).identity()
    seen.clear()
    lines = list[str]()
    with lines_to(lines.append):
        relabel(again)
    assert not seen
    assert f"{again.proposals}: the boxes and names of this round are there" in lines
    assert not (tmp_path / "r.parts").exists()


def changed_run(run: Path, folder: Path, **changes: Any) -> Path:
    copy = Path(shutil.copytree(run, folder))
    record = {name: value for name, value in json.loads((copy / "run.json").read_text()).items() if name != "sha256"}
    (copy / "run.json").write_text(json.dumps(sealed(record | changes)))
    return copy


def test_refusals(
    scene: tuple[Path, RelabelConfig, list[str]], distilled: RunFolder, world: Path, extraction: Any, tmp_path: Path
) -> None:
    cache, _, _ = scene

    def refused(**given: Any) -> str:
        with pytest.raises(HdovdError) as error:
            relabel(RelabelConfig(**({"run": distilled.path, "cache": cache, "device": "cpu"} | given)))
        return str(error.value)

    oracle = changed_run(distilled.path, tmp_path / "oracle", oracle=True)
    assert f"{oracle} is an oracle, which saw boxes of novel classes" in refused(run=oracle)
    begun = changed_run(distilled.path, tmp_path / "begun", init={"run": "x", "sha256": "y", "oracle": True})
    assert "is an oracle" in refused(run=begun)
    extract_clip(extraction(tmp_path / "other", templates=("a drawing of a {}",)))
    assert "has no set of features with the products that the run was trained from" in refused(cache=tmp_path / "other")
    assert "set default of" in refused(features="default")
    other = tmp_path / "of another run"
    shutil.copytree(distilled.path, other)
    assert "set default-round2 of" in refused(run=other)  # another run's round is not replaced
    (tmp_path / "mine.json").write_text('[{"image_id": 1, "bbox": [0, 0, 9, 9], "score": 1}]')
    assert "hdovd relabel did not write it" in refused(out=tmp_path / "mine.json", features="mine")
    text = (world / "protocol.toml").read_text()
    (tmp_path / "p.toml").write_text(text.replace('"key", ', "").replace("base = [", 'base = ["key", '))
    assert "has other base classes than" in refused(protocol=str(tmp_path / "p.toml"), features="mine")
    assert "--pretrained goes with --clip" in refused(pretrained="openai")
    assert "--features '../x': expected" in refused(features="../x")
    assert "is no run" in refused(run=tmp_path)
    assert "expected a file whose name ends in" in refused(out=tmp_path / "x.txt")
    assert "no feature cache at" in refused(cache=tmp_path / "nothing")
    assert not (distilled.path / "relabelled.json").exists()


def test_names_beyond_the_best_count_as_the_next_one() -> None:
    nouns = [f"noun {number}" for number in range(30)]
    names, others = _best(torch.linspace(0.0, 0.29, 30), nouns)
    assert list(names) == nouns[:9:-1]
    assert (names["noun 29"], names["noun 10"], others) == (0.29, 0.1, 0.09)
    assert _best(torch.tensor([0.0, 0.5]), nouns[:2]) == ({"noun 1": 0.5}, 0.0)
    assert _best(torch.zeros(30), nouns) == ({}, 0.0)


def test_rounds_are_counted() -> None:
    assert next_round("default") == ("default-round2", 2)
    assert next_round("a-round2") == ("a-round3", 3)
    assert next_round("a-round9b") == ("a-round9b-round2", 2)
