"""A small AdaMixer, batches, weights that any machine makes alike, a comparison. Used by the tests in `adamixer` and of
released code.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from hdovd.config.recipe import Recipe, load_recipe
from hdovd.data.targets import Targets
from hdovd.modeling.adamixer.model import AdaMixer
from hdovd.modeling.boxes import Detections

REFERENCE = Path(__file__).parents[1] / "data" / "adamixer_reference.json"
BASE, DIM = 5, 16
OWN = {"rpn_cls", "rpn_box", "rpn_aux_cls", "rpn_aux_box"}  # losses that no other detector has
FIRST = "rpn_cls"  # the one that pseudo boxes teach in all epochs
# Of a map of one cell a GroupNorm wants two channels a group.
WIDE = ("detector.backbone.fpn_channels=64",)
WITHOUT_BOXES: set[str] = set()  # those that are not zero where no picture has a box
SMALL = (
    "input.short_side=96",
    "input.long_side=128",
    "detector.backbone.fpn_channels=32",
    "detector.backbone.levels=[2, 3, 4, 5]",
    "detector.proposals.pre_nms=1000",
    "detector.proposals.shuffle=8",
    "detector.decoder.queries=8",
    "detector.decoder.stages=2",
    "detector.decoder.points=6",
    "detector.decoder.out_points=8",
    "detector.decoder.heads=4",
    "detector.decoder.feedforward=48",
    "detector.decoder.objectness_channels=16",
    "detector.decoder.adapter_channels=32",
    "loss.instance.queue=2048",
    "loss.image.queue=512",
    "pseudo_boxes.min_side=32.0",
    "pseudo_boxes.max_per_image=5",
    "pseudo_boxes.from_epoch=2",
    "pseudo_boxes.reliability_centre=0.31",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
    "train.precision=fp32",
    "inference.alpha=0.35",
    "inference.beta=0.65",
    "inference.score_threshold=0.005",
    "inference.nms=0.7",
    "inference.detections_per_image=100",
)


def small(*settings: str) -> Recipe:
    return load_recipe("demo-adamixer", [*SMALL, *settings])


def detector(*settings: str, initialise: bool = True) -> AdaMixer:
    """With the demo's backbone; not trained, but no weight is zero."""
    torch.manual_seed(0)
    model = AdaMixer(small(*settings), DIM, initialise)
    with torch.no_grad():
        for stage in model.stages:
            for part in (stage.offsets, stage.deltas[-1], stage.mixing.parameters_of):
                part.weight.normal_(std=0.02)
        model.adapters.transfer[-1].weight.normal_(std=0.02)
    model.set_object_text(unit(DIM, seed=5))
    return model


