"""The dense teacher against hand-computed answers, on tiny random towers of every family that it supports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from hdovd.core import HdovdError
from hdovd.pipelines.teachers import dense as dense_clip
from hdovd.pipelines.teachers.dense import DenseClip, near_side, scale_boxes
from hdovd.pipelines.teachers.openclip import load_clip

DIM = 24


def _resnet() -> ModifiedResNet:
    return ModifiedResNet([1, 1, 1, 1], DIM, heads=4, image_size=64, width=8)


def _vit(**changes: Any) -> VisionTransformer:
    return VisionTransformer(
        **{"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2.0, "output_dim": DIM}
        | changes
    )


def _timm(name: str, pool: str, proj: str | None, *, blocks: int = 2) -> TimmModel:
    tower = TimmModel(name, DIM if proj != "none" else 64, pool=pool, proj=proj)
    tower.trunk.blocks = tower.trunk.blocks[:blocks]
    return tower


# builder and native side. "class token": the last block's values; "pooled": the model's own pool, a box
CLASS_TOKEN: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "open_clip ViT": (_vit, 32),
    "open_clip ViT, custom blocks": (lambda **c: _vit(qk_norm=True, scale_heads=True, scale_attn_inner=True, **c), 32),
    "timm ViT": (lambda layers=2: _timm("test_vit", "token", "linear", blocks=layers), 160),
    "timm EVA02": (lambda layers=2: _timm("eva02_tiny_patch14_224", "token", None, blocks=layers), 224),
}
POOLED: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "ModifiedResNet": (_resnet, 64),
    "open_clip ViT, average": (lambda: _vit(pool_type="avg", no_ln_pre=True, final_ln_after_pool=True), 32),
    "open_clip ViT, average of normed": (lambda: _vit(pool_type="avg"), 32),
    "timm ViT, average": (lambda: _timm("test_vit", "avg", "linear"), 160),
    "timm ViT, average, then norm": (lambda: _timm("test_vit2", "avg", "linear"), 160),
    "timm SigLIP": (lambda: _timm("test_vit", "map", "none"), 160),
}
ALL = CLASS_TOKEN | POOLED


def _seeded(build: Callable[..., nn.Module], **changes: Any) -> nn.Module:
    """A tower in eval mode whose weights and statistics are all random: none is zero or one by its initialisation."""
    generator = torch.Generator().manual_seed(0)
    tower = build(**changes).eval().requires_grad_(False)
    for name, value in tower.state_dict().items():
        if value.ndim < 2 and value.is_floating_point():
            positive = name.endswith(("running_var", "weight"))
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(noise + 0.5 if positive else (noise - 0.5) / 4)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5)
    return tower


def _pixels(count: int, side: int, seed: int = 1) -> Tensor:
    """Pictures (count, 3, side, side) of coloured tiles, 4 pixels wide at least: finer noise looks the same
    everywhere."""
    tiles = torch.randn(count, 3, min(side // 4, 16), min(side // 4, 16), generator=torch.Generator().manual_seed(seed))
    return 2 * F.interpolate(tiles, (side, side))


def _some_boxes(side: int) -> list[Tensor]:
    """Boxes of three pictures, none in the second, in shares of the side: thin, tiny, whole and ordinary ones."""
    shares = [
        [[0.1, 0.2, 0.6, 0.9], [0, 0, 1, 1], [0.4, 0.05, 0.41, 0.95], [0.71, 0.3, 0.72, 0.31]],
        [],
        [[0.33, 0.5, 0.8, 0.77]],
    ]
    return [torch.tensor(some).reshape(-1, 4) * side for some in shares]


def _whole(side: int) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side]])


# --- against answers computed by hand ---


@pytest.mark.parametrize("name", POOLED)
@torch.inference_mode()
def test_whole_picture_at_native_size_is_what_clip_answers(name: str) -> None:
    build, side = POOLED[name]
    tower, pixels = _seeded(build), _pixels(2, side)
    rows = DenseClip(tower, side).embed_boxes(pixels, [_whole(side)] * 2)
    torch.testing.assert_close(rows, F.normalize(tower(pixels), dim=1), atol=1e-5, rtol=0)
    assert (rows[0] - rows[1]).abs().max() > 0.01


@torch.inference_mode()
def test_resnet_box_on_the_grid_is_its_part_of_layer_3() -> None:
    tower, pixels = _seeded(_resnet), _pixels(2, 128)
    layer3 = tower.get_submodule("layer3")(tower.layer2(tower.layer1(tower.stem(pixels))))
    part = layer3[1:, :, 1:5, 2:6]  # 4 x 4 cells, twice the attention pool's 2 x 2
    expected = tower.get_submodule("attnpool")(tower.get_submodule("layer4")(part))
    rows = DenseClip(tower, 128).embed_boxes(pixels, [torch.zeros(0, 4), torch.tensor([[32.0, 16, 96, 80]])])
    torch.testing.assert_close(rows, F.normalize(expected, dim=1), atol=1e-5, rtol=0)


def _values_by_hand(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    """(b, patches, D): the last block without attention, written out from its weights."""
    x, last = tower._embeds(pixels), tower.transformer.resblocks[-1]
    for block in tower.transformer.resblocks[:-1]:
        x = block(x)
    attention = last.attn
    value = F.linear(last.ln_1(x), attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2])
    x = x + attention.out_proj(value)
    x = x + last.mlp(last.ln_2(x))
    return tower.ln_post(x[:, 1:]) @ tower.proj


@torch.inference_mode()
def test_vit_box_of_one_patch_is_its_value() -> None:
    tower, pixels = _seeded(_vit), _pixels(1, 32)
    patches = torch.tensor([[8.0 * x, 8 * y, 8 * x + 8, 8 * y + 8] for y in range(4) for x in range(4)])
    rows = DenseClip(tower, 32).embed_boxes(pixels, [patches])
    torch.testing.assert_close(rows, F.normalize(_values_by_hand(tower, pixels)[0], dim=1), atol=1e-5, rtol=0)
    assert torch.pdist(rows).min() > 0.01


@torch.inference_mode()
def test_vit_box_on_the_grid_is_the_mean_of_its_patches() -> None:
    tower, pixels = _seeded(_vit), _pixels(1, 32)
    tokens = _values_by_hand(tower, pixels).reshape(4, 4, DIM)
    rows = DenseClip(tower, 32).embed_boxes(pixels, [torch.tensor([[8.0, 0, 32, 16]])])
    torch.testing.assert_close(rows[0], F.normalize(tokens[0:2, 1:4].mean(dim=(0, 1)), dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CLASS_TOKEN)
@torch.inference_mode()
def test_last_block_lets_no_patch_see_another(name: str) -> None:
    """With one block, a patch's embedding follows from its own pixels alone, in every kind of attention."""
    build, side = CLASS_TOKEN[name]
    tower = _seeded(build, layers=1)
    dense = DenseClip(tower, side)
    cell = near_side(tower, 1)
    pixels, other = _pixels(1, side), _pixels(1, side, seed=2)
    other[:, :, cell : 2 * cell, :cell] = pixels[:, :, cell : 2 * cell, :cell]
    patch = [torch.tensor([[0.0, cell, cell, 2 * cell]])]
    torch.testing.assert_close(dense.embed_boxes(pixels, patch), dense.embed_boxes(other, patch), atol=1e-6, rtol=0)
    assert (F.normalize(tower(pixels), dim=1) - F.normalize(tower(other), dim=1)).abs().max() > 0.01


