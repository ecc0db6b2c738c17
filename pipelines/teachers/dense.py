"""CLIP embeddings of boxes from one pass over the whole picture: the dense instance teacher. Knows tensors, not files
or caches.

A crop teacher runs CLIP once a box. Here CLIP's feature map is computed once a picture and every box takes its part of
it by RoIAlign. That is cheaper a box, and not the same: the features of a box have seen what surrounds it, and the
object at the size that it has in the picture. How near the two are depends on the CLIP and on the side:
`benchmarks/bench_dense.py` measures it.

b pictures, n boxes, S side of the input in pixels, C channels and h x w cells of the feature map, k bins a side of a
box, D embedding size.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.helpers import to_2tuple
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torchvision.ops import roi_align

from hdovd.core import HdovdError

SUPPORTED = (
    "open_clip's ModifiedResNet (RN50 and its family), open_clip's VisionTransformer without attentional pool "
    "(ViT-B-32 and its family), timm's VisionTransformer and Eva with plain patches (SigLIP, EVA02, PE)"
)
BOXES_AT_A_TIME = 64  # always so many: bounds memory, and what a box gives does not depend on how many there are


class DenseClip:
    """The visual tower of a frozen CLIP, asked for boxes of whole pictures.

    The tower's weights are shared, not copied, and it goes on answering `encode_image`. It must be on its device. For
    half precision call `embed_boxes` under `torch.autocast`.
    """

    def __init__(self, visual: nn.Module, side: int) -> None:
        """Raises HdovdError if the tower has no map that boxes could be taken from, or none at this side."""
        cell = _cell(visual)
        if side < cell or side % cell:
            raise HdovdError(
                f"side {side}: the feature map of this CLIP has cells of {cell} pixels, so the side is a multiple of "
                f"that, such as {near_side(visual, side)}"
            )
        self._tower, self._side = _tower(visual, side, side // cell), side
        self._device = next(visual.parameters()).device

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the answers beside the CLIP itself: JSON values."""
        return {
            "kind": "dense",
            "side": self._side,
            **self._tower.identity,
            "roi_align": {"bins": self._tower.bins, "sampling_ratio": self._tower.samples, "aligned": True},
        }

    @torch.inference_mode()
    def embed_boxes(self, pixels: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        """The embeddings of boxes, picture by picture, in the order given: (sum n_i, D) float32, L2-normalised.

        Args:
            pixels: (b, 3, S, S), preprocessed float.
            boxes: b tensors (n_i, 4), xyxy in pixels of the S x S input; n_i may be 0. A box is cut to the picture, and
            is at least a
                pixel wide and high, as in `crop_recipe`'s plain box.
        """
        rois = _rois(boxes, self._side).to(self._device)
        tower = self._tower
        features = tower.map(pixels.to(self._device))
        filled = F.pad(rois, (0, 0, 0, -len(rois) % BOXES_AT_A_TIME if len(rois) else BOXES_AT_A_TIME))
        exact, scale = features.float(), features.shape[-1] / self._side  # RoIAlign knows no bfloat16 on a CPU
        rows = [
            tower.pool(roi_align(exact, some, tower.bins, scale, tower.samples, aligned=True).to(features.dtype))
            for some in filled.split(BOXES_AT_A_TIME)
        ]
        return F.normalize(torch.cat(rows)[: len(rois)].float(), dim=1)


def near_side(visual: nn.Module, side: int) -> int:
    """The side next to `side` of which the tower's map has whole cells."""
    cell = _cell(visual)
    return max(cell, round(side / cell) * cell)


def _cell(visual: nn.Module) -> int:
    """Input pixels a side of a cell of the tower's map; 1 where there is none."""
    if isinstance(visual, ModifiedResNet):
        return 16  # of layer 3
    patched: Any = getattr(visual.trunk, "patch_embed", None) if isinstance(visual, TimmModel) else visual
    height, width = to_2tuple(getattr(patched, "patch_size", 1))
    if height != width:
        raise HdovdError(f"no dense features of a CLIP whose patches are {height}x{width} pixels: they must be square")
    return int(height)


def scale_boxes(boxes: Tensor, width: int, height: int, side: int) -> Tensor:
    """Boxes (n, 4), xyxy in pixels of a picture of `width` x `height`, in pixels of its squashed S x S form."""
    return boxes * boxes.new_tensor([side / width, side / height] * 2)


def _tower(visual: nn.Module, side: int, cells: int) -> "_ResNet | _OpenClipVit | _TimmVit":
    """The two halves of a visual tower: `map` (b, 3, S, S) -> (b, C, h, w), `pool` (n, C, k, k) -> (n, D).
    `samples`: a side of a bin; -1: one a cell. cells: a side of the map.
    """
    if isinstance(visual, ModifiedResNet):
        return _ResNet(visual)
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type in ("tok", "avg"):
        return _OpenClipVit(visual, cells)
    if isinstance(visual, TimmModel) and isinstance(visual.trunk, TimmVisionTransformer | Eva) and _is_plain(visual):
        return _TimmVit(visual, side, cells)
    trunk = visual.trunk if isinstance(visual, TimmModel) else visual
    raise HdovdError(
        f"no dense features of this CLIP: its visual tower, a {type(trunk).__name__} by {type(trunk).__module__}, "
        f"is not among those supported: {SUPPORTED}. "
        "Take crops instead"
    )


class _ResNet:
    """Layer 3 of the picture; layer 4 and the attention pool a box, on the grid that they were trained with
    (RegionCLIP, CORA).

    RoIAlign on layer 4's map would be cheaper; with the demo's CLIP it loses most of the accuracy, at every side. One
    sample a bin was as good as the average of several, or better where boxes are large: layer 4 knows no features that
    are averages.
    """

    samples = 1

    def __init__(self, visual: ModifiedResNet) -> None:
        self._visual = visual
        self.bins = 2 * math.isqrt(len(visual.attnpool.positional_embedding) - 1)  # layer 4 halves it
        self.identity: dict[str, Any] = {"features": "layer 3, then layer 4 and attention pool a box"}

    def map(self, pixels: Tensor) -> Tensor:
        v = self._visual
        return cast(Tensor, v.layer3(v.layer2(v.layer1(v.stem(pixels)))))

    def pool(self, bins: Tensor) -> Tensor:
        return cast(Tensor, self._visual.attnpool(self._visual.layer4(bins)))


class _OpenClipVit:
    """Patch tokens, normalised and averaged over the box, then projected.

    A model that answers with its class token never answers with patch tokens. The last block's attention is left out
    for them: a token's own value, with residual and MLP (MaskCLIP, arXiv 2112.01071, in the form that it was published
    in). Tiny ViTs trained on crops of the demo world answer by chance with this and every other form, so measure yours
    before you trust it.
    """

    bins = 1
    samples = -1

    def __init__(self, visual: VisionTransformer, cells: int) -> None:
        self._visual = _sharing_weights(visual)
        self._visual.positional_embedding = _resized(visual.positional_embedding, visual.grid_size, cells)
        by_class_token = visual.pool_type == "tok"
        if by_class_token:
            block = self._visual.transformer.resblocks[-1]
            block.attn = _OwnValue(block.attn)
        self._norm_last = visual.final_ln_after_pool
        self.identity = _vit_identity("mean, final norm" if self._norm_last else "final norm, mean", by_class_token)

    def map(self, pixels: Tensor) -> Tensor:
        options = {"intermediates_only": True, "normalize_intermediates": not self._norm_last}
        return cast(Tensor, self._visual.forward_intermediates(pixels, indices=1, **options)["image_intermediates"][0])

    def pool(self, bins: Tensor) -> Tensor:
        mean = bins.flatten(1)
        return cast(Tensor, (self._visual.ln_post(mean) if self._norm_last else mean) @ self._visual.proj)


class _TimmVit:
    """As `_OpenClipVit`; with an attention pool in the model's head (SigLIP), that pools the box, on the grid that it
    was trained with.
    """

    def __init__(self, visual: TimmModel, side: int, cells: int) -> None:
        trunk = visual.trunk
        self._visual = _sharing_weights(visual)
        own = self._visual.trunk
        own.set_input_size(img_size=(side, side))  # rotary position embeddings too
        if trunk.pos_embed is not None:
            prefix = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
            own.pos_embed = _resized(trunk.pos_embed, trunk.patch_embed.grid_size, cells, prefix)
        by_class_token = trunk.attn_pool is None and trunk.global_pool == "token"
        if by_class_token:
            own.blocks[-1].attn = _OwnValue(own.blocks[-1].attn)
        self.bins: int = 1 if trunk.attn_pool is None else max(trunk.patch_embed.grid_size)
        self.samples = -1 if trunk.attn_pool is None else 1
        pool = "mean" if trunk.attn_pool is None else "attention pool a box"
        self.identity = _vit_identity(
            pool if isinstance(trunk.norm, nn.Identity) else f"final norm, {pool}", by_class_token
        )

    def map(self, pixels: Tensor) -> Tensor:
        trunk = self._visual.trunk
        return cast(Tensor, trunk.forward_intermediates(pixels, indices=1, norm=True, intermediates_only=True)[0])

    def pool(self, bins: Tensor) -> Tensor:
        trunk, tokens = self._visual.trunk, bins.flatten(2).transpose(1, 2)
        pooled = tokens.mean(dim=1) if trunk.attn_pool is None else trunk.attn_pool(tokens)
        return cast(Tensor, self._visual.head(trunk.head(trunk.fc_norm(pooled))))


class _OwnValue(nn.Module):
    """An attention in which every token attends to itself alone: what comes out is its own value, through the output
    projection.

    As a mask, so that it holds for every kind of attention (heads that are scaled, inner norms, rotary embeddings).
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, *others: Tensor, **options: Any) -> Any:
        """x (b, tokens, C); `others` and `options` as the attention takes them."""
        mask = x.new_full((x.shape[1], x.shape[1]), -torch.inf).fill_diagonal_(0)
        return self.attention(x, *others, **{**options, "attn_mask": mask})


def _sharing_weights(module: nn.Module) -> Any:
    """A copy whose parts can be exchanged, with the parameters of the original themselves."""
    return copy.deepcopy(module, {id(weights): weights for weights in module.parameters()})


def _resized(embedding: Tensor, grid: tuple[int, int], cells: int, prefix: int = 1) -> nn.Parameter:
    """Position embeddings ([1,] prefix + h * w, C) for `cells` x `cells` patches, in the shape given; those of the
    prefix as they are.
    """
    of_prefix, of_grid = embedding.detach().flatten(0, -2).float().split((prefix, grid[0] * grid[1]))
    as_map = of_grid.T.reshape(1, -1, *grid)
    if grid != (cells, cells):
        as_map = F.interpolate(as_map, (cells, cells), mode="bicubic", align_corners=False, antialias=False)
    resized = torch.cat([of_prefix, as_map[0].flatten(1).T]).to(embedding.dtype)
    return nn.Parameter(resized.reshape(*embedding.shape[:-2], *resized.shape), requires_grad=False)


def _vit_identity(after: str, by_class_token: bool) -> dict[str, Any]:
    return {
        "features": f"patch tokens, {after}",
        "last_attention": "every token attends to itself alone" if by_class_token else "as trained",
        "position_embeddings": "bicubic, no antialias, corners not aligned",
    }


def _is_plain(visual: TimmModel) -> bool:
    """Whether the tower is patches, blocks with attention, and a pool of their tokens, with nothing that this file does
    not know of.
    """
    trunk = visual.trunk
    pool = (
        trunk.global_pool in ("token", "avg")
        if trunk.attn_pool is None
        else (isinstance(trunk.attn_pool, AttentionPoolLatent) and trunk.attn_pool.pos_embed is None)
    )
    return (
        pool
        and not hasattr(visual.head, "pool")
        and type(trunk.patch_embed) is PatchEmbed
        and hasattr(trunk.blocks[-1], "attn")
    )


def _rois(boxes: Sequence[Tensor], side: int) -> Tensor:
    """RoIAlign's form of the boxes, on the CPU: (n, 5) float32, the picture's number and xyxy."""
    rows = [torch.zeros(0, 5)]
    for number, some in enumerate(boxes):
        some = some.float().cpu()
        low = some[:, :2].clamp(0, side - 1)
        high = torch.maximum(some[:, 2:].clamp(max=side), low + 1)
        rows.append(torch.cat([torch.full_like(low[:, :1], number), low, high], dim=1))
    return torch.cat(rows)
