"""The backbone with its feature pyramid: a ResNet of torchvision's parts, or another network (`third_party`).

Levels are named by their stride: level l has stride 2^l, P2..P5 come from the ResNet's four stages and one
more is pooled from the last.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hdovd.config.detector import BackboneConfig
from hdovd.core.errors import HdovdError, require_readable
from hdovd.core.log import log

RANDOM_AND_FROZEN = (
    "backbone.weights is none and backbone.norm is frozen: a random frozen backbone cannot learn; set "
    "detector.backbone.norm=batch and detector.backbone.frozen_stages=0"
)


class TinyResNet(nn.Module):
    """A ResNet of four one-block stages for pictures of about 150 pixels: the demo's backbone, 1.2 M parameters."""

    widths = (32, 64, 128, 192)

    def __init__(self, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)
        self.bn1 = norm_layer(32)
        self.relu = nn.ReLU(inplace=True)
        inner = 32
        for stage, width in enumerate(self.widths, start=1):
            shortcut = nn.Sequential(nn.Conv2d(inner, width, 1, stride=2, bias=False), norm_layer(width))
            self.add_module(f"layer{stage}", BasicBlock(inner, width, 2, shortcut, norm_layer=norm_layer))
            inner = width


class ForeignPyramid(nn.Module):
    """The feature pyramid over a body that is not a ResNet of torchvision's parts."""

    def __init__(self, body: nn.Module, channels: list[int], levels: list[int], out_channels: int) -> None:
        super().__init__()
        self.body, self.levels = body, levels  # body's state is what `propose` keeps of a trained backbone
        self.fpn = FeaturePyramidNetwork(channels, out_channels, LastLevelMaxPool())

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(
            {str(level): maps for level, maps in zip(self.levels, self.body(pixels), strict=True)}
        )
        return maps


def build_backbone(config: BackboneConfig, initialise: bool = True) -> BackboneWithFPN | ForeignPyramid:
    """The backbone of a recipe, initialised as its `weights` say; logs which it used.

    It maps a batch (N, 3, H, W) to feature maps (N, C, h, w) by level name. Its network without the pyramid is `body`.
    Without `initialise` it is left as it is, for weights that are loaded over it.

    Raises HdovdError if weights are wanted and cannot be had, or do not fit.
    """
    if ":" in config.name:
        return _foreign(config, initialise)
    norm = FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d
    if config.name == "resnet-tiny":
        body: Any = TinyResNet(norm)
        widths = list(TinyResNet.widths)
    else:
        body = getattr(torchvision.models, config.name)(weights=None, norm_layer=norm)
        widths = [body.fc.in_features // 2**k for k in (3, 2, 1, 0)]
    if initialise:
        _initialise(body, config)
    _freeze(body, config.frozen_stages)
    levels = sorted(config.levels)
    return BackboneWithFPN(
        body,
        return_layers={f"layer{level - 1}": str(level) for level in levels},
        in_channels_list=[widths[level - 2] for level in levels],
        out_channels=config.fpn_channels,
    )


def without_pyramid(backbone: BackboneWithFPN | ForeignPyramid) -> list[int]:
    """Takes the feature pyramid away: what is left gives the network's own maps by level name. Returns their
    channels.
    """
    channels = [block[0].in_channels for block in backbone.fpn.inner_blocks]
    backbone.fpn = nn.Identity()
    return channels


def with_synced_norms(model: nn.Module) -> nn.Module:
    """The model with SyncBatchNorm in place of every batch norm that is not frozen; timm's keep the activation that
    they hold.
    """
    if any(isinstance(module, ForeignPyramid) for module in model.modules()):
        from timm.layers import convert_sync_batchnorm as convert  # type: ignore[attr-defined]  # torch's own would drop them
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    synced: nn.Module = convert(model)
    return synced


def _foreign(config: BackboneConfig, initialise: bool) -> ForeignPyramid:
    from hdovd.modeling.backbones.third_party import (
        build_body,
    )  # timm's import takes a second, and nobody else needs it

    body = build_body(
        config if initialise or config.weights != "auto" else config.model_copy(update={"weights": "none"})
    )
    if initialise and config.weights in ("auto", "none"):
        if config.weights == "none" and config.norm == "frozen" and config.name.startswith(("timm:", "torchvision:")):
            raise HdovdError(RANDOM_AND_FROZEN)
        log(
            f"backbone {config.name}: "
            f"{'pretrained weights' if config.weights == 'auto' else 'as it is built, no weights loaded'}"
        )
    elif initialise:
        _load(body.inner, {str(k).removeprefix("inner."): v for k, v in _read(Path(config.weights)).items()}, config)
        log(f"backbone {config.name}: weights from {config.weights}")
    return ForeignPyramid(body, body.channels, config.levels, config.fpn_channels)


def _freeze(body: nn.Module, stages: int) -> None:
    """Freeze the first stages (1: the stem): their weights, and the statistics of their batch norms."""
    frozen = {
        name
        for names in [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)][:stages]
        for name in names
    }
    for path, module in list(body.named_modules()):
        if path.split(".")[0] in frozen:
            module.requires_grad_(False)
            if isinstance(module, nn.BatchNorm2d):
                fixed = FrozenBatchNorm2d(module.num_features)
                fixed.load_state_dict(module.state_dict())
                parent, _, name = path.rpartition(".")
                setattr(body.get_submodule(parent), name, fixed)


