"""Backbones of timm, torchvision and the user's own: strides, weights, what is frozen, and what is refused by name."""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from hdovd.config.detector import BackboneConfig
from hdovd.config.recipe import load_recipe
from hdovd.core import HdovdError, lines_to
from hdovd.modeling.backbones.pyramid import ForeignPyramid, build_backbone, with_synced_norms

MODULE = '''
import torch
from torch import nn

class Halving(nn.Module):
    """One convolution a halving."""

    def __init__(self, levels, channels, stride=2):
        super().__init__()
        self.levels, self.channels = levels, channels
        self.steps = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, stride=stride, padding=1) for i in range(max(levels)))

    def forward(self, pixels):
        maps = []
        for level, step in enumerate(self.steps, start=1):
            pixels = step(pixels)
            if level in self.levels:
                maps.append(pixels)
        return maps

def good(levels):
    return Halving(levels, [4] * len(levels))

def without_channels(levels):
    net = good(levels)
    del net.channels
    return net

def wrong_channels(levels):
    return Halving(levels, [5] * len(levels))

def wrong_stride(levels):
    return Halving(levels, [4] * len(levels), stride=1)

def nothing(levels):
    return None

number = 3
'''  # noqa: E501


def config(name: str, **values: object) -> BackboneConfig:
    return BackboneConfig.model_validate(
        {
            "name": name,
            "weights": "none",
            "norm": "batch",
            "frozen_stages": 0,
            "fpn_channels": 4,
            "levels": [3, 4, 5],
            **values,
        }
    )


def ignore(_: str) -> None:
    pass


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_backbones.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    return tmp_path


def check(built: ForeignPyramid, levels: list[int]) -> None:
    """Strides, and a gradient for every weight: data-parallel training waits for each."""
    maps = built(torch.randn(2, 3, 64, 96))
    assert list(maps) == [*map(str, levels), "pool"]
    for level in levels:
        assert maps[str(level)].shape == (2, 4, 64 >> level, 96 >> level)
    sum(m.pow(2).sum() for m in maps.values()).backward()
    assert [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("timm:resnet10t", [2, 3, 4, 5]),
        ("timm:convnext_atto", [3, 4, 5]),
        ("timm:mobilenetv3_small_050", [3, 4]),
        ("torchvision:mobilenet_v3_small", [3, 4, 5]),
        ("torchvision:resnet18", [2, 3, 4, 5]),
        ("torchvision:regnet_y_400mf", [2, 3, 4]),
        ("own_backbones:good", [2, 3, 4, 5]),
    ],
)
def test_levels_have_their_strides(folder: Path, name: str, levels: list[int]) -> None:
    said: list[str] = []
    with lines_to(said.append):
        built = build_backbone(config(name, levels=levels))
    assert len(said) == 1
    assert name in said[0]
    check(built, levels)


def test_a_classifier_is_cut_where_its_stages_end() -> None:
    """In ResNet-50 the first convolution of a stage still has the stride of the one before."""
    body = build_backbone(config("torchvision:resnet50", levels=[2, 3, 4, 5]), initialise=False).body
    assert body.channels == [256, 512, 1024, 2048]
    network = torchvision.models.resnet50().eval()
    network.load_state_dict(body.inner.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 64)
    stem = network.maxpool(network.relu(network.bn1(network.conv1(pixels))))
    with torch.no_grad():
        torch.testing.assert_close(body.eval()(pixels)[1], network.layer2(network.layer1(stem)))


def test_timms_resnet_is_torchvisions() -> None:
    names, widths = build_backbone(config("timm:resnet18"), initialise=False).body.inner.state_dict(), [128, 256, 512]
    assert names.keys() <= torchvision.models.resnet18().state_dict().keys()
    assert build_backbone(config("timm:resnet18"), initialise=False).body.channels == widths


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("timm:convnext_atto", "batch"),
        ("timm:resnet10t", "batch"),
        ("timm:resnet10t", "frozen"),
        ("torchvision:mobilenet_v3_small", "batch"),
        ("torchvision:mobilenet_v3_small", "frozen"),
    ],
)
def test_weights_from_a_file_under_their_own_names(tmp_path: Path, name: str, norm: str) -> None:
    torch.manual_seed(3)
    origin, _, model = name.partition(":")
    network = timm.create_model(model) if origin == "timm" else torchvision.models.get_model(model, weights=None)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    built = build_backbone(config(name, weights=str(tmp_path / "weights.safetensors"), norm=norm), ignore)
    file = network.state_dict()
    for key, value in built.body.inner.state_dict().items():
        assert torch.equal(value, file[key] if key in file else file[key.replace("_", ".", 1)]), key
    save_file(
        {k: v.contiguous() for k, v in built.body.state_dict().items()}, tmp_path / "again.safetensors"
    )  # as propose does
    again = build_backbone(config(name, weights=str(tmp_path / "again.safetensors"), norm=norm), ignore)
    for key, value in built.body.state_dict().items():
        assert torch.equal(value, again.body.state_dict()[key])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(torchvision.models.resnet18().state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(HdovdError, match=r"does not fit timm:convnext_atto: missing"):
        build_backbone(config("timm:convnext_atto", weights=str(tmp_path / "weights.safetensors")), ignore)


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"])
def test_a_frozen_norm_has_no_statistics_that_move(name: str) -> None:
    built = build_backbone(config(name, norm="frozen", levels=[3, 4]), initialise=False).train()
    before = {k: v.clone() for k, v in built.body.state_dict().items()}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in built.body.modules())
    check(built, [3, 4])
    after = built.body.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    norms = [key.removesuffix("running_var") for key in after if key.endswith("running_var")]
    assert norms
    assert not {name for name, _ in built.body.named_parameters()} & {
        norm + part for norm in norms for part in ("weight", "bias")
    }