# --- independence ---


@pytest.mark.parametrize("name", ALL)
def test_neither_other_boxes_nor_other_pictures_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, side = ALL[name]
    dense, pixels, boxes = DenseClip(_seeded(build), side), _pixels(3, side), _some_boxes(side)
    together = dense.embed_boxes(pixels, boxes)
    assert together.shape == (5, len(together[0]))
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5), atol=1e-6, rtol=0)
    alone = [dense.embed_boxes(pixels[i : i + 1], [box[None]]) for i, some in enumerate(boxes) for box in some]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    backwards = dense.embed_boxes(pixels.flip(0), [some.flip(0) for some in boxes[::-1]])
    torch.testing.assert_close(together, backwards.flip(0), atol=1e-6, rtol=0)
    monkeypatch.setattr(dense_clip, "BOXES_AT_A_TIME", 2)
    torch.testing.assert_close(together, dense.embed_boxes(pixels, boxes), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_no_boxes_at_all(name: str) -> None:
    build, side = ALL[name]
    dense = DenseClip(_seeded(build), side)
    one = dense.embed_boxes(_pixels(1, side), [_whole(side)])
    assert dense.embed_boxes(_pixels(2, side), [torch.zeros(0, 4)] * 2).shape == (0, one.shape[1])


@pytest.mark.parametrize("name", ALL)
@torch.inference_mode()
def test_the_clip_itself_stays_as_it_was(name: str) -> None:
    build, native = ALL[name]
    tower = _seeded(build)
    pixels, before = _pixels(2, native), {key: value.clone() for key, value in tower.state_dict().items()}
    answer, side = tower(pixels), native // 2
    dense = DenseClip(tower, side)
    dense.embed_boxes(_pixels(1, side), [_whole(side)])
    assert torch.equal(tower(pixels), answer)
    assert tower.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in tower.state_dict().items())
    shared = {weights.data_ptr() for weights in tower.parameters()}
    own = [weights for weights in dense._tower._visual.parameters() if weights.data_ptr() not in shared]
    assert len(own) <= 1  # position embeddings


