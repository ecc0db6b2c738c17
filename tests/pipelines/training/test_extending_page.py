"""docs/EXTENDING.md: its code blocks are written to files, and its commands are run on the micro world."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from hdovd.config.recipe import Recipe

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
    assert modules == ["# my_backbones.py", "# my_detectors.py", "# my_losses.py"]
    assert all(len(text.splitlines()) <= 55 for _, text in BLOCKS)
    assert len(RECIPES) == 4
    assert len(set(COMMANDS)) == 1


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
    hdovd, *command = COMMANDS[0].split()
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
