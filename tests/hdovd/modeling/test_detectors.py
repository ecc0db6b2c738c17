"""Detectors by name: the registry, and one of the user's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.models.detection.image_list import ImageList

from hdovd.config.detector import DETECTORS, FORMS
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core import HdovdError
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.faster_rcnn.model import FasterRCNN

OWN = """
from torch import nn

from hdovd.modeling.base import Detector


class Mine(Detector):
    def __init__(self, recipe, dim, initialise):
        super().__init__()
        self.recipe, self.dim = recipe, dim
        self.backbone = nn.Linear(recipe.detector.options["width"], dim)


class NoDetector(nn.Module):
    pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_detector_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_the_registry_builds_what_it_names() -> None:
    model = build_detector(load_recipe("demo"), 8, initialise=False)
    assert type(model) is FasterRCNN
    assert (model.dim, model.recipe) == (8, load_recipe("demo"))
    assert DETECTORS.keys() == FORMS.keys() - {"own"}


@pytest.mark.parametrize("recipe", ["demo", "demo-adamixer", "demo-rtdetr"])
def test_no_graph_is_kept_of_what_is_predicted(recipe: str) -> None:
    model = build_detector(load_recipe(recipe), 8, initialise=False).eval()
    if not model.knows_objects:
        model.set_object_text(torch.ones(8))
    [found] = model.predict([torch.zeros(3, 64, 96, dtype=torch.uint8)], torch.eye(8)[:3])
    assert not found.boxes.requires_grad
    assert not found.class_probability.requires_grad


def test_a_detector_of_ones_own_gets_its_options(module: str, tmp_path: Path) -> None:
    recipe = load_recipe("demo", [f"detector.name={module}:Mine", "detector.width=3"])
    model = build_detector(recipe, 8, initialise=False)
    assert type(model).__name__ == "Mine"
    assert model.backbone.weight.shape == (8, 3)
    file = tmp_path / "again.toml"
    file.write_text(recipe.to_toml())
    assert load_recipe(str(file)) == recipe
    with pytest.raises(HdovdError, match="does not give the embeddings of its boxes"):
        model.students([], [])


@pytest.mark.parametrize(
    ("attribute", "told"),
    [
        ("NoDetector", r"expected a class of hdovd\.modeling\.base\.Detector"),
        ("Min", "did you mean Mine"),
        ("nn", "expected a class"),
    ],
)
def test_what_is_no_detector_is_told(attribute: str, told: str, module: str) -> None:
    with pytest.raises(HdovdError, match=rf"detector\.name.*{told}"):
        build_detector(
            load_recipe("demo", [f"detector.name={module}:{attribute}", "detector.width=3"]), 8, initialise=False
        )


def test_pseudo_boxes_wait_for_their_epoch(micro: Recipe) -> None:
    model = build_detector(micro, 8)
    assert isinstance(model, FasterRCNN)
    used = []
    for epoch in (1, 2, 3):
        model.begin_epoch(epoch)
        used.append(model.uses_pseudo_boxes)
    assert used == [False, True, True]


@pytest.fixture
def micro() -> Recipe:
    return load_recipe("demo", ["detector.backbone.fpn_channels=8", "pseudo_boxes.from_epoch=2"])


def test_recipes_are_read_without_torch() -> None:
    code = "import sys, hdovd.config.recipe; hdovd.config.recipe.load_recipe('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_detector_must_have_is_said_where_it_lacks() -> None:
    bare = Detector()
    with pytest.raises(NotImplementedError, match=r"Detector\.predict, or regions and scores"):
        bare.regions(ImageList(torch.zeros(0, 3, 32, 32), []))