def noise(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def unit(*shape: int, seed: int) -> Tensor:
    return F.normalize(noise(*shape, seed=seed), dim=-1)


def pictures(*sizes: tuple[int, int], first: int = 0) -> list[Tensor]:
    """Smooth random pictures of these heights and widths; `first`: the seed of the first."""
    coarse = [100 * noise(1, 3, h // 16 + 1, w // 16 + 1, seed=first + i) + 128 for i, (h, w) in enumerate(sizes)]
    return [
        F.interpolate(c, size, mode="bilinear")[0].clamp(0, 255).byte() for c, size in zip(coarse, sizes, strict=True)
    ]


def targets(
    base: list[list[float]], pseudo: list[list[float]], labels: list[int], seed: int, dim: int = DIM
) -> Targets:
    """Random rows for these boxes; texts of pseudo boxes lie near their crops'."""
    crops = unit(len(pseudo), dim, seed=seed + 1)
    texts = F.normalize(0.45 * crops + 0.9 * unit(len(pseudo), dim, seed=seed + 2), dim=1)
    return Targets(
        torch.tensor(base).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        unit(len(base), dim, seed=seed),
        torch.tensor(pseudo).reshape(-1, 4),
        crops,
        texts,
        unit(dim, seed=seed + 3),
    )


def published_shapes(
    channels: int,
    dim: int,
    stages: int,
    groups: int,
    points: int,
    out_points: int,
    heads: int,
    feedforward: int,
    objectness: int,
    adapter: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the authors' published AdaMixer, or of a smaller one."""
    c, d, wide = channels, dim, channels // groups
    body = torchvision.models.resnet50(weights=None).state_dict()
    shapes = {f"backbone.{k}": tuple(v.shape) for k, v in body.items() if not k.startswith("fc.")}

    def add(prefix: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{prefix}.weight"] = weight
        if bias:
            shapes[f"{prefix}.bias"] = weight[:1]

    for level in range(4):
        add(f"neck.lateral_convs.{level}.conv", c, 256 * 2**level, 1, 1)
        add(f"neck.fpn_convs.{level}.conv", c, c, 3, 3)
    for level in range(5):
        add(f"norms.{level}", c)
    add("rpn_head.token_norm", c)
    for conv in ("conv1", "conv2"):
        add(f"rpn_head.{conv}.conv", c, c, 3, 3, bias=False)
        add(f"rpn_head.{conv}.gn", c)
    for head in ("rpn_head.main_head", "rpn_head.aux_head"):
        shapes |= {f"{head}.obj_scale": (1,), f"{head}.obj_bias": (1,)} | {
            f"{head}.scales.{level}.scale": (1,) for level in range(4)
        }
        for branch, out in (("anchor_deltas", 4), ("objectness_logits", d)):
            add(f"{head}.{branch}.0", c, c, 3, 3)
            add(f"{head}.{branch}.2", out, c, 1, 1)
    for number in range(stages):
        s = f"roi_head.bbox_head.{number}"
        shapes |= {
            f"{s}.iof_tau": (heads,),
            f"{s}.attention.attn.in_proj_weight": (3 * c, c),
            f"{s}.attention.attn.in_proj_bias": (3 * c,),
        }
        for part, weight in {
            "attention.attn.out_proj": (c, c),
            "attention_norm": (c,),
            "ffn.layers.0.0": (feedforward, c),
            "ffn.layers.1": (c, feedforward),
            "ffn_norm": (c,),
            "cls_fcs.0": (c, c),
            "cls_fcs.1": (c,),
            "fc_cls": (d, c),
            "fc_reg": (4, c),
            "objness.0": (objectness, c),
            "objness.2": (1, objectness),
            "sampling_n_mixing.norm": (c,),
            "sampling_n_mixing.sampling_offset_generator.0": (groups * points * 3, c),
            "sampling_n_mixing.adaptive_mixing.parameter_generator.0": (groups * (wide**2 + points * out_points), c),
            "sampling_n_mixing.adaptive_mixing.out_proj": (c, c * out_points),
        }.items():
            add(f"{s}.{part}", *weight)
        for layer in (0, 3, 6):
            add(f"{s}.reg_fcs.{layer}", c, c)
            add(f"{s}.reg_fcs.{layer + 1}", c)
    shapes["roi_head.bg_embedding.weight"] = (1, d)
    for layer, weight in enumerate([(adapter, d), (adapter, adapter), (d, adapter)]):
        add(f"roi_head.visual2text.layers.{layer}", *weight)
    add("roi_head.fc1", adapter, adapter)
    add("roi_head.fc2", d, adapter)
    add("roi_head.linear_transform", d, c)
    add("roi_head.layernorm", c)
    return shapes


def made_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A value for every tensor, drawn by its name; of such sizes that numbers neither vanish nor grow on their way."""
    made = {}
    for name, shape in shapes.items():
        draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("num_batches_tracked"):
            value = np.zeros(shape, dtype=np.int64)
        elif name.endswith(
            "bn3.weight"
        ):  # or rounding in the first layers would grow a thousandfold on its way through the blocks
            value = 0.2 * (1 + 0.1 * draw)
        elif name.endswith("running_var"):
            value = 1 + 0.2 * np.abs(draw)
        elif "fc_reg" in name or "anchor_deltas.2.weight" in name or "sampling_offset_generator.0.weight" in name:
            value = 0.02 * draw
        elif "sampling_offset_generator.0.bias" in name:
            value = 0.4 * draw
        elif len(shape) > 1:
            value = draw * (1.4 if len(shape) == 4 else 1.0) / np.sqrt(np.prod(shape[1:]))
        elif "obj_bias" in name:
            value = -2 + 0.1 * draw
        elif "obj_scale" in name:
            value = 4 + 0.1 * draw
        elif name.endswith(("weight", "scale", "iof_tau")):
            value = 1 + 0.1 * draw
        else:
            value = 0.05 * draw
        made[name] = torch.from_numpy(np.asarray(value)).float() if value.dtype != np.int64 else torch.from_numpy(value)
    return made


SMALL_SHAPE = {
    "channels": 32,
    "dim": DIM,
    "stages": 2,
    "groups": 4,
    "points": 6,
    "out_points": 8,
    "heads": 4,
    "feedforward": 48,
    "objectness": 16,
    "adapter": 32,
}


def reference() -> dict:
    return json.loads(REFERENCE.read_text())


def require_same(found: list[Detections], wanted: dict) -> None:
    """Asserts that detections are those of the authors' code, of which `wanted` has the number and the first ones of
    each picture.
    """
    for one, rows, count in zip(found, wanted["detections"], wanted["counts"], strict=True):
        expected = torch.tensor(rows)
        assert len(one.scores) == count
        torch.testing.assert_close(one.boxes[: len(rows)], expected[:, :4], atol=1e-3, rtol=0)
        torch.testing.assert_close(one.scores[: len(rows)], expected[:, 4], atol=1e-4, rtol=0)
        assert one.labels[: len(rows)].tolist() == expected[:, 5].long().tolist()
