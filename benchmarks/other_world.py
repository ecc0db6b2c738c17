"""A second drawn world, of another kind than the demo's: do hdovd's defaults hold where nobody tuned them?

    python benchmarks/other_world.py OUT [--seed 0] [--train-images 1000] [--val-images 250]

OUT/world is a COCO folder with its protocol: 60 classes, 45 base and 15 novel, all of which the shipped vocabulary
holds; no captions. OUT/teacher is a CLIP in open_clip's `local-dir:` form, trained on captioned crops of other
pictures of this world; a ViT of that cost learns too little in minutes. The commands to run next are printed.

A class is a pictogram: a closed smooth outline and a pattern of two tones in it, both drawn once from CLASS_SEED. Some
classes share the outline, some the pattern, none both. An object varies in colours, turn, aspect, mirror, light, grain,
sharpness. Objects are small, many, and follow the kind of scene; grounds are smooth noise with blobs of no class.
"""

from __future__ import annotations

import argparse
import colorsys
import json
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.common.process import limit_threads
from hdovd.pipelines.demo.run import captioned_crops, fit_clip, save_clip
from hdovd.pipelines.demo.world import Scene, scenes, write_instances
from hdovd.pipelines.teachers.openclip import load_clip

_BASE = """apple backpack banana barrel basket beetle bench bucket camel canoe carrot cello chair compass cushion dice
dolphin drum eagle fan flute fork frog giraffe globe goose helmet kettle kite lantern lemon lobster magnet mirror monkey
mug owl padlock piano pizza pumpkin rocket shark sofa teapot"""
_NOVEL = "scarf snail spider squirrel sword tent tiger toaster tomato trumpet vase whale windmill wolf zebra"
BASE, NOVEL = tuple(_BASE.split()), tuple(_NOVEL.split())
NAMES = tuple(sorted((*BASE, *NOVEL)))
ROOMS = ("kitchen", "garage", "meadow", "beach", "attic", "stage")
CLASS_SEED = 7
OUTLINES, PATTERNS = 44, 48  # of 60 classes: the others share one
SUPERSAMPLED = 3
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 2, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
TEMPLATES = ("{}", "a photo of a {}", "one {}", "a {} seen close up", "there is a {} here", "the {}")


@dataclass(frozen=True, slots=True)
class Look:
    """A class: the outline's `radius` at 360 angles, 1 at most, and the share of the first tone on a square of side 2
    around its centre.
    """

    radius: np.ndarray
    pattern: np.ndarray


def outline(rng: np.random.Generator) -> np.ndarray:
    """A superformula with a few low waves on it: smooth, closed, 1 at its farthest."""
    angle = np.radians(np.arange(360))
    lobes, n1, n2 = int(rng.integers(2, 8)), rng.uniform(0.6, 4), rng.uniform(1.5, 8)
    one, two = np.abs(np.cos(lobes * angle / 4)), np.abs(np.sin(lobes * angle / 4))
    if lobes % 2:  # of an odd number the formula closes after two turns only
        one, two = np.abs(np.cos(lobes * angle / 2)), np.full(360, rng.uniform(0.4, 0.9))
    radius = (one**n2 + two**n2) ** (-1 / n1)
    radius = np.clip(radius / radius.max(), 0.42, 1)
    for wave in (1, 2, 3):
        radius = radius * (1 + rng.uniform(0, 0.22) * np.cos(wave * angle + rng.uniform(0, 2 * np.pi)))
    kernel = np.hanning(17)
    radius = np.convolve(np.tile(radius, 3), kernel / kernel.sum(), "same")[360:720]
    return np.asarray(radius / radius.max())


