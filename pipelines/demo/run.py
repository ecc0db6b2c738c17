"""`hdovd demo`: the whole main job on a world of our own, every stage through the command a user would type.

World and teacher are made once; then propose, nouns, extract-clip, calibrate, for every seed train and eval, base-only
and distilled, the audit, and what there is to look at: detect, cache view, report. Short stages run in this process,
from hdovd.core.log import log
from the same arguments as the printed commands; the long ones that need nothing of each other side by side, in
processes of their own.
"""

import json
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hdovd.core.errors import HdovdError, Stopped
from hdovd.core.log import log
from hdovd.evaluation.coco import GROUPS
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.job_pool import Ended, Job, last_lines, run_jobs, stop_signals
from hdovd.pipelines.common.process import exit_code, usable_cores, user_cache_folder
from hdovd.pipelines.demo.config import MARKER, DemoConfig
from hdovd.pipelines.demo.teacher import demo_teacher
from hdovd.pipelines.demo.world import NOVEL, make_world

SHOWN_PICTURES = 3
WIDTH_PX = 900
GAP_PX = 6


def telling_pictures(world: Path, novel: tuple[str, ...]) -> list[Path]:
    """The first validation pictures that hold two novel objects or more, `SHOWN_PICTURES` of them; if there are fewer,
    then others.
    """
    tree = json.loads((world / "annotations" / "instances_val2017.json").read_text())
    wanted = {c["id"] for c in tree["categories"] if c["name"] in novel}
    counts = {image["id"]: 0 for image in tree["images"]}
    for annotation in tree["annotations"]:
        counts[annotation["image_id"]] += annotation["category_id"] in wanted
    images = sorted(tree["images"], key=lambda image: counts[image["id"]] < 2)[:SHOWN_PICTURES]
    return [world / "val2017" / image["file_name"] for image in images]


def image_with_most_proposals(proposals: Path) -> int:
    """Of equals the first in the file."""
    counts: dict[int, int] = {}
    for entry in json.loads(proposals.read_text()):
        counts[entry["image_id"]] = counts.get(entry["image_id"], 0) + 1
    return max(counts, key=lambda image: counts[image])


def small_pictures(detections: list[Path], view: Path, out: Path) -> list[Path]:
    """Write detections.jpg and cache-view.jpg, `WIDTH_PX` wide, into `out`."""
    files = []
    for name, picture in (("detections.jpg", _side_by_side(detections)), ("cache-view.jpg", _opened(view))):
        picture.thumbnail((WIDTH_PX, WIDTH_PX), Image.Resampling.LANCZOS)
        files.append(out / name)
        write_picture(files[-1], picture, "JPEG", quality=80, optimize=True)
    return files