def _initialise(body: nn.Module, config: BackboneConfig) -> None:
    if config.weights == "none":
        if config.norm == "frozen":
            raise HdovdError(RANDOM_AND_FROZEN)
        log(f"backbone {config.name}: random initialisation")
        return
    if config.weights == "auto":
        state = _imagenet(config)
    else:
        state = _read(Path(config.weights))
        log(f"backbone {config.name}: weights from {config.weights}")
    _load(body, state, config)


def _load(body: nn.Module, state: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load what the body has of a state dict; timm joins the first two parts of a name where it keeps feature maps
    alone.
    """
    wanted = {k: v for k, v in body.state_dict().items() if not k.startswith("fc.")}
    state = {k if k in wanted else str(k).replace(".", "_", 1): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in wanted and isinstance(v, Tensor)}
    missing = sorted(k for k in wanted.keys() - state.keys() if not k.endswith("num_batches_tracked"))
    wrong = sorted(k for k, v in state.items() if v.shape != wanted[k].shape)
    if missing or wrong:
        raise HdovdError(
            f"{config.weights} does not fit {config.name}: missing {missing[:4]}, of another shape {wrong[:4]} "
            f"({len(missing)} and {len(wrong)} in all)"
        )
    body.load_state_dict(state, strict=False)


def _imagenet(config: BackboneConfig) -> dict[str, Tensor]:
    if config.name == "resnet-tiny":
        raise HdovdError("resnet-tiny has no ImageNet weights: set detector.backbone.weights=none")
    weights = torchvision.models.get_model_weights(config.name).IMAGENET1K_V1
    try:
        state = weights.get_state_dict(progress=False)
    except (URLError, OSError) as error:
        raise HdovdError(
            f"the ImageNet weights of {config.name} are not reachable from here ({error}). On a machine with internet "
            f"fetch {weights.url}, then set detector.backbone.weights=FILE; or train from random initialisation with "
            "detector.backbone.weights=none, norm=batch and frozen_stages=0"
        ) from error
    log(f"backbone {config.name}: {weights}")
    return dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise HdovdError(f"backbone weights {path}: no such file")
    require_readable(path)
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        raise HdovdError(
            f"backbone weights {path}: not a .safetensors file or a state dict that is safe to load ({error})"
        ) from error
    if not isinstance(state, dict):
        raise HdovdError(
            f"backbone weights {path}: expected a state dict, names to tensors; found {type(state).__name__}"
        )
    return state