# --- boxes at the edge ---


def test_boxes_are_cut_to_the_picture_and_a_pixel_at_least() -> None:
    dense, pixels = DenseClip(_seeded(_resnet), 64), _pixels(1, 64)
    given = torch.tensor([[-9.0, 20, 40, 90], [10, 10, 10, 10], [64, 64, 64, 64], [70, 5, 80, 30]])
    meant = torch.tensor([[0.0, 20, 40, 64], [10, 10, 11, 11], [63, 63, 64, 64], [63, 5, 64, 30]])
    torch.testing.assert_close(dense.embed_boxes(pixels, [given]), dense.embed_boxes(pixels, [meant]), atol=0, rtol=0)


# --- position embeddings ---


@pytest.mark.parametrize(("shape", "prefix"), [((17, 6), 1), ((1, 17, 6), 1), ((1, 16, 6), 0)])
def test_position_embeddings_at_native_size_are_untouched(shape: tuple[int, ...], prefix: int) -> None:
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dense_clip._resized(embedding, (4, 4), 4, prefix), embedding)


def test_position_embeddings_are_interpolated_between_patches() -> None:
    """A ramp from left to right, between patches 1 and 2: 1.296875 by the cubic kernel with a = -0.75, 1.25 where
    antialias is on.
    """
    ramp = torch.arange(4.0).repeat(4)[:, None]
    resized = dense_clip._resized(torch.cat([torch.tensor([[99.0]]), ramp]), (4, 4), 8)
    assert resized.shape == (65, 1)
    assert resized[0, 0] == 99
    rows = resized[1:, 0].reshape(8, 8)
    assert torch.equal(rows, rows[:1].expand(8, 8))
    torch.testing.assert_close(rows[0, 3:5], torch.tensor([1.296875, 1.703125]), atol=1e-6, rtol=0)


def test_position_embeddings_of_timm_are_interpolated_the_same_way() -> None:
    """timm's own way, with antialias, gives other values."""
    tower = _seeded(CLASS_TOKEN["timm ViT"][0])
    embedding = tower.get_parameter("trunk.pos_embed")
    own = DenseClip(tower, 320)._tower._visual.trunk.pos_embed
    assert torch.equal(own, dense_clip._resized(embedding, (10, 10), 20))
    assert own.shape == (1, 401, embedding.shape[2])


