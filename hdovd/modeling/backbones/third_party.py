"""Backbones that are not this package's: timm's, torchvision's classifiers, and the user's own.

Each becomes a module that maps a batch of pictures (N, 3, H, W) to one feature map (N, C_l, H / 2^l, W / 2^l) a level
l, fine to coarse, with `channels`, the C_l. What is claimed is tried out on zeros when it is built.
"""

import difflib
from collections.abc import Callable
from typing import Any

import timm
import torch
import torchvision
from timm.utils.model import freeze_batch_norm_2d  # type: ignore[attr-defined]  # where timm 1.0.18 has it too
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.feature_extraction import create_feature_extractor

from hdovd.config.detector import LIBRARIES, BackboneConfig
from hdovd.core.errors import HdovdError

KEY = LIBRARIES.key
TRIAL = (128, 192)  # pixels


class Body(nn.Module):
    """A network and how to get its feature maps. `inner`: the network. Its weights are found under their own names."""

    def __init__(self, inner: nn.Module, channels: list[int], in_order: Callable[[Any], list[Tensor]]) -> None:
        super().__init__()
        self.inner, self.channels, self.in_order = inner, channels, in_order

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.in_order(self.inner(pixels))


def build_body(config: BackboneConfig) -> Body:
    """The network that `config.name` names, with the weights it is built with. Raises HdovdError naming the recipe's
    key.
    """
    origin, _, name = config.name.partition(":")
    body: Body = LIBRARIES.find(origin)(config, name) if origin in LIBRARIES else _own(config)
    _try_out(body, config)
    if config.norm == "frozen":
        _freeze_norms(body, config)
    if config.frozen_stages:
        _freeze_stages(body, config)
    return body


