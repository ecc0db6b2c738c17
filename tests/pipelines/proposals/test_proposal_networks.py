"""Trained proposal networks as files: taken again, refused, told apart, and counted by recall."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hdovd.config.recipe import Recipe, ScheduleConfig
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths, ImageBoxes, Skips, Split, load_protocol
from hdovd.modeling.backbones.pyramid import build_backbone
from hdovd.pipelines.common.tensors import tensors_hash
from hdovd.pipelines.demo.world import BASE
from hdovd.pipelines.proposals.config import Detector, ProposeConfig
from hdovd.pipelines.proposals.networks import (
    Recall,
    load_network,
    made_by,
    recall_report,
    recall_table,
    save_network,
    settings,
    without_crowds,
)
from hdovd.pipelines.proposals.propose import propose

Made = tuple[ProposeConfig, list[str]]


@pytest.fixture(scope="module")
def made(world: Path, micro_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> ProposeConfig:
    """A job that is done: p.json and p.oln.safetensors."""
    out = tmp_path_factory.mktemp("made") / "not there yet" / "p.json"
    job = ProposeConfig(
        data=DataPaths(world),
        out=out,
        recipe=micro_recipe(),
        protocol=str(world / "protocol.toml"),
        device="cpu",
        top=6,
    )
    propose(job)
    return job


@pytest.fixture
def network(made: ProposeConfig) -> Path:
    return made.beside("oln.safetensors")


def test_the_same_settings_take_the_network_that_is_there(made: ProposeConfig, network: Path) -> None:
    before, proposals, said = network.stat().st_mtime_ns, made.out.read_bytes(), list[str]()
    with lines_to(said.append):
        propose(made)
    assert network.stat().st_mtime_ns == before
    assert made.out.read_bytes() == proposals
    assert any("trained with these settings before" in line for line in said)


def test_the_backbone_is_kept_with_what_made_it(made: ProposeConfig, network: Path, tmp_path: Path) -> None:
    file = tmp_path / "b.safetensors"
    propose(replace(made, out=tmp_path / "p.json", checkpoint=(network,), backbone_out=file))
    with safe_open(file, "pt") as tensors:
        assert json.loads(tensors.metadata()["made_by"]) == made_by(network)
    config = made.recipe.detector.backbone.model_copy(update={"weights": str(file)})
    loaded = build_backbone(config).body.state_dict()  # a detector starts from it
    assert all(torch.equal(value, loaded[name]) for name, value in load_file(file).items())


def test_other_settings_are_refused_and_named(
    made: ProposeConfig, network: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    before = network.read_bytes()
    with pytest.raises(
        HdovdError, match=r"p\.oln\.safetensors was made otherwise:(.|\n)*recipe\.train\.lr differs(.|\n)*--overwrite"
    ):
        propose(replace(made, recipe=micro_recipe("train.lr=0.001")))
    assert network.read_bytes() == before
    propose(replace(made, recipe=micro_recipe("train.workers=1")))  # which change nothing
    assert network.read_bytes() == before


def test_a_key_that_came_later_is_told_where_it_is_not_the_default(
    made: ProposeConfig, network: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    """Files of before there was such a key are those of its default."""
    assert made_by(network)["recipe"]["train"].keys() == {
        name for name, field in ScheduleConfig.model_fields.items() if field.is_required()
    } - {"workers"}
    with pytest.raises(HdovdError, match=r"recipe\.train\.accumulate"):
        propose(replace(made, recipe=micro_recipe("train.accumulate=2")))


def test_others_may_read_the_network(network: Path, made: ProposeConfig) -> None:
    """safetensors makes files for their owner alone."""
    (plain := made.out.with_name("plain")).touch()
    assert network.stat().st_mode == plain.stat().st_mode
    plain.unlink()


def test_backbone_weights_count_by_content(
    made: ProposeConfig, world: Path, micro_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    split = DataPaths(world).load("train2017", load_protocol(made.protocol), base_only=True)

    def found(name: str, content: bytes) -> dict[str, object]:
        (tmp_path / name).write_bytes(content)
        job = replace(made, recipe=micro_recipe(f"detector.backbone.weights={tmp_path / name}"))
        return settings(job, Detector.OLN, split)

    assert found("a.pth", b"1") == found("b.pth", b"1") != found("a.pth", b"2")


def test_other_annotations_are_refused(made: ProposeConfig, copied_world: Path) -> None:
    file = copied_world / "annotations" / "instances_train2017.json"
    tree = json.loads(file.read_text())
    file.write_text(json.dumps(tree | {"annotations": tree["annotations"][1:]}))
    with pytest.raises(HdovdError, match="annotations sha256 differs"):
        propose(replace(made, data=DataPaths(copied_world)))


def test_a_network_proposes_the_same_anywhere(
    made: ProposeConfig, network: Path, tmp_path: Path, micro_recipe: Callable[..., Recipe]
) -> None:
    """Its own values count, not those of the recipe given."""
    job = replace(
        made,
        out=tmp_path / "again.json",
        checkpoint=(network,),
        recipe=micro_recipe("proposals.nms=0.1", "input.short_side=64"),
    )
    propose(job)
    assert job.out.read_bytes() == made.out.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "again.json.made_by.json"]


def test_what_made_it_is_kept(made: ProposeConfig, network: Path, world: Path, kept: list[int]) -> None:
    found, tree = made_by(network), json.loads((world / "annotations" / "instances_train2017.json").read_text())
    names = {c["id"]: c["name"] for c in tree["categories"]}
    counts = {name: sum(names[a["category_id"]] == name for a in tree["annotations"]) for name in BASE}
    assert found["detector"] == "oln"
    assert found["training_boxes"] == {name: count for name, count in counts.items() if count}
    assert found["training_images"] == len(kept)
    assert found["protocol"] == {"name": "demo-world", "base": list(BASE)}
    assert found["recipe"]["proposals"] == made.recipe.proposals.model_dump(exclude={"epochs"})
    assert found["recipe"]["train"]["epochs"] == (made.recipe.proposals.epochs or made.recipe.train.epochs)
    assert set(found["recipe"]) == {"detector", "input", "proposals", "train"}
    assert found["weights_sha256"] == tensors_hash(load_file(network))
    assert json.loads(json.dumps(found)) == found


def test_tensors_hash_sees_names_shapes_and_values() -> None:
    one = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(2)},
        {"c": torch.zeros(2, 3), "b": torch.ones(2)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1.5])},
        {"a": torch.zeros(2, 3)},
    ]
    assert tensors_hash(one) == tensors_hash(dict(reversed(one.items())))
    assert len({tensors_hash(other) for other in (one, *others)}) == 5


def test_files_that_hold_no_network(made: ProposeConfig, network: Path, tmp_path: Path) -> None:
    state = load_file(network)
    save_file(state, tmp_path / "bare.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(network.read_bytes()[:1000])
    for name, message in (
        ("none.safetensors", "No such file"),
        ("bare.safetensors", "no proposal network"),
        ("torn.safetensors", "damaged"),
    ):
        with pytest.raises(HdovdError, match=message):
            load_network(tmp_path / name)
    for origin in ("[]", "{", "{}", '{"detector": "oln", "protocol": 3}'):
        save_file(state, tmp_path / "odd.safetensors", {"made_by": origin, "recipe": ""})
        with pytest.raises(HdovdError, match="does not say what made it"):
            load_network(tmp_path / "odd.safetensors")
    network_of_fewer, origin = load_network(network)
    network_of_fewer.rpn.head.conv = torch.nn.Sequential()  # type: ignore[union-attr]
    save_network(tmp_path / "fewer.safetensors", network_of_fewer, origin)
    with pytest.raises(HdovdError, match="does not fit the recipe in its metadata"):
        load_network(tmp_path / "fewer.safetensors")


def test_a_file_does_not_choose_what_is_imported(
    made: ProposeConfig, network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "strange_code.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    trained, origin = load_network(network)
    backbone = trained.recipe.detector.backbone.model_copy(update={"name": "strange_code:build"})
    trained.recipe = trained.recipe.model_copy(
        update={"detector": trained.recipe.detector.model_copy(update={"backbone": backbone})}
    )
    save_network(tmp_path / "strange.safetensors", trained, origin)
    for trusted in (None, made.recipe):
        with pytest.raises(HdovdError, match="code outside of hdovd"):
            load_network(tmp_path / "strange.safetensors", trusted)


def test_a_network_that_saw_classes_which_are_novel_here(
    made: ProposeConfig, network: Path, world: Path, tmp_path: Path
) -> None:
    text = (world / "protocol.toml").read_text().replace(f'"{BASE[0]}", ', "")
    (tmp_path / "other.toml").write_text(text.replace("novel = [", f'novel = ["{BASE[0]}", '))
    other = replace(made, out=tmp_path / "p.json", checkpoint=(network,), protocol=str(tmp_path / "other.toml"))
    with pytest.raises(HdovdError, match=f"trained on boxes of {BASE[0]}, which .* calls novel"):
        propose(other)
    (tmp_path / "other.toml").write_text(text)  # names it neither base nor novel: pictures of other classes
    said = list[str]()
    with lines_to(said.append):
        propose(other)
    assert any(f"trained on boxes of {BASE[0]}, which {tmp_path / 'other.toml'} does not name" in line for line in said)
    assert (tmp_path / "p.json").is_file()


def test_networks_side_by_side(made: ProposeConfig, network: Path, world: Path) -> None:
    """One call: the network that is there is taken, the other one trained; base and novel objects are those of
    val2017."""
    said: list[str] = []
    job = ProposeConfig(
        report=True,
        data=made.data,
        validation=made.data,
        recipe=made.recipe,
        out=made.out,
        protocol=made.protocol,
        detector=(Detector.RPN, Detector.OLN),
        checkpoint=(network,),
        device="cpu",
    )
    with lines_to(said.append):
        rpn, oln, same = recall_report(job)
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    base = {c["id"] for c in tree["categories"] if c["name"] in BASE}
    counts = [a["category_id"] in base for a in tree["annotations"]]
    assert rpn.objects == oln.objects == {"base": sum(counts), "novel": len(counts) - sum(counts)}
    assert replace(oln, network=same.network) == same
    assert rpn.ar50 != oln.ar50
    for one in (rpn, oln):
        for group in ("base", "novel"):
            at = list(one.ar50[group].values())
            assert at == sorted(at)
            assert all(0 <= mean <= half <= 100 for mean, half in zip(one.ar50_95[group].values(), at, strict=True))
        assert one.ar50["base"][100] > 0
    assert said[-1] == recall_table([rpn, oln, same])
    assert made.out.with_name("p.rpn.safetensors").is_file()
    kept = json.loads(made.out.with_name("p.recall.json").read_text())
    assert [entry["network"] for entry in kept] == ["rpn", "oln", "oln p.oln.safetensors"]
    assert "diagnosis" in kept[0]["novel"]


def test_table_of_recall() -> None:
    ar50 = {"base": {5: 50.0, 10: 62.5, 30: 75.0, 100: 100.0}, "novel": dict.fromkeys((5, 10, 30, 100))}
    table = recall_table([Recall("oln", 3, 12.0, {"base": 8, "novel": 0}, ar50, ar50)]).splitlines()
    assert "3 pictures, 8 base and 0 novel objects" in table[0]
    assert "diagnosis" in table[1]
    assert table[-2].split() == ["oln", "base", *["50.0", "62.5", "75.0", "100.0"] * 2]
    assert table[-1].split() == ["oln", "novel", *["-"] * 8]


def test_recall_needs_a_place_for_networks_and_pictures(made: ProposeConfig) -> None:
    with pytest.raises(HdovdError, match=r"--out.*--checkpoint"):
        recall_report(
            ProposeConfig(
                report=True,
                data=made.data,
                validation=made.data,
                recipe=made.recipe,
                out=None,
                protocol=made.protocol,
                device="cpu",
            )
        )
    with pytest.raises(HdovdError, match="--val-images"):
        recall_report(
            ProposeConfig(
                report=True,
                data=made.data,
                validation=None,
                recipe=made.recipe,
                out=made.out,
                protocol=made.protocol,
                device="cpu",
            )
        )


def test_a_picture_that_cannot_be_read_makes_no_recall(made: ProposeConfig, network: Path, copied_world: Path) -> None:
    picture = min((copied_world / "val2017").iterdir())
    picture.unlink()
    job = ProposeConfig(
        report=True,
        data=DataPaths(),
        validation=DataPaths(copied_world),
        recipe=made.recipe,
        out=None,
        protocol=made.protocol,
        checkpoint=(network,),
        device="cpu",
    )
    with pytest.raises(HdovdError, match=picture.name):
        recall_report(job)


def test_crowds_are_no_objects(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "a.json"
    rows = [{"id": 7, "iscrowd": 1}, {"id": 8, "iscrowd": 0}, {"id": 9, "iscrowd": None}, {"id": 10}]
    file.write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "1.jpg", "width": 50, "height": 50}],
                "categories": [],
                "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]} | row for row in rows],
            }
        )
    )
    image = ImageBoxes(
        1, "1.jpg", 50, 50, np.arange(12, dtype=np.float32).reshape(3, 4), np.array([0, 1, 2]), np.array([7, 8, 9])
    )
    (left,) = without_crowds(Split([image], tmp_path, file, (1, 2, 3), Skips())).images
    assert left.annotation_ids.tolist() == [8, 9]
    assert left.labels.tolist() == [1, 2]
    assert left.boxes.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("detectors", "checkpoints", "message"),
    [
        ((Detector.OLN, Detector.RPN), (), "--report"),
        ((), (Path("a"), Path("b")), "--report"),
        ((Detector.OLN,), (Path("a"),), "--detector"),
    ],
)
def test_one_network_makes_a_file(
    made: ProposeConfig, detectors: tuple[Detector, ...], checkpoints: tuple[Path, ...], message: str
) -> None:
    with pytest.raises(HdovdError, match=message):
        ProposeConfig(
            data=made.data, recipe=made.recipe, out=made.out, detector=detectors, checkpoint=checkpoints
        ).check()
    with pytest.raises(HdovdError, match="--out FILE"):
        ProposeConfig(data=made.data, recipe=made.recipe, detector=detectors[:1]).check()


@pytest.mark.parametrize("name", ["p.pkl", "p", "folder.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    made: ProposeConfig, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(HdovdError, match=r"expected a file whose name ends in \.json or \.npz"):
        ProposeConfig(data=made.data, recipe=made.recipe, out=tmp_path / name).check()
