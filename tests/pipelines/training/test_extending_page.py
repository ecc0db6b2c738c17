"""docs/EXTENDING.md: its code blocks are written to files, and its commands are run on the micro world."""

import csv
import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from hdovd.cache.reader import FeatureCache
from hdovd.config.recipe import Recipe
from hdovd.data import DataPaths, load_protocol

PAGE = Path(__file__).parents[3] / "docs" / "EXTENDING.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
RECIPES = [text for kind, text in BLOCKS if kind == "toml"]
COMMANDS = [text.strip() for kind, text in BLOCKS if kind == "sh"]


def merged(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return tree | {
        key: merged(tree.get(key, {}), value) if isinstance(value, dict) else value for key, value in part.items()
    }


def write_page(folder: Path, recipe: Recipe, block: str) -> None:
    """The page's modules, and the recipe with one of its blocks."""
    for kind, text in BLOCKS:
        if kind == "python":
            (folder / text.split("\n", 1)[0].removeprefix("# ")).write_text(text)
    (folder / "my-recipe.toml").write_text(tomli_w.dumps(merged(tomllib.loads(recipe.to_toml()), tomllib.loads(block))))


def test_the_page_is_as_short_as_it_says() -> None:
    modules = sorted(text.split("\n", 1)[0] for kind, text in BLOCKS if kind == "python")
    assert modules == [f"# my_{name}.py" for name in ("backbones", "detectors", "forms", "losses", "teachers")]
    assert all(len(text.splitlines()) <= 55 for _, text in BLOCKS)
    assert len(RECIPES) == 4
    assert len(set(COMMANDS)) == 3


@pytest.mark.parametrize("block", RECIPES, ids=["loss", "timm", "backbone", "detector"])
def test_the_page_trains(
    block: str,
    tmp_path: Path,
    world: Path,
    training_cache: Path,
    micro_recipe: Callable[..., Recipe],
    forked: Callable[..., Any],
) -> None:
    write_page(tmp_path, micro_recipe("train.batch_size=4"), block)
    hdovd, *command = next(line for line in COMMANDS if " train " in line).split()
    assert hdovd == "hdovd"
    words = {"COCO": str(world), "CACHE": str(training_cache), "RUN": "run"}
    command = [words.get(word, word) for word in command]
    trained = forked([*command, "--protocol", world / "protocol.toml", "--device", "cpu"], tmp_path).wait()
    assert trained.returncode == 0, trained.stderr
    last = [
        entry for line in (tmp_path / "run" / "log.jsonl").open() if "classification" in (entry := json.loads(line))
    ][-1]
    weights = load_file(tmp_path / "run" / "model.safetensors")
    if "agree" in block:
        assert 0 < last["agree"] < 0.2  # 0.1 times 1 - cos
        assert weights["extra.parts.agree.project.bias"].any()
    elif "my_detectors" in block:
        assert weights["background"].shape == (24,)
        assert "rpn_objectness" not in last
    else:
        name = tomllib.loads(block)["detector"]["backbone"]["name"]
        assert f"backbone {name}" in trained.stdout
        assert any(key.startswith("backbone.body.inner.") for key in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())
    if "my_" in block:  # what it names is imported again
        scored = forked(["eval", "run", "--data", world, "--device", "cpu"], tmp_path).wait()
        assert scored.returncode == 0, scored.stderr


class Towers(torch.nn.Module):
    """Two that know little: the mean colours of 8 x 8 cells, and the bytes of a text, both projected."""

    def __init__(self, cells: int, dim: int) -> None:
        super().__init__()
        self.project = torch.nn.Linear(cells, dim)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dim() == 4:
            rows = torch.nn.functional.avg_pool2d(rows, 8)
        return self.project(rows.flatten(1).float() / 100)


@pytest.fixture
def towers(tmp_path: Path) -> Path:
    folder = tmp_path / "towers"
    folder.mkdir()
    torch.manual_seed(0)
    for name, inputs, cells, takes in (
        ("images", torch.zeros(2, 3, 32, 32), 48, "pixels"),
        ("texts", torch.zeros(2, 64, dtype=torch.int64), 64, "bytes"),
    ):
        torch.onnx.export(
            Towers(cells, 16),
            (inputs,),
            str(folder / f"{name}.onnx"),
            input_names=[takes],
            dynamic_axes={takes: {0: "n"}},
            dynamo=False,
        )
    return folder


def test_the_page_extracts(tmp_path: Path, world: Path, towers: Path, forked: Callable[..., Any]) -> None:
    (module,) = (text for kind, text in BLOCKS if kind == "python" and "my_teachers" in text)
    (tmp_path / "my_teachers.py").write_text(module)
    (line,) = (line for line in COMMANDS if "--teacher" in line)
    words = {"COCO": str(world), "CACHE": "cache", "TOWERS": str(towers)}
    command = [*(words.get(word, word) for word in line.split()[1:]), "--protocol", str(world / "protocol.toml")]
    made = forked([*command, "--workers", 1], tmp_path).wait()
    assert made.returncode == 0, made.stderr
    assert "set default is whole" in made.stdout
    cache = FeatureCache(tmp_path / "cache")
    assert cache.dim == 16
    assert cache.set.made_from["teacher"] == "my_teachers:load"
    again = forked(command, tmp_path).wait()
    assert "everything is there: nothing to extract" in again.stdout, again.stderr

    refused = forked(["cache", "verify", "cache", "--sample", 3], tmp_path).wait()
    assert refused.returncode == 1
    assert "my_teachers:load, code outside of hdovd, which is not" in refused.stderr
    mistaken = forked([*command, "--teacher", "openclip"], tmp_path).wait()
    assert "--teacher 'openclip', did you mean open_clip: expected open_clip, or my_module:name" in mistaken.stderr


def test_the_page_reads_a_form_of_data_sets(tmp_path: Path, world: Path, clip: str, forked: Callable[..., Any]) -> None:
    (module,) = (text for kind, text in BLOCKS if kind == "python" and "my_forms" in text)
    (tmp_path / "my_forms.py").write_text(module)
    table = tmp_path / "table"
    shutil.copytree(world / "train2017", table / "pictures")
    tree = json.loads((world / "annotations" / "instances_train2017.json").read_text())
    names, images = ({one["id"]: one for one in tree[key]} for key in ("categories", "images"))
    with (table / "boxes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["split", "file", "width", "height", "class", "x", "y", "w", "h"])
        for one in tree["annotations"]:
            image = images[one["image_id"]]
            size = (image["width"], image["height"])
            name = names[one["category_id"]]["name"]
            rows.writerow(["train2017", image["file_name"], *size, name, *one["bbox"]])
    protocol = str(world / "protocol.toml")
    (line,) = (line for line in COMMANDS if "--form" in line)
    words = {"TABLE": "table", "CACHE": "cache", "CLIP": clip}
    command = [words.get(word, word) for word in line.removesuffix(" --pretrained openai").split()[1:]]
    made = forked([*command, "--protocol", protocol, "--workers", 0], tmp_path).wait()
    assert made.returncode == 0, made.stderr
    assert "converting the annotations of table (train2017)" in made.stdout
    assert "set default is whole" in made.stdout
    cache = FeatureCache(tmp_path / "cache")
    assert cache.set.made_from["data"]["form"] == "my_forms:form"
    wanted = DataPaths(world).load("train2017", load_protocol(protocol), base_only=True)
    assert len(cache.image_ids()) == len(wanted.images)

    view = ["cache", "view", "cache", "--out", "view.png"]
    refused = forked(view, tmp_path).wait()
    assert refused.returncode == 1
    assert "my_forms:form, code outside of hdovd, which is not run" in refused.stderr
    data = ["--data", "table", "--form", "my_forms:form"]
    given = forked([*view, *data], tmp_path).wait()
    assert given.returncode == 0, given.stderr
    audited = forked(["audit", "--cache", "cache", *data, "--protocol", protocol], tmp_path).wait()
    assert audited.returncode == 0, audited.stderr
    assert "train2017" in audited.stdout
    assert "val2017" in (unknown := next(line for line in audited.stdout.splitlines() if "train and val" in line))
    assert unknown.startswith("unknown")
