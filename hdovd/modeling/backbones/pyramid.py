"""The backbone with its feature pyramid: a ResNet of torchvision's parts, or another network: timm's, torchvision's
classifiers, and the user's own.

Levels are named by their stride: level l has stride 2^l, P2..P5 come from the ResNet's four stages and one more is
pooled from the last. Another network becomes a `Body`, which maps a batch of pictures (N, 3, H, W) to one feature map
(N, C_l, H / 2^l, W / 2^l) a level l, fine to coarse, with `channels`, the C_l. What is claimed is tried out on zeros
when it is built. timm is imported where it is needed alone: that takes a second.
"""

import copy
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from hdovd.config.detector import LIBRARIES, BackboneConfig
from hdovd.core import HdovdError, log, require_readable

KEY = LIBRARIES.key
TRIAL = (128, 192)  # pixels
STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))  # of a ResNet, the stem first


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
        own = config if initialise or config.weights != "auto" else config.model_copy(update={"weights": "none"})
        foreign = build_body(own)
        if initialise:
            _initialise(foreign.inner, config)
        return ForeignPyramid(foreign, foreign.channels, config.levels, config.fpn_channels)
    norm = FrozenBatchNorm2d if config.norm == "frozen" else nn.BatchNorm2d
    if config.name == "resnet-tiny":
        body: Any = TinyResNet(norm)
        widths = list(TinyResNet.widths)
    else:
        body = getattr(torchvision.models, config.name)(weights=None, norm_layer=norm)
        widths = [body.fc.in_features // 2**k for k in (3, 2, 1, 0)]
    if initialise:
        _initialise(body, config)
    _freeze(body, [name for stage in STAGES[: config.frozen_stages] for name in stage], config)
    return BackboneWithFPN(
        body,
        return_layers={f"layer{level - 1}": str(level) for level in config.levels},
        in_channels_list=[widths[level - 2] for level in config.levels],
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
    return cast(nn.Module, convert(model))


def _freeze(network: nn.Module, parts: Collection[str], config: BackboneConfig) -> None:
    """Freeze parts of a network: their weights, and the statistics of their batch norms."""
    for name in parts:
        if config.norm == "batch":
            setattr(network, name, _with_frozen_norms(getattr(network, name)))
        getattr(network, name).requires_grad_(False)


def _with_frozen_norms(module: nn.Module) -> nn.Module:
    from timm.utils.model import freeze_batch_norm_2d  # type: ignore[attr-defined]  # where timm 1.0.18 has it too

    return cast(nn.Module, freeze_batch_norm_2d(module))


# --- weights ---


def _initialise(network: nn.Module, config: BackboneConfig) -> None:
    """As `weights` say; logs which they are. A network of another library has those of "auto" since it was built."""
    origin, other, _ = config.name.partition(":")
    used = "as it is built, no weights loaded" if other else "random initialisation"
    if config.weights == "none":
        if config.norm == "frozen" and (not other or origin in LIBRARIES):
            raise HdovdError(
                "backbone.weights is none and backbone.norm is frozen: a random frozen backbone cannot learn; set "
                "detector.backbone.norm=batch and detector.backbone.frozen_stages=0"
            )
    elif config.weights != "auto":
        _load(network, _read(Path(config.weights)), config)
        used = f"weights from {config.weights}"
    elif other:
        used = "pretrained weights"
    else:
        state, used = _imagenet(config)
        _load(network, state, config)
    log(f"backbone {config.name}: {used}")


def _load(network: nn.Module, state: dict[str, Tensor], config: BackboneConfig) -> None:
    """Load what the network has of a state dict of it, or of its `Body`; timm joins the first two parts of a name where
    it keeps feature maps alone.
    """
    wanted = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    named = {str(k).removeprefix("inner."): v for k, v in state.items()}
    state = {k if k in wanted else k.replace(".", "_", 1): v for k, v in named.items()}
    state = {k: v for k, v in state.items() if k in wanted and isinstance(v, Tensor)}
    missing = sorted(k for k in wanted.keys() - state.keys() if not k.endswith("num_batches_tracked"))
    wrong = sorted(k for k, v in state.items() if v.shape != wanted[k].shape)
    if missing or wrong:
        raise HdovdError(
            f"{config.weights} does not fit {config.name}: missing {missing[:4]}, of another shape {wrong[:4]} "
            f"({len(missing)} and {len(wrong)} in all)"
        )
    network.load_state_dict(state, strict=False)


def _imagenet(config: BackboneConfig) -> tuple[dict[str, Tensor], str]:
    """The weights, and what they are called."""
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
    return dict(state), str(weights)


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


# --- networks that are not this package's ---


class Body(nn.Module):
    """A network whose feature maps are a list. `inner`: the network. Its weights are found under their own names."""

    def __init__(self, inner: nn.Module, channels: list[int]) -> None:
        super().__init__()
        self.inner, self.channels = inner, channels

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = self.inner(pixels)
        return list(maps.values() if isinstance(maps, dict) else maps)


def build_body(config: BackboneConfig) -> Body:
    """The network that `config.name` names, with the weights it is built with. Raises HdovdError naming the recipe's
    key.
    """
    origin, _, name = config.name.partition(":")
    try:
        body: Body = LIBRARIES.find(origin)(config, name) if origin in LIBRARIES else _own(config)
        _try_out(body, config)
    except HdovdError:
        raise
    except Exception as error:  # no such model, no feature maps, no weights, no network: there are many ways to say so
        raise HdovdError(
            f"{KEY} = {config.name!r} with weights = {config.weights!r}: cannot be built, or fails on a picture of "
            f"{TRIAL[1]} x {TRIAL[0]}; a detector's backbone takes pictures of any size that is a multiple of 32: "
            f"{type(error).__name__}: {error}"
        ) from error
    if config.norm == "frozen":
        if not any(isinstance(module, _BatchNorm) for module in body.modules()):
            raise HdovdError(
                f"detector.backbone.norm = 'frozen': {config.name} has no batch norm to freeze; norm = 'batch' leaves "
                f"its norms as they are"
            )
        body.inner = _with_frozen_norms(body.inner)
    if config.frozen_stages:
        _freeze(body.inner, _parts_of_stages(body.inner, config), config)
    return body


def timm_body(config: BackboneConfig, name: str) -> Body:
    import timm

    whole: Any = timm.create_model(name, features_only=True, pretrained=False)
    places = {stride: place for place, stride in enumerate(whole.feature_info.reduction())}  # the last of each
    _require_strides(places, config)
    wanted, pretrained = [places[2**level] for level in config.levels], config.weights == "auto"
    inner: Any = timm.create_model(name, features_only=True, pretrained=pretrained, out_indices=wanted)
    return Body(inner, [int(c) for c in inner.feature_info.channels()])


def torchvision_body(config: BackboneConfig, name: str) -> Body:
    """A classifier, cut at the last of its parts, or of their parts, that ends at each stride."""
    network = torchvision.models.get_model(name, weights="DEFAULT" if config.weights == "auto" else None).eval()
    last: dict[int, tuple[str, int]] = {}  # by stride: the part, and its channels

    def note(part: str, _: nn.Module, __: object, maps: object) -> None:
        if isinstance(maps, Tensor) and maps.dim() == 4:
            strides = [s for s in (4, 8, 16, 32) if maps.shape[2:] == (TRIAL[0] // s, TRIAL[1] // s)]
            last.update(dict.fromkeys(strides, (part, maps.shape[1])))

    watched = copy.deepcopy(network)
    for path, part in watched.named_modules():
        if path and path.count(".") <= 1:
            part.register_forward_hook(partial(note, path))
    with torch.no_grad():
        watched(torch.zeros(1, 3, *TRIAL))
    _require_strides(last, config)
    ends = [last[2**level] for level in config.levels]
    names = {part: str(level) for (part, _), level in zip(ends, config.levels, strict=True)}
    return Body(create_feature_extractor(network, names), [channels for _, channels in ends])


def _require_strides(found: Collection[int], config: BackboneConfig) -> None:
    if missing := [2**level for level in config.levels if 2**level not in found]:
        raise HdovdError(
            f"{KEY} = {config.name!r}: detector.backbone.levels {config.levels} want feature maps of strides {missing} "
            f"too; found strides {sorted(found)}"
        )


def _own(config: BackboneConfig) -> Body:
    build = LIBRARIES.find(config.name)
    if config.weights == "auto":
        raise HdovdError(
            f"{KEY} = {config.name!r} has no weights to download: set detector.backbone.weights to none or a file, or "
            f"let the function load them"
        )
    inner = build(levels=list(config.levels))
    channels: Any = getattr(inner, "channels", None)
    counts = isinstance(channels, list) and [type(count) for count in channels] == [int] * len(config.levels)
    if not (isinstance(inner, nn.Module) and counts):
        raise HdovdError(
            f"{KEY} = {config.name!r}: expected a torch.nn.Module with an attribute channels, a list of "
            f"{len(config.levels)} whole numbers, one for each of the levels {config.levels}; found "
            f"{type(inner).__name__} with channels {channels!r}"
        )
    return Body(inner, channels)


def _try_out(body: Body, config: BackboneConfig) -> None:
    """Raises HdovdError unless there is one map a level, of the channels and the stride that it should have.

    Weights that no map depends on (timm keeps blocks behind the last map) are frozen: data-parallel training would wait
    for their gradients.
    """
    expected = [
        (2, c, TRIAL[0] >> level, TRIAL[1] >> level) for c, level in zip(body.channels, config.levels, strict=True)
    ]
    modes = {module: module.training for module in body.modules()}
    maps = body.eval()(torch.zeros(2, 3, *TRIAL))
    found = [tuple(level.shape) for level in maps]
    for module, mode in modes.items():  # parents first; torch.fx's modules change more than a flag
        module.train(mode)
    if found != expected:
        raise HdovdError(
            f"{KEY} = {config.name!r}: for two pictures of {TRIAL[1]} x {TRIAL[0]} expected feature maps {expected}, "
            f"one for each of the levels {config.levels}; found {found}"
        )
    weights = [p for p in body.parameters() if p.requires_grad]
    if weights and any(level.requires_grad for level in maps):
        gradients = torch.autograd.grad(torch.stack([level.sum() for level in maps]).sum(), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.requires_grad_(gradient is not None)


def _parts_of_stages(network: nn.Module, config: BackboneConfig) -> list[str]:
    """1: what comes before the parts that end at stride 4; s: all up to the map of stride 2^s. Where parts follow one
    another.
    """
    order = [name for name, _ in network.named_children()]
    info = getattr(getattr(network, "feature_info", None), "info", [])
    ends = {int(entry["reduction"]): str(entry["module"]).replace(".", "_") for entry in info}
    last = ends.get(4 if config.frozen_stages == 1 else 2**config.frozen_stages)
    if last not in order:
        raise HdovdError(
            f"detector.backbone.frozen_stages = {config.frozen_stages}: where the stages of {config.name} begin and "
            f"end is not known; set 0, or freeze them in a function of your own (docs/EXTENDING.md)"
        )
    return order[: order.index(last) + (config.frozen_stages > 1)]
