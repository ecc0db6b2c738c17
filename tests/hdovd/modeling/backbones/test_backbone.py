"""The backbone: where its weights come from, what is frozen, and what it refuses."""

import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from hdovd.config.detector import BackboneConfig
from hdovd.core import HdovdError, lines_to
from hdovd.modeling.backbones.pyramid import TinyResNet, build_backbone


def config(**values: object) -> BackboneConfig:
    return BackboneConfig.model_validate(
        {
            "name": "resnet-tiny",
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


def tiny_state(seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    net = TinyResNet(nn.BatchNorm2d)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
    return net.state_dict()


@pytest.mark.parametrize("levels", [[3, 4, 5], [5, 2, 4, 3], [4]])
def test_levels_have_their_strides_and_one_more_is_pooled(levels: list[int]) -> None:
    maps = build_backbone(config(levels=levels), ignore)(torch.zeros(2, 3, 64, 96))
    assert list(maps) == [*(str(level) for level in sorted(levels)), "pool"]
    for level in levels:
        assert maps[str(level)].shape == (2, 4, 64 >> level, 96 >> level)
    top = max(levels)
    torch.testing.assert_close(maps["pool"], maps[str(top)][:, :, ::2, ::2])


@pytest.mark.parametrize(("name", "widths"), [("resnet18", [64, 128, 256, 512]), ("resnet50", [256, 512, 1024, 2048])])
def test_torchvision_resnets_fit_the_pyramid(name: str, widths: list[int]) -> None:
    built = build_backbone(config(name=name, levels=[2, 3, 4, 5]), initialise=False)
    assert [block[0].in_channels for block in built.fpn.inner_blocks] == widths
    assert {m.out_channels for m in built.fpn.modules() if isinstance(m, nn.Conv2d)} == {4}


def test_random_weights_are_said() -> None:
    said: list[str] = []
    with lines_to(said.append):
        build_backbone(config())
    assert len(said) == 1
    assert "random" in said[0]


def test_random_weights_under_a_frozen_norm_are_an_error() -> None:
    with pytest.raises(HdovdError, match=r"weights.*none.*norm.*frozen"):
        build_backbone(config(norm="frozen"), ignore)
    build_backbone(config(norm="frozen"), initialise=False)  # weights are loaded over it


def test_the_tiny_backbone_has_no_imagenet_weights() -> None:
    with pytest.raises(HdovdError, match="weights=none"):
        build_backbone(config(weights="auto"), ignore)


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        (0, set()),
        (1, {"conv1", "bn1"}),
        (2, {"conv1", "bn1", "layer1"}),
        (5, {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
    ],
)
@pytest.mark.parametrize("name", ["resnet-tiny", "resnet18"])
def test_frozen_stages_have_no_gradient_and_the_others_do(name: str, stages: int, frozen: set[str]) -> None:
    built = build_backbone(config(name=name, frozen_stages=stages), initialise=False)
    for parameter_name, parameter in built.body.named_parameters():
        assert parameter.requires_grad == (parameter_name.split(".")[0] not in frozen), parameter_name
    assert all(p.requires_grad for p in built.fpn.parameters())


def test_frozen_stages_do_not_change_in_training() -> None:
    built = build_backbone(config(frozen_stages=2), ignore).train()
    frozen = ("conv1", "bn1", "layer1")
    before = {
        k: v.clone() for k, v in built.body.state_dict().items() if k.startswith(frozen) and v.is_floating_point()
    }
    built(torch.randn(2, 3, 64, 64))
    assert [k for k, v in before.items() if not torch.equal(v, built.body.state_dict()[k])] == []


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path: Path, suffix: str, norm: str) -> None:
    file, state = tmp_path / f"weights{suffix}", tiny_state()
    state["fc.weight"] = torch.zeros(10, 192)  # a classifier is left out
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    said: list[str] = []
    with lines_to(said.append):
        loaded = build_backbone(config(weights=str(file), norm=norm, frozen_stages=1)).body.state_dict()
    assert str(file) in said[0]
    for key, value in state.items():
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(loaded[key], value, atol=0, rtol=0)


def test_frozen_norm_uses_the_statistics_of_the_file(tmp_path: Path) -> None:
    file, state = tmp_path / "weights.safetensors", tiny_state()
    save_file(state, file)
    built = build_backbone(config(weights=str(file), norm="frozen"), ignore).train()
    assert any(isinstance(m, FrozenBatchNorm2d) for m in built.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in built.modules())
    plain = TinyResNet(nn.BatchNorm2d).eval()
    plain.load_state_dict(state)
    pixels = torch.randn(2, 3, 64, 64)
    stem = plain.relu(plain.bn1(plain.conv1(pixels)))
    expected = plain.layer4(plain.layer3(plain.layer2(plain.layer1(stem))))
    torch.testing.assert_close(built.body(pixels)["5"], expected, atol=1e-4, rtol=1e-4)


def test_a_torchvision_checkpoint_fits(tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    loaded = build_backbone(
        config(name="resnet18", weights=str(tmp_path / "resnet18.pth"), norm="frozen", frozen_stages=2), ignore
    ).body
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


def save(value: object, file: Path) -> None:
    torch.save(value, file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HdovdError, match=r"nowhere\.pth.*no such file"):
        build_backbone(config(weights=str(tmp_path / "nowhere.pth")), ignore)


@pytest.mark.parametrize("content", [b"", b"no weights at all"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_weights_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(HdovdError, match="weights"):
        build_backbone(config(weights=str(file)), ignore)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    state = tiny_state()
    file = tmp_path / "weights.pth"
    save({k: v for k, v in state.items() if k != "layer2.conv1.weight"}, file)
    with pytest.raises(HdovdError, match=r"missing.*layer2\.conv1\.weight"):
        build_backbone(config(weights=str(file)), ignore)
    save({**state, "conv1.weight": torch.zeros(32, 3, 7, 7)}, file)
    with pytest.raises(HdovdError, match=r"another shape.*conv1\.weight"):
        build_backbone(config(weights=str(file)), ignore)
    save({"state_dict": state}, file)
    with pytest.raises(HdovdError, match="does not fit resnet-tiny"):
        build_backbone(config(weights=str(file)), ignore)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), {"conv1.weight": "text"}])
def test_a_file_that_holds_no_state_dict_is_refused(tmp_path: Path, value: object) -> None:
    file = tmp_path / "weights.pth"
    save(value, file)
    with pytest.raises(HdovdError, match=r"weights\.pth"):
        build_backbone(config(weights=str(file)), ignore)


class _Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("plain_pickle", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt"])
def test_a_file_that_runs_code_is_refused(tmp_path: Path, suffix: str, plain_pickle: bool) -> None:
    file, trace = tmp_path / f"weights{suffix}", tmp_path / "trace"
    value = {**tiny_state(), "extra": _Malicious(trace)}
    if plain_pickle:
        file.write_bytes(pickle.dumps(value, protocol=2))
    else:
        torch.save(value, file)
    with pytest.raises(HdovdError, match="safe to load"):
        build_backbone(config(weights=str(file)), ignore)
    assert not trace.exists()
    if plain_pickle:
        pickle.loads(file.read_bytes())["extra"].close()
        assert trace.exists()  # it would have
