"""The page from one's photos to one's detector, and the notebook beside it, on the drawn world: every command and every
cell as it stands there, but for what is the reader's own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rtdetr_micro import NAME, SETTINGS as MICRO

from hdovd.pipelines.demo.world import BASE, NOVEL

SETTINGS = (*MICRO, "inference.score_threshold=0.0")  # an untrained detector finds something too
DOCS = Path(__file__).parents[1] / "docs"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    """Pictures to try the detector on."""
    folder = tmp_path / "my photos"
    folder.mkdir()
    for file in sorted((world / "val2017").iterdir())[:2]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_every_command_of_the_page(
    world: Path, clip: str, photos: Path, micro_settings: list[str], tmp_path: Path
) -> None:
    first, *steps = re.findall(r"^```sh\n(.*?)^```", (DOCS / "PHOTOS.md").read_text(), re.MULTILINE | re.DOTALL)
    own = {
        "DATA": str(world),
        "CLASSES": str(world / "protocol.toml"),
        "CLIP": f"--clip {clip}",
        "RECIPE": shlex.join(["--recipe", NAME, *(word for setting in SETTINGS for word in ("--set", setting))]),
        "NETWORK": shlex.join(micro_settings),
        "PHOTOS": str(photos),
    }
    assert re.findall(r"^(\w+)=", first, re.MULTILINE) == list(own)
    settings = "".join(f"{name}={shlex.quote(value)}\n" for name, value in own.items())
    script = (
        f'set -euo pipefail\nhdovd() {{ {shlex.quote(sys.executable)} -m hdovd "$@"; }}\n{settings}{"".join(steps)}'
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert {"cache", "detector.onnx", "found", "proposals.json", "report", "run", "suspicious.html"} <= {
        file.name for file in tmp_path.iterdir()
    }
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 2


def test_every_cell_of_the_notebook(
    world: Path, clip: str, photos: Path, micro_settings: list[str], tmp_path: Path, python: Run
) -> None:
    written = [cell for cell in json.loads((DOCS / "photos.ipynb").read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in written)
    first, *rest = ("".join(cell["source"]) for cell in written)
    own = f"""
from hdovd.config.recipe import load_recipe
from pathlib import Path
data, photo, base, novel = Path({str(world)!r}), Path({str(sorted(photos.iterdir())[0])!r}), {list(BASE)}, {list(NOVEL)}
clip, network = {{"clip": {clip!r}}}, load_recipe("demo", {[word for word in micro_settings[2:] if word != "--set"]})
recipe = load_recipe({NAME!r}, {list(SETTINGS)})
"""
    assert set(re.findall(r"^(\w+) =", first, re.MULTILINE)) == {
        "data", "photo", "base", "novel", "clip", "network", "recipe",
    }  # fmt: skip
    cells = "\n".join([own, *rest, "print(rows[0][0] in [*base, *novel])"])
    assert cells.count("threshold=0.3") == 1
    (tmp_path / "cells.py").write_text(cells.replace("threshold=0.3", "threshold=0.0"))  # it was hardly trained
    done = python(["cells.py"], tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "True"
