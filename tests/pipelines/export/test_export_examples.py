"""A file for other programs, some of whose classes are known by example."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hdovd.cli.main import app
from hdovd.core import HdovdError
from hdovd.pipelines.common.images import decode
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.export.model import open_model
from hdovd.pipelines.runs import RunFolder


@pytest.fixture
def crops(world: Path, tmp_path: Path) -> Path:
    """A picture each of a novel class of the run, and of a class that it has not."""
    for name, picture in zip(("star", "gadget"), sorted((world / "val2017").iterdir()), strict=False):
        (tmp_path / "crops" / name).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "crops" / name)
    return tmp_path / "crops"


@pytest.mark.parametrize("ending", ["onnx", "pt", "safetensors"])
def test_the_file_knows_the_classes_of_the_examples(
    ending: str, distilled: RunFolder, crops: Path, world: Path, tmp_path: Path
) -> None:
    out = tmp_path / f"found.{ending}"
    words = ["export", str(distilled.path), "--out", str(out), "--examples", str(crops), "--mix", "1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    run, carried = open_model(ModelForm.of(out, None), out)
    names, novel = json.loads(carried["class_names"]), json.loads(carried["is_novel"])
    own = distilled.protocol()
    assert names == [*own.names, "gadget"]
    assert novel == [name not in own.base for name in names]
    rows = np.frombuffer(base64.b64decode(carried["class_embeddings"]), "<f4").reshape(len(names), -1).copy()
    detector = Detector.from_run(distilled.path, device="cpu").set_examples(crops, names=own.names, mix=1.0)
    place = [detector.names.index(name) for name in names]
    assert np.array_equal(rows, detector.class_embeddings[place].numpy())
    assert not np.allclose(rows[own.names.index("star")], distilled.class_embeddings()[own.names.index("star")])
    picture = decode(sorted((world / "val2017").iterdir())[2])
    found, labels = run(picture.pixels, torch.from_numpy(rows), torch.tensor(novel))[1:]
    expected = detector.find([picture], detector.recipe.inference.score_threshold)[0]
    assert found.tolist() == pytest.approx(expected.scores.tolist(), abs=2e-3)
    assert [names[label] for label in labels[:5].tolist()] == list(expected.names[:5])


@pytest.mark.parametrize(
    ("more", "said"), [(["--mix", "2"], "--mix 2"), (["--example-images", "."], "--examples FILE")]
)
def test_wrong_options_are_told(more: list[str], said: str, distilled: RunFolder, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", str(distilled.path), "--out", str(tmp_path / "x.pt"), *more])
    assert isinstance(result.exception, HdovdError)
    assert said in str(result.exception)
