"""A run evaluated on federated annotations, by a protocol with groups of its own: tables, files and analyses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hdovd.core import HdovdError
from hdovd.data import DataPaths, load_protocol
from hdovd.pipelines.evaluation.analysis import analyse
from hdovd.pipelines.evaluation.evaluate import EvalConfig, EvalResult, error_table, evaluate, result_table
from hdovd.pipelines.runs import RunFolder


@pytest.fixture(scope="module")
def protocol(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's classes in three groups, federated."""
    plain, file = load_protocol(str(world / "protocol.toml")), tmp_path_factory.mktemp("protocol") / "lvis.toml"
    lists = {"base": plain.base, "novel": plain.novel}
    groups = {"r": plain.novel, "c": plain.base[:6], "f": plain.base[6:]}
    lines = ['name = "federated"', "federated = true", 'metric = "ap"', "max_detections = [300]"]
    lines += [f"{key} = {json.dumps(names)}" for key, names in lists.items()]
    lines += ["[groups]", *(f"{key} = {json.dumps(names)}" for key, names in groups.items())]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def data(world: Path, tmp_path_factory: pytest.TempPathFactory) -> DataPaths:
    """The world's validation images, of which each knows of what is in it and of one class that is not; of one class
    not all objects are annotated.
    """
    file = tmp_path_factory.mktemp("data") / "instances.json"
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    ids = [category["id"] for category in tree["categories"]]
    for image in tree["images"]:
        own = {a["category_id"] for a in tree["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [one for one in ids if one not in own][:1]
        image["not_exhaustive_category_ids"] = sorted(own)[:1]
    file.write_text(json.dumps(tree))
    return DataPaths(images=world / "val2017", annotations=file)


@pytest.fixture(scope="module")
def evaluated(
    distilled: RunFolder, data: DataPaths, protocol: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EvalResult, Path]:
    run = Path(shutil.copytree(distilled.path, tmp_path_factory.mktemp("federated") / "run"))
    return evaluate(EvalConfig(run=run, data=data, device="cpu", protocol=str(protocol))), run


def test_tables_have_the_protocols_groups(evaluated: tuple[EvalResult, Path]) -> None:
    result, run = evaluated
    head = result_table(result).splitlines()[1:3]
    assert head[1].split() == ["r", "c", "f", "all"] * 2
    ends = [match.end() for match in re.finditer(r"\S+", head[1])]  # each head of numbers ends within its columns
    assert ends[0] <= head[0].index("AP50") + 4 <= ends[3] < head[0].rindex("AP") <= ends[7]
    assert error_table(result.errors).splitlines()[1].split() == ["r", "c", "f", "all"]
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    assert metrics["ap"].keys() == {"novel", "base", "all", "r", "c", "f"}
    assert metrics["ap"]["r"] == metrics["ap"]["novel"]
    assert metrics["errors"]["groups"]["r"] == metrics["errors"]["groups"]["novel"]


def test_a_run_is_taken_apart_as_it_was_evaluated(
    evaluated: tuple[EvalResult, Path], data: DataPaths, protocol: Path
) -> None:
    """Curves give the AP that was stated, or analysing refuses them; a whole image's crowd is no object of its own."""
    found = analyse(evaluated[1], data, protocol=str(protocol))
    assert found.errors.groups["r"] == evaluated[0].errors.groups["r"]
    assert found.reliability.keys() == {"novel", "base", "all", "r", "c", "f"}
    assert found.curves.to_tree()["groups"].keys() == found.reliability.keys()
    for place, image in enumerate(found.split.images):
        assert [t.annotation_id for t in found.image(place).truths] == image.annotation_ids.tolist()


def test_annotations_that_say_nothing_of_their_images_are_refused(
    distilled: RunFolder, world: Path, protocol: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(distilled.path, tmp_path / "run"))
    with pytest.raises(HdovdError, match=r"instances_val2017\.json: image \d+ has no neg_category_ids"):
        evaluate(EvalConfig(run=run, data=DataPaths(world), device="cpu", protocol=str(protocol)))
