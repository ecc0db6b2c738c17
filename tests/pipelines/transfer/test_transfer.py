"""A run on data sets that it was not trained on: what their classes are called, which of them it knows, and its AP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hdovd.cli.main import app
from hdovd.core import HdovdError, lines_to
from hdovd.data import DataPaths
from hdovd.evaluation.coco import GroundTruth
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.demo.world import BASE, NOVEL
from hdovd.pipelines.detection.names import NameEmbedder
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.transfer.config import TransferConfig, data_name
from hdovd.pipelines.transfer.transfer import embed, protocol_of, spoken, transfer, transfer_table

VALIDATION = Path("annotations") / "instances_val2017.json"


@pytest.fixture
def run(distilled: RunFolder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(distilled.path, tmp_path / "run"))


@pytest.fixture
def other(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Another data set: the world's validation images under a name, its annotations changed."""

    def make(name: str, change: Callable[[dict[str, Any]], None] = lambda tree: None) -> Path:
        folder = tmp_path / name
        (folder / "annotations").mkdir(parents=True)
        (folder / "val2017").symlink_to(world / "val2017")
        tree = json.loads((world / VALIDATION).read_text())
        change(tree)
        (folder / VALIDATION).write_text(json.dumps(tree))
        return folder

    return make


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tree: dict[str, Any]) -> None:
        for category in tree["categories"]:
            category["name"] = new if category["name"] == old else category["name"]

    return change


def test_names_are_said_as_others_say_them() -> None:
    assert spoken("tvmonitor") == ("tv", "monitor")
    assert spoken("Dinning  Table") == ("dining table",)
    assert spoken("Cabinet/shelf") == ("cabinet", "shelf")
    assert spoken("Formula 1 ") == ("formula 1 car",)
    assert spoken("alarm_clock") == ("alarm_clock",)  # underscores are the prompts' matter
    assert spoken("/") == ("/",)
    for line in shipped("synonyms"):  # no entry is out of reach
        name, equals, calls = line.partition(" = ")
        assert equals
        assert spoken(name) == tuple(calls.split(", "))
        assert all(calls.split(", "))


def test_all_classes_are_novel_in_groups_of_seen_and_unseen(world: Path) -> None:
    lines = list[str]()
    with lines_to(lines.append):
        protocol, said = protocol_of(DataPaths(world), BASE, BASE)
    assert protocol.base == ()
    assert set(protocol.novel) == {*BASE, *NOVEL}
    assert {group: set(names) for group, names in protocol.groups.items()} == {"seen": {*BASE}, "unseen": {*NOVEL}}
    assert all(calls == (name,) for name, calls in said.items())
    assert not protocol.federated
    assert f"{len(BASE)} of which the run was trained on; said as they are: {len(BASE) + len(NOVEL)}" in lines[-1]


def test_a_class_is_seen_by_what_it_is_called(other: Callable[..., Path]) -> None:
    """As a synonym, and in capitals."""
    lines = list[str]()
    with lines_to(lines.append):
        protocol, said = protocol_of(DataPaths(other("a", rename(BASE[0], "Aeroplane"))), ("AIRPLANE",), ("AIRPLANE",))
    assert protocol.groups["seen"] == ("Aeroplane",)
    assert said["Aeroplane"] == ("airplane",)
    assert "otherwise: Aeroplane as airplane" in lines[-1]
    alone, _ = protocol_of(DataPaths(other("b")), (), ())
    assert list(alone.groups) == ["unseen"]


@pytest.mark.parametrize(
    ("own", "named", "called"),
    [
        ("sofa", "sofa", "sofa"),  # the run's own class keeps its name, and so its row
        ("sofa", "couch", "couch"),
        ("couch", "sofa", "couch"),
        ("dining_table", "diningtable", "dining table"),
        ("traffic_light", "Traffic Light", "Traffic Light"),
        ("traffic light", "traffic_light", "traffic_light"),
    ],
)
def test_a_class_is_seen_whatever_either_side_calls_it(
    own: str, named: str, called: str, other: Callable[..., Path]
) -> None:
    protocol, said = protocol_of(DataPaths(other("c", rename(BASE[0], named))), (own, "else"), (own,))
    assert protocol.groups["seen"] == (named,)
    assert said[named] == (called,)
    unseen, _ = protocol_of(DataPaths(other("d", rename(BASE[0], named))), (own, "else"), ("else",))
    assert list(unseen.groups) == ["unseen"]