@pytest.mark.parametrize("name", ALL)
def test_other_sides(name: str) -> None:
    build, native = ALL[name]
    tower = _seeded(build)
    for side in (native // 2, 2 * native):
        dense = DenseClip(tower, side)
        rows = dense.embed_boxes(_pixels(1, side), [torch.tensor([[0.2, 0.2, 0.7, 0.6]]) * side])
        assert rows.isfinite().all()
        assert dense.identity["side"] == side


# --- precision ---


@pytest.mark.parametrize("name", ALL)
def test_bf16_autocast(name: str) -> None:
    build, side = ALL[name]
    dense, pixels, boxes = DenseClip(_seeded(build), side), _pixels(3, side), _some_boxes(side)
    exact = dense.embed_boxes(pixels, boxes)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dense.embed_boxes(pixels, boxes)
    assert rounded.dtype == torch.float32
    assert (rounded * exact).sum(dim=1).min() > 0.99
    assert not torch.equal(rounded, exact)


# --- identity ---


def test_identity_is_plain_and_tells_sides_and_towers_apart() -> None:
    towers = [(_resnet, 64), (_resnet, 128), (_vit, 64), (lambda: _vit(pool_type="avg"), 64)]
    identities = [DenseClip(_seeded(build), side).identity for build, side in towers]
    for identity in identities:
        assert json.loads(json.dumps(identity)) == identity
        assert identity["kind"] == "dense"
    assert len({json.dumps(identity) for identity in identities}) == len(towers)
    assert DenseClip(_seeded(_resnet), 64).identity == identities[0]


# --- refusals ---


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: TimmModel("test_resnet", DIM, pool="avg", proj="linear"), "ResNet by timm.models.resnet"),
        (lambda: _vit(attentional_pool=True, attn_pooler_heads=2), "VisionTransformer by open_clip.transformer"),
        (lambda: _timm("test_vit", "avgmax", "linear"), "VisionTransformer by timm.models.vision_transformer"),
        (lambda: nn.Linear(3, 3), "Linear by torch.nn.modules.linear"),
    ],
    ids=["timm ResNet", "CoCa", "unknown pool", "no tower"],
)
def test_towers_without_a_map_are_refused(build: Callable[[], nn.Module], named: str) -> None:
    with pytest.raises(
        HdovdError, match=rf"a {named}, is not among those supported: .*ModifiedResNet.*VisionTransformer.*Eva"
    ):
        DenseClip(build(), 64)


@pytest.mark.parametrize(("build", "side", "near"), [(_resnet, 100, 96), (_vit, 30, 32), (_vit, 0, 8), (_vit, -8, 8)])
def test_sides_between_cells_are_refused(build: Callable[[], nn.Module], side: int, near: int) -> None:
    with pytest.raises(HdovdError, match=rf"side {side}: .* such as {near}$"):
        DenseClip(build(), side)


@pytest.mark.parametrize("name", ALL)
def test_the_side_near_another_is_one_that_it_takes(name: str) -> None:
    build, native = ALL[name]
    tower, wanted = _seeded(build), 2 * native + 5
    side = near_side(tower, wanted)
    assert abs(side - wanted) <= 8  # half of the largest cell here
    DenseClip(tower, side)


def test_squashed_picture_is_the_models_own_preprocessing(clip: str) -> None:
    """At the model's own side, where its own way is to squash."""
    transform, picture = (
        load_clip(clip, None, device="cpu").transform,
        torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8),
    )
    assert torch.equal(transform.squashed(32).fit(picture), transform.fit(picture))
    assert torch.equal(replace(transform, resize_mode="shortest").squashed(32).fit(picture), transform.fit(picture))
    assert transform.squashed(80).fit(picture).shape == (3, 80, 80)


def test_boxes_are_scaled_with_the_picture() -> None:
    boxes = torch.tensor([[0.0, 0, 160, 120], [80, 30, 120, 60]])
    assert scale_boxes(boxes, 160, 120, 64).tolist() == [[0, 0, 64, 64], [32, 16, 48, 32]]
