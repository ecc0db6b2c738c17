"""A drawn world whose pictures have a kind of scene, and a CLIP that knows it: what is the image level worth there?

    python benchmarks/scene_world.py OUT [--seed 0] [--train-images 1000] [--val-images 250]

OUT/world is a COCO folder with captions, vocabulary and protocol: the demo's 24 classes and its six grounds. Four
classes belong to each ground, base and novel mixed; an object is one of the four nine times in ten, else any of all. So
a ground tells what is in the picture, and one object tells of the others; in the demo's world nothing does.
OUT/teacher is a CLIP in open_clip's `local-dir:` form, trained on captioned crops as the demo's, and on many whole
pictures, all of them others than the world's. The commands to run next are printed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from other_world import world_arguments
from PIL import Image
from torch import Tensor

from hdovd.pipelines.common.process import limit_threads
from hdovd.pipelines.demo.run import MODEL_CFG as DEMO_CFG, TEMPLATES, captioned_crops, fit_clip, save_clip
from hdovd.pipelines.demo.world import Scene, any_class, draw_scene as draw_demo_scene, make_world, scenes

OWN = {
    "grass": ("flower", "tree", "butterfly", "mushroom"),
    "sand": ("bottle", "cactus", "crown", "hourglass"),
    "water": ("anchor", "boat", "fish", "umbrella"),
    "bricks": ("car", "ladder", "lamp", "key"),
    "night": ("candle", "clock", "ghost", "star"),
    "snow": ("bell", "hammer", "house", "heart"),
}
OWN_SHARE = 0.9  # the other objects are of any class, those of the scene too
MODEL_CFG: dict[str, Any] = DEMO_CFG | {"text_cfg": DEMO_CFG["text_cfg"] | {"context_length": 32}}  # longer captions
WHOLE_TEMPLATES = ("a {} in front of {}", "{1} with a {0}")


def pick(ground: str, rng: np.random.Generator) -> str:
    """A class of a picture of this ground."""
    return str(rng.choice(OWN[ground])) if rng.random() < OWN_SHARE else any_class(ground, rng)


def draw_scene(seed: int, index: int) -> Scene:
    return draw_demo_scene(seed, index, pick)


def captioned_wholes(pictures: list[Scene], seed: int, side: int) -> tuple[Tensor, list[str]]:
    """Whole pictures (n, 3, side, side) uint8 and their captions: the scene's, or a short one of one object, half of
    these with the ground.
    """
    rng = np.random.default_rng((seed, 1))
    captions = list[str]()
    for scene in pictures:
        form, name = rng.random(), str(rng.choice(scene.names))
        if form < 0.5:
            captions.append(scene.caption)
        elif form < 0.75:
            captions.append(WHOLE_TEMPLATES[rng.integers(len(WHOLE_TEMPLATES))].format(name, scene.ground))
        else:
            captions.append(TEMPLATES[rng.integers(len(TEMPLATES))].format(name))
    pixels = [np.asarray(scene.image.resize((side, side), Image.Resampling.BICUBIC)) for scene in pictures]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions


def make_teacher(
    folder: Path, seed: int, whole_count: int = 4000, crop_count: int = 1500, steps: int = 800, workers: int = 2
) -> str:
    """Train a CLIP on scenes of its own, crops being of the first `crop_count`; save it. Returns its `local-dir:`
    name.
    """
    side = MODEL_CFG["vision_cfg"]["image_size"]
    pictures = scenes(whole_count, seed + 1000, 0, workers, draw_scene)
    crops, crop_captions = captioned_crops(pictures[:crop_count], seed, side)
    wholes, whole_captions = captioned_wholes(pictures, seed, side)
    print(f"teacher: {len(crops):,d} captioned crops, {len(wholes):,d} whole pictures, {steps} steps", flush=True)
    images, captions = torch.cat([crops, wholes]), crop_captions + whole_captions
    model = fit_clip(images, captions, seed, steps=steps, in_bf16=False, model_cfg=MODEL_CFG)
    folder.mkdir(parents=True, exist_ok=True)
    save_clip(model, folder, MODEL_CFG)
    return f"local-dir:{folder}"


def next_commands(out: Path, clip: str) -> list[str]:
    """From proposals to AP, with the image level and without."""
    data = f"--data {out}/world --protocol {out}/world/protocol.toml"
    backbone = f"{out}/backbone.safetensors"
    train = f"hdovd train {data} --cache {out}/cache --recipe demo --set detector.backbone.weights={backbone}"
    return [
        f"hdovd propose {data} --recipe demo --out {out}/proposals.json --backbone-out {backbone}",
        f"hdovd nouns --captions {out}/world/annotations/captions_train2017.json "
        f"--vocabulary {out}/world/vocabulary.txt --parser match --protocol {out}/world/protocol.toml "
        f"--out {out}/nouns.json",
        f"hdovd extract-clip {data} --cache {out}/cache --clip {clip} --proposals {out}/proposals.json "
        f"--nouns {out}/nouns.json",
        f"{train} --out {out}/three-levels",
        f"{train} --set loss.image.enabled=false --out {out}/two-levels",
        *(f"hdovd eval {out}/{run} --data {out}/world" for run in ("three-levels", "two-levels")),
    ]


def main() -> None:
    limit_threads()
    given = world_arguments(__doc__)
    since, counts = time.monotonic(), {"train_images": given.train_images, "val_images": given.val_images}
    make_world(
        given.out / "world", **counts, seed=given.seed, workers=given.workers, draw=draw_scene, name="scene-world"
    )
    print(f"world: {given.out / 'world'}, {time.monotonic() - since:.0f} s", flush=True)
    since = time.monotonic()
    clip = make_teacher((given.out / "teacher").absolute(), given.seed, workers=given.workers)
    print(f"teacher: {clip}, {time.monotonic() - since:.0f} s")
    print("\nnext:", *next_commands(given.out, clip), sep="\n  ")


if __name__ == "__main__":
    main()