def test_results_never_take_the_runs_own_place(
    run: Path, other: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set is called by its folder's name, however it is given."""
    folder, before = other("somewhere"), {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    monkeypatch.chdir(folder / "annotations")
    (one,) = transfer(TransferConfig(run=run, data=(Path(".."),), device="cpu")).values()
    assert {file.parent for file in one.files} == {run / "transfer" / "somewhere"}
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    with pytest.raises(HdovdError, match="/ has no name to keep results by"):
        data_name(Path("/"))


def test_federated_data_are_counted_so(run: Path, world: Path, other: Callable[..., Path]) -> None:
    """The same pictures and boxes, judged by nothing but what is in them: wrong detections of other classes do not
    count, and no class is worse for it.
    """

    def change(tree: dict[str, Any]) -> None:
        for image in tree["images"]:
            image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}

    lvis, plain = other("lvis", change), other("plain")
    (lvis / VALIDATION).rename(lvis / "lvis_v1_val.json")
    for name in ("train2017", "val2017"):
        if not (lvis / name).exists():
            (lvis / name).symlink_to(world / name)
    tree = json.loads((lvis / "lvis_v1_val.json").read_text())
    for image in tree["images"]:
        image["coco_url"] = f"http://images.invalid/val2017/{image.pop('file_name')}"
    (lvis / "lvis_v1_val.json").write_text(json.dumps(tree))
    protocol, _ = protocol_of(DataPaths(lvis), BASE, BASE)
    assert protocol.federated
    assert protocol.max_detections == (300,)
    one, two = (one.combined for one in transfer(TransferConfig(run=run, data=(lvis, plain), device="cpu")).values())
    there = ~np.isnan(two.ap50)
    assert (one.ap50[there] >= two.ap50[there] - 1e-9).all()
    assert (one.ap50[there] > two.ap50[there]).any()


def test_a_class_of_several_names_has_their_mean(distilled: RunFolder) -> None:
    embedder = NameEmbedder(distilled, torch.device("cpu"))
    one, two = embedder.own_rows(BASE[:2])
    rows = embed(embedder, [(BASE[0],), (BASE[0], BASE[1]), (BASE[1].upper(),)])
    torch.testing.assert_close(rows[0], one / one.norm())
    torch.testing.assert_close(rows[2], two / two.norm())
    torch.testing.assert_close(rows[1], (one + two) / (one + two).norm())


def test_a_table_of_data_sets(run: Path, other: Callable[..., Path]) -> None:
    """The second has a class of a name of its own, which the run's CLIP embeds; the run's own evaluation stays."""
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    folders = other("first"), other("second", rename(NOVEL[0], "tvmonitor"))
    found = transfer(TransferConfig(run=run, data=folders, device="cpu"))
    assert {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()} == before
    lines = transfer_table(found).splitlines()
    assert lines[0].split()[:5] == ["data", "images", "classes", "AP50", "seen"]
    assert [line.split()[:3] for line in lines[1:3]] == [
        [n, "8", str(len(BASE) + len(NOVEL))] for n in ("first", "second")
    ]
    for folder, one in zip(folders, found.values(), strict=True):
        detections = json.loads((run / "transfer" / folder.name / "detections.json").read_text())
        metrics = json.loads((run / "transfer" / folder.name / "metrics.json").read_text())
        protocol = one.combined.protocol
        tree = json.loads((folder / VALIDATION).read_text())
        ids = {category["name"]: category["id"] for category in tree["categories"]}
        truth = GroundTruth(
            folder / VALIDATION, tuple(ids[n] for n in protocol.names), [i["id"] for i in tree["images"]], protocol
        )
        assert truth.average_precision(detections).summary()["ap50"] == pytest.approx(metrics["ap50"], nan_ok=True)
        assert metrics["ap50"].keys() == {"novel", "base", "all", "seen", "unseen"}
        assert metrics["protocol"] == "zero-shot"


def test_eval_does_the_same_of_one(run: Path, other: Callable[..., Path]) -> None:
    folder = other("one")
    found = transfer(TransferConfig(run=run, data=(folder,), device="cpu"))["one"].combined.summary()
    command = ["eval", str(run), "--data", str(folder), "--protocol", "zero-shot", "--device", "cpu", "--errors"]
    told = CliRunner().invoke(app, command, catch_exceptions=False)
    assert told.exit_code == 0
    assert "protocol zero-shot: 0 base and 24 novel classes" in told.output
    assert ["seen", "unseen", "all"] * 2 in [line.split() for line in told.output.splitlines()]
    assert f"wrote {run / 'transfer' / 'one' / 'metrics.json'}" in told.output
    metrics = json.loads((run / "transfer" / "one" / "metrics.json").read_text())
    assert metrics["ap50"] == pytest.approx(found["ap50"], nan_ok=True)


def test_folders_may_stand_behind_an_option(run: Path, other: Callable[..., Path]) -> None:
    one, two = other("one"), other("two")
    words = ["transfer", str(run), "--device", "cpu", "--data", str(one), str(two)]
    told = CliRunner().invoke(app, words, catch_exceptions=False)
    assert [line.split()[0] for line in told.output.splitlines() if line.startswith(("one ", "two "))] == ["one", "two"]
    with pytest.raises(HdovdError, match="no data sets"):
        TransferConfig(run=run, data=()).check()


def test_refusals(run: Path, other: Callable[..., Path], tmp_path: Path) -> None:
    one = other("one")
    with pytest.raises(HdovdError, match="several data sets of the name one"):
        TransferConfig(run=run, data=(one, one)).check()
    with pytest.raises(HdovdError, match="nowhere: no such folder"):
        TransferConfig(run=run, data=(tmp_path / "nowhere",)).check()
    with pytest.raises(HdovdError, match="gone"):
        transfer(
            TransferConfig(run=run, data=(other("two", rename(NOVEL[0], "x")),), clip="local-dir:gone", device="cpu")
        )