def pattern(rng: np.random.Generator, side: int = 96) -> np.ndarray:
    """Mosaic, rings, spots, bars or wedges, in two tones."""
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    kind = rng.integers(5)
    while True:
        if kind == 0:  # mirrored cells
            half = rng.random((4, 2)) < 0.5
            tone = np.kron(np.hstack([half, half[:, ::-1]]), np.ones((side // 4, side // 4)))
        elif kind == 1:
            edges = np.sort(rng.uniform(0.15, 0.85, rng.integers(1, 4)))
            tone = np.searchsorted(edges, np.hypot(x, y * rng.uniform(0.6, 1.6))) % 2
        elif kind == 2:
            spots = rng.uniform((-0.65, -0.65, 0.18), (0.65, 0.65, 0.34), (int(rng.integers(2, 6)), 3))
            tone = np.any([np.hypot(x - cx, y - cy) < r for cx, cy, r in spots], axis=0)
        elif kind == 3:
            turn, edges = rng.uniform(0, np.pi), np.sort(rng.uniform(-0.7, 0.7, rng.integers(1, 5)))
            tone = np.searchsorted(edges, x * np.cos(turn) + y * np.sin(turn)) % 2
        else:
            edges = np.sort(rng.uniform(-np.pi, np.pi, 2 * rng.integers(1, 4)))
            tone = np.searchsorted(edges, np.arctan2(y, x)) % 2
        if 0.25 < np.asarray(tone, float)[side // 5 : -side // 5, side // 5 : -side // 5].mean() < 0.75:
            return np.asarray(tone, np.float32)


def looks() -> dict[str, Look]:
    """Of all classes. Those after the first OUTLINES and PATTERNS, in an order of chance, take one of another."""
    rng = np.random.default_rng(CLASS_SEED)
    radii, patterns = ([draw(rng) for _ in range(n)] for draw, n in ((outline, OUTLINES), (pattern, PATTERNS)))
    of_outline = [*range(OUTLINES), *range(len(NAMES) - OUTLINES)]
    of_pattern = [*range(PATTERNS), *range(20, 20 + len(NAMES) - PATTERNS)]
    order = rng.permutation(len(NAMES))
    return {NAMES[k]: Look(radii[of_outline[i]], patterns[of_pattern[i]]) for i, k in enumerate(order)}


LOOKS = looks()
_rng = np.random.default_rng(CLASS_SEED + 1)
_ranks = 1 + _rng.permutation(len(NAMES))
FREQUENCY = _ranks**-0.44  # the most frequent class is six times the rarest
_thirds = [np.array_split(_rng.permutation(len(NAMES)), 3) for _ in range(len(ROOMS) // 3)]
LIKED = np.vstack(_thirds)  # a row of classes for each of ROOMS; a class is liked by two


def colour(rng: np.random.Generator, hue: float, low: float, high: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.15, 0.9), rng.uniform(low, high))) * 255


def paint(look: Look, longer_px: float, rng: np.random.Generator) -> Image.Image:
    """One object, RGBA, cropped to its outline; the longer side is `longer_px`."""
    turn, aspect, mirror = np.radians(rng.uniform(-20, 20)), rng.uniform(0.8, 1.25), rng.choice([-1, 1])
    move = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.diag([mirror * aspect, 1])
    angle = np.radians(np.arange(360))
    rim = (look.radius * np.stack([np.cos(angle), np.sin(angle)])).T @ move.T
    low, high = rim.min(0), rim.max(0)
    width, height = np.maximum(np.round((high - low) * longer_px / (high - low).max()), 6).astype(int)
    at = [
        lo + (np.arange(n * SUPERSAMPLED) + 0.5) / (n * SUPERSAMPLED) * (hi - lo)
        for n, lo, hi in zip((width, height), low, high, strict=True)
    ]
    x, y = np.tensordot(np.linalg.inv(move), np.stack(np.meshgrid(*at)), 1)
    inner = np.hypot(x, y) / look.radius[np.degrees(np.arctan2(y, x)).round().astype(int) % 360]
    rows, columns = (np.clip((v + 1) / 2 * len(look.pattern), 0, len(look.pattern) - 1).astype(int) for v in (y, x))
    first = look.pattern[rows, columns][..., None]
    hue, tones = rng.random(), [(0.62, 1.0), (0.1, 0.42)]
    one, two = (colour(rng, hue + shift, *tone) for shift, tone in zip((0, rng.uniform(-0.3, 0.3)), tones, strict=True))
    if rng.random() < 0.5:
        one, two = two, one
    pixels = first * one + (1 - first) * two
    pixels = np.where(inner[..., None] > 0.9, 0.5 * pixels, pixels)
    light = rng.uniform(-0.3, 0.3, 2)
    pixels = pixels * (1 + light[0] * np.linspace(-1, 1, x.shape[1])[:, None])
    pixels = pixels * (1 + light[1] * np.linspace(-1, 1, x.shape[0])[:, None, None])
    shape, inside = (height, SUPERSAMPLED, width, SUPERSAMPLED, -1), (inner < 1)[..., None].astype(float)
    alpha = inside.reshape(shape).mean((1, 3))
    mean = (pixels * inside).reshape(shape).mean((1, 3)) / np.maximum(alpha, 1e-6)
    mean += rng.normal(0, rng.uniform(2, 12), (height, width, 1))
    return Image.fromarray(np.clip(np.dstack([mean, alpha * 255]), 0, 255).astype(np.uint8))


def noise(width: int, height: int, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Value noise in 0..1: each octave of smaller cells half as strong."""
    total = np.zeros((height, width))
    for octave, cell in enumerate(cells):
        grid = rng.random((int(height / cell) + 3, int(width / cell) + 3)).astype(np.float32)
        total += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) * 0.5**octave
    low, high = np.percentile(total, (1, 99))
    return np.asarray(np.clip((total - low) / (high - low), 0, 1))


def ground(room: int, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Three colours of the kind of scene, mixed by noise, with blobs that are nothing."""
    of_room = np.random.default_rng((CLASS_SEED, room))
    hues = room / len(ROOMS) + of_room.uniform(-0.12, 0.12, 3) + rng.normal(0, 0.03, 3)
    stops = np.array([colour(of_room, hue, 0.25, 0.85) for hue in hues]) * rng.uniform(0.75, 1.2)
    value = noise(width, height, of_room.permutation((70, 34, 15, 7)), rng)
    pixels = np.stack([np.interp(value, (0, 0.5, 1), stops[:, c]) for c in range(3)], axis=-1)
    pixels += rng.normal(0, rng.uniform(1, 6), (height, width, 1))
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    for _ in range(int(rng.integers(3, 9))):
        radius = outline(rng)
        flat = paint(Look(radius, np.full((2, 2), 0.5, np.float32)), rng.uniform(10, 60), rng)
        share = rng.uniform(0.35, 0.8)
        soft = flat.getchannel("A").point([int(a * share) for a in range(256)])
        plain = Image.new("RGB", flat.size, tuple(int(c) for c in colour(rng, rng.random(), 0.2, 0.9)))
        corner = (int(rng.integers(-10, width - 5)), int(rng.integers(-10, height - 5)))
        picture.paste(plain, corner, soft)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))


def of_room(frequency: np.ndarray, room: int, rng: np.random.Generator) -> str:
    """A class by its frequency, five times as often where this kind of scene likes it."""
    chance = frequency * np.where(np.isin(np.arange(len(NAMES)), LIKED[room]), 5, 1)
    return str(rng.choice(NAMES, p=chance / chance.sum()))


def any_class(room: int, names: list[str], rng: np.random.Generator) -> str:
    return of_room(FREQUENCY, room, rng)


Pick = Callable[[int, list[str], np.random.Generator], str]  # room, names of the objects so far, randomness: a class


def draw_scene(seed: int, index: int, pick: Pick = any_class) -> Scene:
    """Draw one picture with 3 to 10 objects, the class of each by `pick`; one may hide a third of another."""
    rng = np.random.default_rng((seed, index))
    width, height = int(rng.integers(200, 249)), int(rng.integers(144, 177))
    room = int(rng.integers(len(ROOMS)))
    image = ground(room, width, height, rng)
    boxes, names = list[tuple[float, ...]](), list[str]()
    for _ in range(int(rng.integers(3, 11))):
        name = pick(room, names, rng)
        thing = paint(LOOKS[name], 14 + 46 * rng.beta(1.1, 2.0), rng)
        for _ in range(20):
            x, y = (int(rng.integers(0, room_for + 1)) for room_for in (width - thing.width, height - thing.height))
            box = (x, y, x + thing.width, y + thing.height)
            if all(max(covered(box, other), covered(other, box)) <= 0.33 for other in boxes):
                break
        else:
            continue
        shade = Image.new("L", (thing.width + 12, thing.height + 12))
        shade.paste(thing.getchannel("A").point(lambda a: a // 2), (6, 6))
        image.paste((0, 0, 0), (x - 4, y - 3), shade.filter(ImageFilter.GaussianBlur(2)))
        image.paste(thing, (x, y), thing)
        if rng.random() < 0.3:
            image.paste(image.crop(box).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9))), (x, y))
        boxes.append(tuple(map(float, box)))
        names.append(name)
    told = " and a ".join(rng.permutation(list(dict.fromkeys(names)))[:4])
    return Scene(image, np.array(boxes, np.float32), tuple(names), ROOMS[room], f"a {told} in a {ROOMS[room]}")


def covered(inner: tuple[float, ...], outer: tuple[float, ...]) -> float:
    """Share of `inner` that `outer` covers."""
    width, height = (min(inner[k + 2], outer[k + 2]) - max(inner[k], outer[k]) for k in (0, 1))
    return max(width, 0) * max(height, 0) / ((inner[2] - inner[0]) * (inner[3] - inner[1]))


def make_world(root: Path, train_images: int, val_images: int, seed: int, workers: int = 2) -> None:
    """Write train2017/, val2017/, annotations/ and protocol.toml under `root`."""
    for split, count, offset in (("train2017", train_images, 0), ("val2017", val_images, 500_000)):
        pictures = scenes(count, seed, offset, workers, draw_scene)
        write_instances(root, split, pictures, list(NAMES), offset + 1)
    protocol = f'name = "other-world"\nbase = {json.dumps(BASE)}\nnovel = {json.dumps(NOVEL)}\n'
    write_text(root / "protocol.toml", protocol)


def make_teacher(folder: Path, seed: int, scene_count: int = 1200, steps: int = 750, workers: int = 2) -> str:
    """Train a CLIP on scenes of its own, and save it. Returns its `local-dir:` name."""
    pictures = scenes(scene_count, seed + 1000, 0, workers, draw_scene)
    pictures[::2] = [replace(scene, ground="background") for scene in pictures[::2]]  # what patches are called
    images, captions = captioned_crops(pictures, seed, MODEL_CFG["vision_cfg"]["image_size"], TEMPLATES)
    print(f"teacher: {len(images):,d} captioned crops, {steps} steps", flush=True)
    model = fit_clip(images, captions, seed, steps=steps, in_bf16=False, model_cfg=MODEL_CFG)
    folder.mkdir(parents=True, exist_ok=True)
    save_clip(model, folder, MODEL_CFG)
    return f"local-dir:{folder}"


def named_rightly(
    clip: str, seed: int, scene_count: int = 150, workers: int = 2, novel: Collection[str] = NOVEL
) -> dict[str, float]:
    """Share of the objects of unseen scenes that the teacher names rightly: of all, and of some of them."""
    teacher, side = load_clip(clip, None, device="cpu"), MODEL_CFG["vision_cfg"]["image_size"]
    pictures = scenes(scene_count, seed + 2000, 0, workers, draw_scene)
    objects = [(s.image, tuple(box), name) for s in pictures for box, name in zip(s.boxes, s.names, strict=True)]
    crops = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box)) for image, box, _ in objects]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    rows = np.concatenate([teacher.embed_images(part) for part in pixels.split(256)])
    labels = np.array([NAMES.index(name) for _, _, name in objects])
    longer = np.array([max(box[2] - box[0], box[3] - box[1]) for _, box, _ in objects])
    others = [name for name in shipped("general") if name not in NAMES]
    scores = rows @ teacher.embed_names([*NAMES, *others], ["a photo of a {}"]).T
    right = scores[:, : len(NAMES)].argmax(1) == labels
    return {
        "of all 60": float(right.mean()),
        "novel": float(right[[name in novel for _, _, name in objects]].mean()),
        "under 24 pixels": float(right[longer < 24].mean()),
        "24 pixels and more": float(right[longer >= 24].mean()),
        f"of {scores.shape[1]}, the shipped vocabulary": float((scores.argmax(1) == labels).mean()),
    }