def test_frozen_norms_keep_the_activation() -> None:
    """timm's norms can hold the activation."""
    one, two = (
        build_backbone(config("timm:mobilenetv3_small_050", norm=norm, levels=[3, 4]), initialise=False).body
        for norm in ("batch", "frozen")
    )
    two.load_state_dict(one.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(one.eval()(pixels), two.train()(pixels), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small", "resnet-tiny"])
def test_synced_norms_keep_the_activation(name: str) -> None:
    torch.manual_seed(5)
    built = build_backbone(config(name, levels=[3, 4]), initialise=False).eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = built(pixels)
        synced = with_synced_norms(built).eval()
        after = synced(pixels)
    norms = [m for m in synced.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
    for level, maps in before.items():
        torch.testing.assert_close(after[level], maps)


@pytest.mark.parametrize(
    ("name", "stages", "frozen"),
    [
        ("timm:resnet18", 1, {"conv1", "bn1"}),
        ("timm:resnet18", 2, {"conv1", "bn1", "layer1"}),
        ("timm:resnet18", 5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("timm:convnext_atto", 1, {"stem_0", "stem_1"}),
        ("timm:convnext_atto", 3, {"stem_0", "stem_1", "stages_0", "stages_1"}),
        ("timm:regnety_002", 2, {"stem", "s1"}),
    ],
)
def test_frozen_stages(name: str, stages: int, frozen: set[str]) -> None:
    built = build_backbone(config(name, frozen_stages=stages), initialise=False).train()
    for parameter, value in built.body.inner.named_parameters():
        assert value.requires_grad == (parameter.split(".")[0] not in frozen), parameter
    before = {k: v.clone() for k, v in built.body.inner.state_dict().items() if k.split(".")[0] in frozen}
    assert before
    built(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, built.body.inner.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "timm:resnet5O",
            {},
            r"detector\.backbone\.name = 'timm:resnet5O' with weights = 'none': cannot be built.*Unknown model",
        ),
        ("torchvision:mobilenet_v3_smal", {}, r"cannot be built.*Unknown model mobilenet_v3_smal"),
        ("timm:vit_tiny_patch16_224", {}, r"want feature maps of strides \[8, 32\] too; found strides \[16"),
        ("timm:swin_tiny_patch4_window7_224", {}, r"fails on a picture of 192 x 128.*pictures of any size"),
        ("torchvision:vit_b_16", {}, r"detector\.backbone\.name = 'torchvision:vit_b_16' .*fails on a picture"),
        ("timm:convnext_atto", {"norm": "frozen"}, "has no batch norm to freeze; norm = 'batch'"),
        ("torchvision:mobilenet_v3_small", {"frozen_stages": 1}, r"frozen_stages = 1: where the stages.*EXTENDING"),
        ("timm:mobilenetv3_small_050", {"frozen_stages": 1}, r"frozen_stages = 1: where the stages"),
        ("timm:resnet10t", {"norm": "frozen"}, r"weights is none and backbone\.norm is frozen"),
        ("own_backbones:good", {"frozen_stages": 1}, r"frozen_stages = 1: where the stages"),
        ("own_backbones:good", {"norm": "frozen"}, "no batch norm to freeze"),
        ("own_backbones:good", {"weights": "auto"}, "no weights to download"),
        (
            "own_backbones:god",
            {},
            r"detector\.backbone\.name = 'own_backbones:god': own_backbones .* has no god; did you mean good",
        ),
        ("no_module_here:good", {}, "cannot import no_module_here"),
        ("own_backbones:number", {}, r"own_backbones:number' .*'int' object is not callable"),
        ("own_backbones:nothing", {}, r"expected a torch\.nn\.Module with .*found NoneType"),
        (
            "own_backbones:without_channels",
            {},
            r"an attribute channels, a list of 3 whole numbers.*found Halving with channels None",
        ),
        ("own_backbones:wrong_channels", {}, r"expected feature maps \[\(2, 5, 16, 24\).*found \[\(2, 4, 16, 24\)"),
        ("own_backbones:wrong_stride", {}, r"expected feature maps .*found \[\(2, 4, 128, 192\)"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, name: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(HdovdError, match=message):
        build_backbone(config(name, **values), ignore)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet5", "resnet50"), ("resnet_tiny", "resnet-tiny"), ("timm:", "timm:NAME"), (":x", "my_module:function")],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(HdovdError) as error:
        load_recipe("demo", [f'detector.backbone.name="{name}"'])
    assert "detector.backbone.name" in str(error.value)
    assert near in str(error.value)
