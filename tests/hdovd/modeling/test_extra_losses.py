"""Losses that a recipe adds: what they see, weight, checkpoint, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hdovd.config.recipe import PRESETS, Recipe, load_recipe
from hdovd.core import HdovdError
from hdovd.data.targets import Targets
from hdovd.modeling.faster_rcnn.model import FasterRCNN

DIM = 6
MODULE = '''
import torch
from torch import nn

SEEN = []

class Weigh(nn.Module):
    """The squared length of the mean feature c of positive RoIs, scaled by a parameter."""

    def __init__(self, dim, channels, power=2, names=()):
        super().__init__()
        self.options = (dim, channels, power, list(names))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, view):
        SEEN.append(view)
        return self.scale * view.c[view.box_of_roi >= 0].mean(0).pow(2).sum()

class Flat(Weigh):
    def forward(self, view):
        return view.c.sum(1)

class Number(Weigh):
    def forward(self, view):
        return 3.0

def function(dim, channels):
    return Weigh(dim, channels)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The name of a module in the current folder, a new one for every test: imports are remembered."""
    name = "losses_of_" + "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restores sys.path afterwards
    return name


@pytest.fixture
def build(folder: str, micro_recipe: Callable[..., Recipe]) -> Callable[..., FasterRCNN]:
    def make(use: str = "{}:Weigh", *settings: str, name: str = "weigh") -> FasterRCNN:
        torch.manual_seed(0)
        recipe = micro_recipe(
            f'loss.extra.{name}.use="{use.format(folder)}"', f"loss.extra.{name}.weight=0.5", *settings
        )
        return FasterRCNN(recipe, DIM).train()

    return make


def step(model: FasterRCNN) -> dict[str, Tensor]:
    rows = nn.functional.normalize(torch.randn(2, DIM), dim=1)
    targets = Targets(
        torch.tensor([[8.0, 8.0, 60.0, 60.0]]),
        torch.tensor([0]),
        rows[:1],
        torch.tensor([[50.0, 30.0, 90.0, 80.0]]),
        rows[1:],
        rows[1:],
        rows[0],
    )
    losses: dict[str, Tensor] = model([torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)], [targets], rows, [1])
    return losses


def test_the_loss_is_weighted_and_trained_and_sees_the_step(build: Callable[..., FasterRCNN], folder: str) -> None:
    model = build("{}:Weigh", "loss.extra.weigh.power=3", 'loss.extra.weigh.names=["a", "b"]')
    losses = step(model)
    part = model.extra.parts["weigh"]
    assert part.options == (DIM, 16, 3, ["a", "b"])
    view = __import__(folder).SEEN[-1]
    expected = 0.5 * view.c[view.box_of_roi >= 0].mean(0).pow(2).sum()
    assert losses["weigh"].item() == pytest.approx(expected.item())
    losses["weigh"].backward()
    assert part.scale.grad.item() == pytest.approx(expected.item())
    assert model.head.class_feature.weight.grad.any()
    assert list(view.features) == ["3", "4", "5", "pool"]
    assert view.image_sizes == [(96, 128)]
    assert len(view.rois[0]) == len(view.box_of_roi) == len(view.deltas) == len(view.c)
    assert len(view.d) == (view.box_of_roi >= 0).sum()
    assert view.box_of_roi.max() == 1
    assert view.targets[0].pseudo_boxes.shape == (1, 4)


def test_it_is_in_the_checkpoint(build: Callable[..., FasterRCNN]) -> None:
    model, again = build(), build()
    nn.init.constant_(model.extra.parts["weigh"].scale, 7.0)
    again.load_state_dict(model.state_dict())
    assert again.extra.parts["weigh"].scale.item() == 7.0


def test_the_recipe_round_trips_with_its_options(build: Callable[..., FasterRCNN], tmp_path: Path) -> None:
    recipe = build("{}:Weigh", "loss.extra.weigh.power=3").recipe
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    assert load_recipe(str(tmp_path / "recipe.toml")).loss.extra["weigh"].options == {"power": 3}
    assert not load_recipe(str(tmp_path / "recipe.toml"), PRESETS["base-only"]).loss.extra


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("{}", r"loss\.extra\.weigh\.use = .*expected module:name"),
        ("{}:Wiegh", r"loss\.extra\.weigh\.use = .*has no Wiegh; did you mean Weigh"),
        (
            "no_such_module_anywhere:Weigh",
            r"loss\.extra\.weigh\.use = .*cannot import no_such_module_anywhere.*ModuleNotFoundError",
        ),
        ("{}:function", r"loss\.extra\.weigh\.use = .*expected a class of torch\.nn\.Module, found <function"),
    ],
)
def test_a_use_that_leads_nowhere_is_named(build: Callable[..., FasterRCNN], use: str, message: str) -> None:
    with pytest.raises(HdovdError, match=message):
        build(use)


def test_a_module_that_breaks_is_named(build: Callable[..., FasterRCNN], tmp_path: Path) -> None:
    (tmp_path / "broken_losses.py").write_text("1 / 0")
    with pytest.raises(HdovdError, match=r"loss\.extra\.weigh\.use.*ZeroDivisionError"):
        build("broken_losses:Weigh")


def test_an_option_that_the_class_does_not_take_is_named(build: Callable[..., FasterRCNN]) -> None:
    with pytest.raises(HdovdError, match=r"loss\.extra\.weigh.*\(powr\).*unexpected keyword argument 'powr'"):
        build("{}:Weigh", "loss.extra.weigh.powr=3")


def test_a_name_of_the_detectors_own_is_refused(build: Callable[..., FasterRCNN]) -> None:
    with pytest.raises(HdovdError, match=r"loss\.extra\.box.*choose another"):
        build(name="box")


@pytest.mark.parametrize(("use", "found"), [("{}:Flat", r"a tensor of shape \(16,\)"), ("{}:Number", "float")])
def test_what_is_no_scalar_is_refused(build: Callable[..., FasterRCNN], use: str, found: str) -> None:
    with pytest.raises(HdovdError, match=rf"loss\.extra\.weigh.*expected a scalar tensor.*found {found}"):
        step(build(use))


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("loss.extra.weigh.weight=1.0", "missing key loss.extra.weigh.use"),
        ('loss.extra.weigh.use="a:B"', "missing key loss.extra.weigh.weight"),
        ('loss.extra={"a b" = {use = "a:B", weight = 1.0}}', "loss.extra.a b"),
    ],
)
def test_a_section_that_is_not_whole_is_named(setting: str, problem: str) -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe("demo", [setting])
    assert problem in str(error.value)
