"""`hdovd demo`: the whole main job on a world of our own, every stage through the command a user would type.

World and CLIP are made once; then propose, nouns, extract-clip, for every seed train and eval, base-only
and distilled, the audit, and what there is to look at: detect, cache view, report. Short stages run in this process,
from the same arguments as the printed commands; the long ones that need nothing of each other side by side, in
processes of their own.

The demo's CLIP is a tiny one of open_clip's own classes, trained on captioned crops of the demo world. It stands for a
CLIP from the web: it has seen every class, novel ones too, with their names. It is saved in open_clip's `local-dir:`
form, so every command reads it as it reads any CLIP.
"""

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hdovd.core import HdovdError, Stopped, log, user_cache_folder
from hdovd.pipelines.ablation.grid import AblationTable, Row, markdown, scores_of
from hdovd.pipelines.common.atomic_write import replace_file, write_picture, write_text
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import choose
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.common.process import Job, StopSignal, exit_code, log_end, run_jobs, usable_cores
from hdovd.pipelines.demo.config import MARKER, DemoConfig
from hdovd.pipelines.demo.world import NOVEL, Scene, make_world, scenes
from hdovd.pipelines.runs import read_run

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
    save_clip(fit_clip(images, captions, seed, steps=_STEPS, in_bf16=precision is Precision.BF16), home)
    log(f"trained the demo CLIP: {home}")
    return f"local-dir:{home}"


def save_clip(model: open_clip.CLIP, folder: Path, model_cfg: dict[str, Any] = MODEL_CFG) -> None:
    """Write a model of `model_cfg` in open_clip's `local-dir:` form, whole when its config is there."""
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    # two first demos at once have a name each
    replace_file(folder / "open_clip_model.safetensors", partial(save_file, state), writer=str(os.getpid()))
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
                loose = np.clip(box + rng.normal(0, 0.09, 4) * np.tile(box[2:] - box[:2], 2), 0, limit)
                if (loose[2:] - loose[:2] >= 8).all():
                    parts.append((scene, tuple(loose), templates[rng.integers(len(templates))].format(name)))
        if (patch := _empty_patch(scene, rng)) is not None:
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
    target = F.normalize((caption[:, None] == caption[None]).float(), p=1, dim=1)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


SHOWN_PICTURES = 3
WIDTH_PX = 900
GAP_PX = 6


def telling_pictures(world: Path, novel: tuple[str, ...]) -> list[Path]:
    """The first validation pictures that hold two novel objects or more, `SHOWN_PICTURES` of them; if there are fewer,
    then others.
    """
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    wanted = {c["id"] for c in tree["categories"] if c["name"] in novel}
    counts = Counter(a["image_id"] for a in tree["annotations"] if a["category_id"] in wanted)
    return [
        world / "val2017" / image["file_name"]
        for image in sorted(tree["images"], key=lambda image: counts[image["id"]] < 2)[:SHOWN_PICTURES]
    ]


def image_with_most_proposals(proposals: Path) -> int:
    """Of equals the first in the file."""
    return Counter(int(entry["image_id"]) for entry in json.loads(proposals.read_text())).most_common(1)[0][0]


def small_pictures(detections: list[Path], view: Path, out: Path) -> list[Path]:
    """Write detections.jpg and cache-view.jpg, `WIDTH_PX` wide, into `out`."""
    files = {"detections.jpg": _side_by_side(detections), "cache-view.jpg": _side_by_side([view])}
    for name, picture in files.items():
        picture.thumbnail((WIDTH_PX, WIDTH_PX), Image.Resampling.LANCZOS)
        write_picture(out / name, picture, "JPEG", quality=80, optimize=True)
    return [out / name for name in files]


def _side_by_side(files: list[Path]) -> Image.Image:
    """The pictures, as high as the lowest."""
    pictures, left = [Image.open(file).convert("RGB") for file in files], 0
    height = min(picture.height for picture in pictures)
    pictures = [p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS) for p in pictures]
    sheet = Image.new("RGB", (sum(p.width + GAP_PX for p in pictures) - GAP_PX, height), "white")
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return sheet


DISTILLED, BASE_ONLY = "distilled", "base-only"
PROPOSALS, BACKBONE = "proposals.json", "backbone.safetensors"


def demo(config: DemoConfig, command: Callable[[list[str]], None]) -> None:
    """Run the demo and say what came of it; `command` runs one hdovd command line (without the word hdovd) in this
    process.
    """
    root, began = config.out, time.monotonic()
    config.check()
    if root.exists() and any(root.iterdir()):
        log(f"starting {root} anew")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    stages = _Stages(config, command)
    _world_and_cache(stages)
    runs = _train_and_evaluate(stages)
    pictures = _look(stages, runs)
    rows = [
        Row(name, (), scores_of(dict(enumerate(map(read_run, of_seeds)))), len(of_seeds))
        for name, of_seeds in runs.items()
    ]
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.seconds.items())
    log(
        "",
        markdown(
            AblationTable((), rows, "AP50 in percent, mean (deviation) over seeds, of a drawn world, not of COCO.")
        ),
        f"seconds: {spent}; {time.monotonic() - began:.0f} in all, for some ran side by side",
        "pictures (detections with novel classes in orange; what the cache knows):",
        *(f"  {picture}" for picture in pictures),
        f"report, one page about all runs: {root / 'report' / 'index.html'}",
    )