def timm_body(config: BackboneConfig, name: str) -> Body:
    if name.partition(".")[0] not in timm.list_models():  # resnet18.a1_in1k: the model, and which weights
        raise _unknown(config, name, timm.list_models(), "timm")
    try:
        whole: Any = timm.create_model(name, features_only=True, pretrained=False)
        places = [_last_at(whole.feature_info.reduction(), 2**level, config) for level in config.levels]
        inner: Any = timm.create_model(
            name, features_only=True, pretrained=config.weights == "auto", out_indices=places
        )
    except HdovdError:
        raise
    except Exception as error:  # no feature maps, no pretrained weights, no network: timm has many ways to say so
        raise HdovdError(
            f"{KEY} = {config.name!r} with weights = {config.weights!r}: timm cannot build it with feature maps: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Body(inner, [int(c) for c in inner.feature_info.channels()], list)


def _last_at(strides: list[int], stride: int, config: BackboneConfig) -> int:
    if stride not in strides:
        raise HdovdError(
            f"{KEY} = {config.name!r}: detector.backbone.levels {config.levels} want a feature map of stride {stride}; "
            f"found strides {strides}"
        )
    return len(strides) - 1 - strides[::-1].index(stride)


def torchvision_body(config: BackboneConfig, name: str) -> Body:
    """A classifier, cut at the last of its parts, or of their parts, that ends at each stride."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown(config, name, known, "torchvision")
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT" if config.weights == "auto" else None)
    except Exception as error:
        raise HdovdError(
            f"{KEY} = {config.name!r} with weights = {config.weights!r}: torchvision cannot build it: {error}"
        ) from error
    ends: list[tuple[int, str]] = []  # level and part, in the order in which they end

    def note(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, maps: object) -> None:
            if isinstance(maps, Tensor) and maps.dim() == 4:
                ends.extend(
                    (level, part) for level in config.levels if maps.shape[2:] == (TRIAL[0] >> level, TRIAL[1] >> level)
                )

        return hook

    handles = [
        part.register_forward_hook(note(path))
        for path, part in network.named_modules()
        if path and path.count(".") <= 1
    ]
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(1, 3, *TRIAL))
    except Exception as error:
        raise HdovdError(_fails(config, error)) from error
    for handle in handles:
        handle.remove()
    last = dict(ends)
    if missing := [level for level in config.levels if level not in last]:
        raise HdovdError(
            f"{KEY} = {config.name!r}: no part of it ends with a feature map of stride "
            f"{[2**level for level in missing]}"
        )
    inner = create_feature_extractor(network, {last[level]: str(level) for level in config.levels})
    with torch.no_grad():
        channels = [maps.shape[1] for maps in inner(torch.zeros(1, 3, *TRIAL)).values()]
    return Body(inner, channels, lambda maps: list(maps.values()))


def _own(config: BackboneConfig) -> Body:
    build = LIBRARIES.find(config.name)
    if not callable(build):
        raise HdovdError(
            f"{KEY} = {config.name!r}: expected a function that returns a torch.nn.Module, found {type(build).__name__}"
        )
    if config.weights == "auto":
        raise HdovdError(
            f"{KEY} = {config.name!r} has no weights to download: set detector.backbone.weights to none or a file, or "
            f"let the function load them"
        )
    inner = build(levels=list(config.levels))
    if not isinstance(inner, nn.Module):
        raise HdovdError(f"{KEY} = {config.name!r}: expected a torch.nn.Module, found {type(inner).__name__}")
    channels = getattr(inner, "channels", None)
    if not (
        isinstance(channels, list) and len(channels) == len(config.levels) and all(isinstance(c, int) for c in channels)
    ):
        raise HdovdError(
            f"{KEY} = {config.name!r}: expected an attribute channels, a list of {len(config.levels)} whole numbers, "
            f"one for each of the levels {config.levels}; found {channels!r}"
        )
    return Body(inner, channels, list)


def _try_out(body: Body, config: BackboneConfig) -> None:
    """Raises HdovdError unless there is one map a level, of the channels and the stride that it should have.

    Weights that no map depends on (timm keeps blocks behind the last map) are frozen: data-parallel training would wait
    for their gradients.
    """
    expected = [
        (2, c, TRIAL[0] >> level, TRIAL[1] >> level) for c, level in zip(body.channels, config.levels, strict=True)
    ]
    modes = {module: module.training for module in body.modules()}
    try:
        maps = body.eval()(torch.zeros(2, 3, *TRIAL))
        found = [tuple(level.shape) for level in maps]
    except Exception as error:
        raise HdovdError(_fails(config, error)) from error
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


def _fails(config: BackboneConfig, error: Exception) -> str:
    return (
        f"{KEY} = {config.name!r}: fails on a picture of {TRIAL[1]} x {TRIAL[0]}; a detector's backbone takes pictures "
        f"of any size that is a multiple of 32: {type(error).__name__}: {error}"
    )


def _freeze_norms(body: Body, config: BackboneConfig) -> None:
    if not any(isinstance(module, _BatchNorm) for module in body.modules()):
        raise HdovdError(
            f"detector.backbone.norm = 'frozen': {config.name} has no batch norm to freeze; norm = 'batch' leaves its "
            f"norms as they are"
        )
    body.inner = freeze_batch_norm_2d(body.inner)


def _freeze_stages(body: Body, config: BackboneConfig) -> None:
    """1: what comes before the parts that end at stride 4; s: all up to the map of stride 2^s. Where parts follow one
    another.
    """
    parts = list(body.inner.named_children())
    order = [name for name, _ in parts]
    info = getattr(body.inner, "feature_info", None)
    ends = {
        int(entry["reduction"]): str(entry["module"]).replace(".", "_") for entry in ([] if info is None else info.info)
    }
    last = ends.get(4 if config.frozen_stages == 1 else 2**config.frozen_stages)
    if last in order:
        for name, part in parts[: order.index(last) + (config.frozen_stages > 1)]:
            setattr(body.inner, name, freeze_batch_norm_2d(part).requires_grad_(False))
        return
    raise HdovdError(
        f"detector.backbone.frozen_stages = {config.frozen_stages}: where the stages of {config.name} begin and end is "
        f"not known; set 0, or freeze them in a function of your own (docs/EXTENDING.md)"
    )


def _unknown(config: BackboneConfig, name: str, known: list[str], origin: str) -> HdovdError:
    near = difflib.get_close_matches(name, known, 1)
    return HdovdError(
        f"{KEY} = {config.name!r}: {origin} has no model {name!r}"
        + (f"; did you mean {origin}:{near[0]}" if near else "")
    )