def next_commands(out: Path, clip: str) -> list[str]:
    """From proposals to AP, on defaults of the small recipe."""
    data = f"--data {out}/world --protocol {out}/world/protocol.toml"
    return [
        f"hdovd propose {data} --recipe demo --out {out}/proposals.json --backbone-out {out}/backbone.safetensors",
        f"hdovd extract-clip {data} --cache {out}/cache --clip {clip} --vocabulary general "
        f"--proposals {out}/proposals.json",
        f"hdovd calibrate --cache {out}/cache --out {out}/calibration.toml",
        f"hdovd train {data} --cache {out}/cache --recipe demo --calibration {out}/calibration.toml "
        f"--set detector.backbone.weights={out}/backbone.safetensors --out {out}/run",
        f"hdovd eval {out}/run --data {out}/world",
    ]


def world_arguments(page: str, val_images: int = 250) -> argparse.Namespace:
    """Of a script that draws a world: where, and how much. `page`: its docstring."""
    parser = argparse.ArgumentParser(description=page.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, default in (("seed", 0), ("train-images", 1000), ("val-images", val_images), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    limit_threads()
    given = world_arguments(__doc__)
    since = time.monotonic()
    make_world(given.out / "world", given.train_images, given.val_images, given.seed, given.workers)
    print(f"world: {given.out / 'world'}, {time.monotonic() - since:.0f} s", flush=True)
    since = time.monotonic()
    clip = make_teacher((given.out / "teacher").absolute(), given.seed, workers=given.workers)
    print(f"teacher: {clip}, {time.monotonic() - since:.0f} s; names rightly, in percent:")
    for whom, share in named_rightly(clip, given.seed, workers=given.workers).items():
        print(f"{100 * share:6.1f}  {whom}")
    print("\nnext:", *next_commands(given.out, clip), sep="\n  ")


if __name__ == "__main__":
    main()