@dataclass(frozen=True, slots=True)
class _Stages:
    """Runs command lines and says them. `seconds`: of each stage."""

    config: DemoConfig
    command: Callable[[list[str]], None]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def data(self) -> tuple[object, ...]:
        return "--data", self.config.out / "world", "--protocol", self.config.out / "world" / "protocol.toml"

    def run(self, stage: str, *arguments: object) -> None:
        """One command line, in this process."""
        words, since = [str(a) for a in arguments], time.monotonic()
        log(f"\n$ hdovd {shlex.join(words)}")
        self.command(words)
        self.seconds[stage] += time.monotonic() - since

    def job(self, stage: str, *command_lines: Sequence[object]) -> Job:
        """Command lines of hdovd for a process of their own, one after the other."""
        return Job(
            stage,
            tuple((sys.executable, "-m", "hdovd", *map(str, words)) for words in command_lines),
            self.config.out / "logs" / f"{stage}.log",
        )

    def side_by_side(self, jobs: list[Job]) -> None:
        """A training on one core does more than half of one on two: two at a time are sooner done than one after the
        other.

        Raises HdovdError for a job that fails, with the end of its log, and Stopped if a signal came.
        """
        log(
            *(
                f"\n$ hdovd {shlex.join(words[3:])}" if words[1] == "-m" else f"\n$ {shlex.join(words)}"
                for job in jobs
                for words in job.commands
            )
        )
        count = min(len(jobs), usable_cores())
        log(f"\n{count} at a time; what they print is in " + " ".join(shlex.quote(str(job.log)) for job in jobs))

        def on_end(job: Job, _: tuple[str, ...], code: int, seconds: float) -> None:
            if code:
                raise HdovdError(f"{job.name} failed with exit code {code}; {log_end(job.log)}")
            self.seconds[job.name] += seconds
            log(f"{job.name}: {seconds:.0f} s")

        with StopSignal() as stop:
            run_jobs(jobs, [{"OMP_NUM_THREADS": str(usable_cores() // count)}] * count, on_end, stop)
        if stop.signals:
            raise Stopped("stopped; the same command starts the demo anew", exit_code(stop.signals[0]))


def _world_and_cache(stages: _Stages) -> None:
    """The world, its CLIP, proposals and nouns, and the cache of them all."""
    config, root, since = stages.config, stages.config.out, time.monotonic()
    world = root / "world"
    make_world(world, train_images=config.train_images, val_images=config.val_images, seed=config.world_seed)
    stages.seconds["world"] = time.monotonic() - since
    log(f"drew {config.train_images} training and {config.val_images} validation pictures: {world}")
    teachers = config.teacher_folder or user_cache_folder() / "teachers"
    make = (
        sys.executable,
        "-c",
        "import pathlib, sys; from hdovd.core import lines_to; "
        "from hdovd.pipelines.demo.run import demo_teacher\n"
        "with lines_to(print): demo_teacher(pathlib.Path(sys.argv[1]))",
        str(teachers),
    )
    propose = [
        "propose",
        *stages.data,
        "--recipe",
        "demo",
        "--out",
        root / PROPOSALS,
        "--backbone-out",
        root / BACKBONE,
    ]
    stages.side_by_side([Job("teacher", (make,), root / "logs" / "teacher.log"), stages.job("propose", propose)])
    captions = ("--captions", world / "annotations" / "captions_train2017.json")
    names = ("--vocabulary", world / "vocabulary.txt", "--protocol", world / "protocol.toml")
    stages.run("nouns", "nouns", *captions, *names, "--parser", "match", "--out", root / "nouns.json")
    made = ("--clip", demo_teacher(teachers), "--proposals", root / PROPOSALS, "--nouns", root / "nouns.json")
    stages.run("extract-clip", "extract-clip", *stages.data, "--cache", root / "cache", *made)


def _train_and_evaluate(stages: _Stages) -> dict[str, list[Path]]:
    """The runs of each variant, a seed each."""
    root, jobs, seeds = stages.config.out, list[Job](), range(stages.config.seeds)
    runs = {name: [root / "runs" / f"{name}-seed{seed}" for seed in seeds] for name in (BASE_ONLY, DISTILLED)}
    for seed in seeds:
        own = (f"train.seed={seed}", f"detector.backbone.weights={root / BACKBONE}")
        sets = [word for setting in (*own, *stages.config.settings) for word in ("--set", setting)]
        for variant, preset in ((BASE_ONLY, ["--preset", BASE_ONLY]), (DISTILLED, [])):
            out = runs[variant][seed]
            words = ["--cache", root / "cache", "--recipe", "demo", *preset, *sets]
            train = ["train", *stages.data, *words, "--val-every", 0, "--out", out]
            jobs.append(stages.job(out.name, train, ["eval", out, "--data", root / "world"]))
    stages.side_by_side(jobs)
    return runs


def _look(stages: _Stages, runs: dict[str, list[Path]]) -> list[Path]:
    """The audit, and what there is to look at. Returns the pictures."""
    root, small = stages.config.out, stages.config.pictures
    distilled, cache, view = runs[DISTILLED][0], root / "cache", root / "cache-view.png"
    stages.run("audit", "audit", *stages.data, "--cache", cache, "--run", distilled)
    shown = telling_pictures(root / "world", NOVEL)
    stages.run("detect", "detect", distilled, *shown, "--out", root / "detected")
    most = image_with_most_proposals(root / PROPOSALS)
    stages.run("cache view", "cache", "view", cache, "--image", most, "--out", view)
    by_seed = [run for both in zip(runs[DISTILLED], runs[BASE_ONLY], strict=True) for run in both]
    stages.run("report", "report", *by_seed, "--data", root / "world", "--out", root / "report")
    detected = [root / "detected" / "pictures" / file.name for file in shown]
    return [*detected, view] if small is None else small_pictures(detected, view, small)
