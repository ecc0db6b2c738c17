"""`hdovd demo`: the whole main job on a world of our own, every stage through the command a user would type.

World and teacher are made once; then propose, nouns, extract-clip, calibrate, for every seed train and eval, base-only and
distilled, the audit, and what there is to look at: detect, cache view, cache map, report. The stages run in this process, from the same
arguments as the printed commands.
"""

from __future__ import annotations

import json
import shlex
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hdovd.coco_ap import GROUPS
from hdovd.pipelines.demo.config import MARKER, DemoConfig
from hdovd.pipelines.demo.looking import can_map, image_with_most_proposals, small_pictures, telling_pictures
from hdovd.pipelines.demo.teacher import demo_teacher
from hdovd.pipelines.demo.world import NOVEL, make_world
from hdovd.pipelines.user_cache import user_cache_folder

DISTILLED = "distilled"
VARIANTS = {"base-only": ["--preset", "base-only"], DISTILLED: []}
@dataclass(slots=True)
class DemoResult:
    """AP50 in percent by variant and group, a value a seed; seconds by stage; pictures; the report's page."""

    ap50: dict[str, dict[str, list[float]]]
    split_blind: dict[str, dict[str, list[float]]]
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    report: Path | None = None


def demo(config: DemoConfig, command: Callable[[list[str]], None], log: Callable[[str], None] = print) -> DemoResult:
    """Run the demo; `command` runs one hdovd command line (without the word hdovd) in this process."""
    root = config.out
    config.check()
    if root.exists() and any(root.iterdir()):
        log(f"starting {root} anew")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    world = root / "world"
    result = DemoResult({v: {g: [] for g in GROUPS} for v in VARIANTS}, {v: {g: [] for g in GROUPS} for v in VARIANTS})

    @contextmanager
    def timed(stage: str) -> Any:
        since = time.monotonic()
        yield
        result.seconds[stage] = result.seconds.get(stage, 0.0) + time.monotonic() - since

    def run(stage: str, *arguments: object) -> None:
        words = [str(a) for a in arguments]
        log(f"\n$ hdovd {shlex.join(words)}")
        with timed(stage):
            command(words)

    with timed("world"):
        make_world(world, train_images=config.train_images, val_images=config.val_images, seed=0)
    log(f"drew {config.train_images} training and {config.val_images} validation pictures: {world}")
    with timed("teacher"):
        clip = demo_teacher(config.teacher_folder or user_cache_folder() / "teachers", log=log)
    data = ("--data", world, "--protocol", world / "protocol.toml")
    proposals, cache, backbone = root / "proposals.json", root / "cache", root / "backbone.safetensors"
    run("propose", "propose", *data, "--recipe", "demo", "--set", "train.epochs=6", "--overlap", 0.15, "--min-score", 0.55,
        "--out", proposals, "--backbone-out", backbone)
    nouns = root / "nouns.json"
    run("nouns", "nouns", "--captions", world / "annotations" / "captions_train2017.json", "--vocabulary", world / "vocabulary.txt",
        "--parser", "match", "--protocol", world / "protocol.toml", "--out", nouns)
    run("extract-clip", "extract-clip", *data, "--cache", cache, "--clip", clip, "--proposals", proposals, "--nouns", nouns)
    calibration = root / "calibration.toml"
    run("calibrate", "calibrate", "--cache", cache, "--out", calibration)
    for seed in range(config.seeds):
        for variant, options in VARIANTS.items():
            out = root / "runs" / f"{variant}-seed{seed}"
            settings = (f"train.seed={seed}", f"detector.backbone.weights={backbone}", *config.settings)
            sets = [word for setting in settings for word in ("--set", setting)]
            run(f"train {variant}", "train", *data, "--cache", cache, "--recipe", "demo", *options, *sets,
                *(["--calibration", calibration] if variant == DISTILLED else []), "--val-every", 0, "--out", out)
            run("eval", "eval", out, "--data", world)
            _collect(result, variant, out)
    distilled = root / "runs" / f"{DISTILLED}-seed0"
    run("audit", "audit", *data, "--cache", cache, "--run", distilled)
    shown = telling_pictures(world, NOVEL)
    run("detect", "detect", distilled, *shown, "--out", root / "detected")
    view, cache_map = root / "cache-view.png", root / "cache-map.html"
    run("cache view", "cache", "view", cache, "--image", image_with_most_proposals(proposals), "--calibration", calibration, "--out", view)
    if can_map():
        run("cache map", "cache", "map", cache, "--out", cache_map)
    else:
        log("left out: hdovd cache map, which needs pip install 'hdovd[map]'")
    runs = [root / "runs" / f"{variant}-seed{seed}" for seed in range(config.seeds) for variant in (DISTILLED, "base-only")]
    run("report", "report", *runs, "--data", world, "--out", root / "report")
    result.report = root / "report" / "index.html"
    detected = [root / "detected" / "pictures" / file.name for file in shown]
    map_picture = cache_map.with_suffix(".png") if can_map() else None
    result.pictures = [*detected, view, *([map_picture] if map_picture else [])]
    if config.pictures is not None:
        result.pictures = small_pictures(detected, view, map_picture, config.pictures)
    return result


def _collect(result: DemoResult, variant: str, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for group in GROUPS:
        result.ap50[variant][group].append(metrics["ap50"][group])
        result.split_blind[variant][group].append(metrics["split_blind"]["ap50"][group])


def demo_table(result: DemoResult) -> str:
    """Mean over seeds, with the standard deviation where there are several, and the time of each stage."""
    seeds = len(result.ap50["distilled"]["all"])
    lines = [f"AP50 on the demo world, percent, mean of {seeds} seed{'s' if seeds > 1 else ''}"
             + (" (standard deviation)" if seeds > 1 else ""), f"{'':28s}" + "".join(f"{g:>14s}" for g in GROUPS)]
    for variant in VARIANTS:
        lines.append(f"{variant:28s}" + "".join(f"{_spread(result.ap50[variant][g]):>14s}" for g in GROUPS))
    lines.append(f"{'distilled, split-blind':28s}" + "".join(f"{_spread(result.split_blind['distilled'][g]):>14s}" for g in GROUPS))
    lines.append("These are numbers of a drawn world, not of COCO.")
    lines.append("seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items())
                 + f"; {sum(result.seconds.values()):.0f} in all")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")