def _opened(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _side_by_side(files: list[Path]) -> Image.Image:
    pictures = [_opened(file) for file in files]
    height = min(picture.height for picture in pictures)
    pictures = [p.resize((round(p.width * height / p.height), height), Image.Resampling.LANCZOS) for p in pictures]
    sheet = Image.new("RGB", (sum(p.width + GAP_PX for p in pictures) - GAP_PX, height), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + GAP_PX
    return sheet


DISTILLED = "distilled"
PROPOSER_EPOCHS = 5
PROPOSALS, BACKBONE, CALIBRATION = "proposals.json", "backbone.safetensors", "calibration.toml"
VARIANTS = {"base-only": ["--preset", "base-only"], DISTILLED: []}


@dataclass(slots=True)
class DemoResult:
    """AP50 in percent by variant and group, a value a seed; seconds by stage; pictures; the report's page."""

    ap50: dict[str, dict[str, list[float]]]
    split_blind: dict[str, dict[str, list[float]]]
    seconds: dict[str, float] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    report: Path | None = None
    total_s: float = 0.0


def demo(config: DemoConfig, command: Callable[[list[str]], None]) -> DemoResult:
    """Run the demo; `command` runs one hdovd command line (without the word hdovd) in this process."""
    root = config.out
    config.check()
    if root.exists() and any(root.iterdir()):
        log(f"starting {root} anew")
        shutil.rmtree(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).touch()
    began = time.monotonic()
    result = DemoResult({v: {g: [] for g in GROUPS} for v in VARIANTS}, {v: {g: [] for g in GROUPS} for v in VARIANTS})
    stages = _Stages(config, command, result.seconds)
    clip = _world_teacher_and_proposals(stages)
    _cache(stages, clip)
    for variant, out in _runs(stages):
        _collect(result, variant, out)
    _look(stages, result)
    result.total_s = time.monotonic() - began
    return result


@dataclass(slots=True)
class _Stages:
    """Runs command lines and says them. `seconds`: by stage."""

    config: DemoConfig
    command: Callable[[list[str]], None]
    seconds: dict[str, float]

    @property
    def root(self) -> Path:
        return self.config.out

    @property
    def data(self) -> tuple[object, ...]:
        return "--data", self.root / "world", "--protocol", self.root / "world" / "protocol.toml"

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def run(self, stage: str, *arguments: object) -> None:
        """One command line, in this process."""
        words = [str(a) for a in arguments]
        log(f"\n$ hdovd {shlex.join(words)}")
        since = time.monotonic()
        self.command(words)
        self.add(stage, time.monotonic() - since)

    def job(self, stage: str, *command_lines: tuple[object, ...]) -> Job:
        """Command lines for a process of their own, one after the other."""
        hdovd = (sys.executable, "-m", "hdovd")
        return Job(stage, tuple((*hdovd, *map(str, words)) for words in command_lines), self.log_file(stage))

    def log_file(self, stage: str) -> Path:
        return self.root / "logs" / f"{stage}.log"

    def side_by_side(self, jobs: list[Job]) -> None:
        """A training on one core does more than half of one on two: two at a time are sooner done than one after the
        other.

        Raises HdovdError for a job that fails, with the end of its log, and Stopped if a signal came.
        """
        for words in (words for job in jobs for words in job.commands):
            log("\n$ " + (f"hdovd {shlex.join(words[3:])}" if words[1] == "-m" else shlex.join(words)))
        count = min(len(jobs), usable_cores())
        log(f"\n{count} at a time; what they print is in " + " ".join(shlex.quote(str(job.log)) for job in jobs))

        def on_end(end: Ended) -> None:
            if end.code:
                raise HdovdError(
                    "\n".join(
                        [
                            f"{end.job.name} failed with exit code {end.code}; {end.job.log} ends with",
                            *(f"    {line}" for line in last_lines(end.job.log)),
                        ]
                    )
                )
            self.add(end.job.name, end.seconds)
            log(f"{end.job.name}: {end.seconds:.0f} s")

        with stop_signals() as stop:
            run_jobs(jobs, [{"OMP_NUM_THREADS": str(usable_cores() // count)}] * count, on_end, stop)
        if stop.signals:
            raise Stopped("stopped; the same command starts the demo anew", exit_code(stop.signals[0]))


def _world_teacher_and_proposals(stages: _Stages) -> str:
    """The name of the demo's CLIP."""
    config, world, since = stages.config, stages.root / "world", time.monotonic()
    make_world(world, train_images=config.train_images, val_images=config.val_images, seed=0)
    stages.add("world", time.monotonic() - since)
    log(f"drew {config.train_images} training and {config.val_images} validation pictures: {world}")
    teachers = config.teacher_folder or user_cache_folder() / "teachers"
    make = (
        sys.executable,
        "-c",
        "import pathlib, sys; "
        "from hdovd.pipelines.demo.teacher import demo_teacher; demo_teacher(pathlib.Path(sys.argv[1]))",
        str(teachers),
    )
    stages.side_by_side(
        [
            Job("teacher", (make,), stages.log_file("teacher")),
            stages.job(
                "propose",
                (
                    "propose",
                    *stages.data,
                    "--recipe",
                    "demo",
                    "--set",
                    f"train.epochs={PROPOSER_EPOCHS}",
                    "--overlap",
                    0.15,
                    "--min-score",
                    0.55,
                    "--out",
                    stages.root / PROPOSALS,
                    "--backbone-out",
                    stages.root / BACKBONE,
                ),
            ),
        ]
    )
    return demo_teacher(teachers)


def _cache(stages: _Stages, clip: str) -> None:
    root, world = stages.root, stages.root / "world"
    stages.run(
        "nouns",
        "nouns",
        "--captions",
        world / "annotations" / "captions_train2017.json",
        "--vocabulary",
        world / "vocabulary.txt",
        "--parser",
        "match",
        "--protocol",
        world / "protocol.toml",
        "--out",
        root / "nouns.json",
    )
    stages.run(
        "extract-clip",
        "extract-clip",
        *stages.data,
        "--cache",
        root / "cache",
        "--clip",
        clip,
        "--proposals",
        root / PROPOSALS,
        "--nouns",
        root / "nouns.json",
    )
    stages.run("calibrate", "calibrate", "--cache", root / "cache", "--out", root / CALIBRATION)


def _runs(stages: _Stages) -> list[tuple[str, Path]]:
    """Train and evaluate all; the variant and the folder of each."""
    root, outs, jobs = stages.root, list[tuple[str, Path]](), list[Job]()
    for seed in range(stages.config.seeds):
        for variant, options in VARIANTS.items():
            out = root / "runs" / f"{variant}-seed{seed}"
            settings = (f"train.seed={seed}", f"detector.backbone.weights={root / BACKBONE}", *stages.config.settings)
            sets = [word for setting in settings for word in ("--set", setting)]
            calibrated = ("--calibration", root / CALIBRATION) if variant == DISTILLED else ()
            jobs.append(
                stages.job(
                    out.name,
                    (
                        "train",
                        *stages.data,
                        "--cache",
                        root / "cache",
                        "--recipe",
                        "demo",
                        *options,
                        *sets,
                        *calibrated,
                        "--val-every",
                        0,
                        "--out",
                        out,
                    ),
                    ("eval", out, "--data", root / "world"),
                )
            )
            outs.append((variant, out))
    stages.side_by_side(jobs)
    return outs


def _look(stages: _Stages, result: DemoResult) -> None:
    """The audit, and what there is to look at."""
    root, world, cache = stages.root, stages.root / "world", stages.root / "cache"
    distilled = root / "runs" / f"{DISTILLED}-seed0"
    stages.run("audit", "audit", *stages.data, "--cache", cache, "--run", distilled)
    shown = telling_pictures(world, NOVEL)
    stages.run("detect", "detect", distilled, *shown, "--out", root / "detected")
    view = root / "cache-view.png"
    stages.run(
        "cache view",
        "cache",
        "view",
        cache,
        "--image",
        image_with_most_proposals(root / PROPOSALS),
        "--calibration",
        root / CALIBRATION,
        "--out",
        view,
    )
    runs = [
        root / "runs" / f"{variant}-seed{seed}"
        for seed in range(stages.config.seeds)
        for variant in (DISTILLED, "base-only")
    ]
    stages.run("report", "report", *runs, "--data", world, "--out", root / "report")
    result.report = root / "report" / "index.html"
    detected = [root / "detected" / "pictures" / file.name for file in shown]
    result.pictures = [*detected, view]
    if stages.config.pictures is not None:
        result.pictures = small_pictures(detected, view, stages.config.pictures)


def _collect(result: DemoResult, variant: str, run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for group in GROUPS:
        result.ap50[variant][group].append(metrics["ap50"][group])
        result.split_blind[variant][group].append(metrics["split_blind"]["ap50"][group])


def demo_table(result: DemoResult) -> str:
    """Mean over seeds, with the standard deviation where there are several, and the time of each stage."""
    seeds = len(result.ap50["distilled"]["all"])
    lines = [
        f"AP50 on the demo world, percent, mean of {seeds} seed{'s' if seeds > 1 else ''}"
        + (" (standard deviation)" if seeds > 1 else ""),
        f"{'':28s}" + "".join(f"{g:>14s}" for g in GROUPS),
    ]
    for variant in VARIANTS:
        lines.append(f"{variant:28s}" + "".join(f"{_spread(result.ap50[variant][g]):>14s}" for g in GROUPS))
    lines.append(
        f"{'distilled, split-blind':28s}"
        + "".join(f"{_spread(result.split_blind['distilled'][g]):>14s}" for g in GROUPS)
    )
    lines.append("These are numbers of a drawn world, not of COCO.")
    lines.append(
        "seconds: "
        + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items())
        + f"; {result.total_s:.0f} in all, for some ran side by side"
    )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")
