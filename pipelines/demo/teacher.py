"""The demo's teacher: a tiny CLIP of open_clip's own classes, trained on captioned crops of the demo world.

It stands for a CLIP from the web: it has seen every class, novel ones too, with
their names. It is saved in open_clip's `local-dir:` form, so every command reads it as it reads any CLIP.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hdovd.core.log import log
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import choose
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.demo.world import Scene, scenes

MODEL_CFG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
PREPROCESS_CFG: dict[str, Any] = {
    "mean": [0.48, 0.46, 0.41],
    "std": [0.27, 0.26, 0.28],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "a small {}")
_SCENES, _STEPS, _BATCH, _RATE, _LOGIT_SCALE = 1500, 400, 96, 3e-3, 25.0


def demo_teacher(folder: Path, seed: int = 0) -> str:
    """The `local-dir:` name of the demo's CLIP, trained now unless `folder` holds it already."""
    precision, line = choose(Precision.AUTO, torch.device("cpu"), training=True)
    recipe = json.dumps(
        [
            MODEL_CFG,
            PREPROCESS_CFG,
            TEMPLATES,
            _SCENES,
            _STEPS,
            _BATCH,
            _RATE,
            _LOGIT_SCALE,
            seed,
            open_clip.__version__,
            precision,
        ]
    )
    home = folder / f"demo-clip-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if (home / "open_clip_config.json").is_file():
        log(f"reusing the demo CLIP in {home}")
        return f"local-dir:{home}"
    log(line)
    images, captions = captioned_crops(scenes(_SCENES, seed + 1000, 0), seed)  # of its own, and none of the world's
    model = fit_clip(images, captions, seed, steps=_STEPS, in_bf16=precision is Precision.BF16)
    partial = folder / f".{home.name}.{os.getpid()}"  # not mkdtemp's, which would be this user's alone
    save_clip(model, partial)
    try:
        os.rename(partial, home)
    except OSError:  # another demo finished first: its copy is the same
        shutil.rmtree(partial)
    log(f"trained the demo CLIP: {home}")
    return f"local-dir:{home}"


def save_clip(model: open_clip.CLIP, folder: Path, model_cfg: dict[str, Any] = MODEL_CFG) -> None:
    """Write a model of `model_cfg` in open_clip's `local-dir:` form."""
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    replace_file(folder / "open_clip_model.safetensors", lambda partial: save_file(state, partial))
    write_text(
        folder / "open_clip_config.json",
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": PREPROCESS_CFG}, indent=2),
    )


def fit_clip(
    images: Tensor, captions: list[str], seed: int, *, steps: int, in_bf16: bool, model_cfg: dict[str, Any] = MODEL_CFG
) -> open_clip.CLIP:
    """Train a CLIP contrastively on `images` (n, 3, side, side) uint8; pairs with the same caption are positives of
    each other.
    """
    row_of = {text: row for row, text in enumerate(dict.fromkeys(captions))}
    tokens = open_clip.SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"])(list(row_of))
    caption_id = torch.tensor([row_of[c] for c in captions])
    torch.manual_seed(seed)
    model = open_clip.CLIP(**model_cfg).train()
    model.visual.to(memory_format=torch.channels_last)
    torch.nn.init.normal_(model.token_embedding.weight, std=0.1)  # so that short captions differ from the start
    model.logit_scale.data.fill_(np.log(_LOGIT_SCALE))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, _RATE, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.15)
    mean, std = (torch.tensor(PREPROCESS_CFG[k]).view(3, 1, 1) * 255 for k in ("mean", "std"))
    generator = torch.Generator().manual_seed(seed)
    for _ in progress(range(steps), "demo CLIP", "step"):
        rows = torch.randint(len(images), (_BATCH,), generator=generator)
        batch = ((images[rows].float() - mean) / std).contiguous(memory_format=torch.channels_last)
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        used, which = caption_id[rows].unique(return_inverse=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bf16):
            v = model.encode_image(batch)
            t = model.encode_text(tokens[used])
        loss = _multi_positive_loss(
            F.normalize(v.float(), dim=-1), F.normalize(t.float(), dim=-1)[which], model.logit_scale.exp(), which
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
    return model.eval()


def captioned_crops(
    pictures: list[Scene],
    seed: int,
    side: int = MODEL_CFG["vision_cfg"]["image_size"],
    templates: tuple[str, ...] = TEMPLATES,
) -> tuple[Tensor, list[str]]:
    """Crops (n, 3, side, side) uint8 and their captions: every object twice, a patch of ground, now and then the whole
    scene.
    """
    rng = np.random.default_rng(seed)
    parts: list[tuple[Scene, Any, str]] = []
    for scene in pictures:
        limit = np.array([scene.image.width, scene.image.height] * 2, np.float32)
        for box, name in zip(scene.boxes, scene.names, strict=True):
            for _ in range(2):
                size = np.tile(box[2:] - box[:2], 2)
                loose = np.clip(box + rng.normal(0, 0.09, 4) * size, 0, limit)
                if (loose[2:] - loose[:2] >= 8).all():
                    parts.append((scene, tuple(loose), templates[rng.integers(len(templates))].format(name)))
        patch = _empty_patch(scene, rng)
        if patch is not None:
            parts.append((scene, tuple(patch), templates[rng.integers(len(templates))].format(scene.ground)))
        if rng.random() < 0.25:
            parts.append((scene, None, scene.caption))
    crops = [np.asarray(scene.image.resize((side, side), Image.Resampling.BICUBIC, box)) for scene, box, _ in parts]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous(), [caption for _, _, caption in parts]


def _empty_patch(scene: Scene, rng: np.random.Generator) -> np.ndarray | None:
    for _ in range(5):
        size = rng.uniform(20, 50, 2)
        corner = rng.uniform(0, (scene.image.width - size[0], scene.image.height - size[1]))
        box = np.concatenate([corner, corner + size])
        overlap = np.minimum(box[2:], scene.boxes[:, 2:]) - np.maximum(box[:2], scene.boxes[:, :2])
        if not (overlap > 6).all(axis=1).any():
            return box
    return None


def _multi_positive_loss(v: Tensor, t: Tensor, scale: Tensor, caption: Tensor) -> Tensor:
    """Symmetric contrastive loss; rows of `v` and `t` (n, D) with the same caption share the target."""
    logits = scale * v @ t.T
    same = (caption[:, None] == caption[None]).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
