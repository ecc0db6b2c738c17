"""`hdovd demo`: the whole main job on a world of our own, every stage through the command a user would type.

World and teacher are made once; then propose, nouns, extract-clip, for every seed train and eval, base-only
and distilled, the audit, and what there is to look at: detect, cache view, report. Short stages run in this process,
from the same arguments as the printed commands; the long ones that need nothing of each other side by side, in
processes of their own.
"""

import json
import shlex
import shutil
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from hdovd.core import user_cache_folder
from hdovd.core.errors import HdovdError, Stopped
from hdovd.core.log import log
from hdovd.data.protocol import GROUPS
from hdovd.pipelines.common.atomic_write import write_picture
from hdovd.pipelines.common.process import Job, exit_code, log_end, run_jobs, stop_signals, usable_cores
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
    counts = Counter(a["image_id"] for a in tree["annotations"] if a["category_id"] in wanted)
    return [
        world / "val2017" / image["file_name"]
        for image in sorted(tree["images"], key=lambda image: counts[image["id"]] < 2)[:SHOWN_PICTURES]
    ]


def image_with_most_proposals(proposals: Path) -> int:
    """Of equals the first in the file."""
    [(image_id, _)] = Counter(entry["image_id"] for entry in json.loads(proposals.read_text())).most_common(1)
    return int(image_id)


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


DISTILLED = "distilled"
PROPOSALS, BACKBONE = "proposals.json", "backbone.safetensors"
VARIANTS = {"base-only": ["--preset", "base-only"], DISTILLED: []}


@dataclass(slots=True)
class DemoResult:
    """What `hdovd eval` wrote of each run, by variant, a tree a seed; seconds by stage; pictures; the report's page."""

    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {variant: [] for variant in VARIANTS})
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
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
    began, stages = time.monotonic(), _Stages(config, command, DemoResult())
    _cache(stages, _world_teacher_and_proposals(stages))
    _train_and_evaluate(stages)
    _look(stages)
    stages.result.total_s = time.monotonic() - began
    return stages.result


@dataclass(frozen=True, slots=True)
class _Stages:
    """Runs command lines and says them."""

    config: DemoConfig
    command: Callable[[list[str]], None]
    result: DemoResult

    @property
    def data(self) -> tuple[object, ...]:
        return "--data", self.config.out / "world", "--protocol", self.config.out / "world" / "protocol.toml"

    def run(self, stage: str, *arguments: object) -> None:
        """One command line, in this process."""
        words, since = [str(a) for a in arguments], time.monotonic()
        log(f"\n$ hdovd {shlex.join(words)}")
        self.command(words)
        self.result.seconds[stage] += time.monotonic() - since

    def job(self, stage: str, *command_lines: Sequence[object]) -> Job:
        """Command lines of hdovd for a process of their own, one after the other."""
        lines = tuple((sys.executable, "-m", "hdovd", *map(str, words)) for words in command_lines)
        return Job(stage, lines, self.config.out / "logs" / f"{stage}.log")

    def side_by_side(self, jobs: list[Job]) -> None:
        """A training on one core does more than half of one on two: two at a time are sooner done than one after the
        other.

        Raises HdovdError for a job that fails, with the end of its log, and Stopped if a signal came.
        """
        log(
            *(
                "\n$ " + (f"hdovd {shlex.join(words[3:])}" if words[1] == "-m" else shlex.join(words))
                for job in jobs
                for words in job.commands
            )
        )
        count = min(len(jobs), usable_cores())
        log(f"\n{count} at a time; what they print is in " + " ".join(shlex.quote(str(job.log)) for job in jobs))

        def on_end(job: Job, _: tuple[str, ...], code: int, seconds: float) -> None:
            if code:
                raise HdovdError(f"{job.name} failed with exit code {code}; {log_end(job.log)}")
            self.result.seconds[job.name] += seconds
            log(f"{job.name}: {seconds:.0f} s")

        with stop_signals() as stop:
            run_jobs(jobs, [{"OMP_NUM_THREADS": str(usable_cores() // count)}] * count, on_end, stop)
        if stop.signals:
            raise Stopped("stopped; the same command starts the demo anew", exit_code(stop.signals[0]))


def _world_teacher_and_proposals(stages: _Stages) -> str:
    """The name of the demo's CLIP."""
    config, root, since = stages.config, stages.config.out, time.monotonic()
    make_world(root / "world", train_images=config.train_images, val_images=config.val_images, seed=config.world_seed)
    stages.result.seconds["world"] = time.monotonic() - since
    log(f"drew {config.train_images} training and {config.val_images} validation pictures: {root / 'world'}")
    teachers = config.teacher_folder or user_cache_folder() / "teachers"
    make = (
        sys.executable,
        "-c",
        "import pathlib, sys; from hdovd.core.log import lines_to; "
        "from hdovd.pipelines.demo.teacher import demo_teacher\n"
        "with lines_to(print): demo_teacher(pathlib.Path(sys.argv[1]))",
        str(teachers),
    )
    outs = ["--out", root / PROPOSALS, "--backbone-out", root / BACKBONE]
    stages.side_by_side(
        [
            Job("teacher", (make,), root / "logs" / "teacher.log"),
            stages.job("propose", ["propose", *stages.data, "--recipe", "demo", *outs]),
        ]
    )
    return demo_teacher(teachers)


def _cache(stages: _Stages, clip: str) -> None:
    root, world = stages.config.out, stages.config.out / "world"
    captions = ("--captions", world / "annotations" / "captions_train2017.json")
    match = ("--vocabulary", world / "vocabulary.txt", "--parser", "match", "--protocol", world / "protocol.toml")
    stages.run("nouns", "nouns", *captions, *match, "--out", root / "nouns.json")
    made = ("--clip", clip, "--proposals", root / PROPOSALS, "--nouns", root / "nouns.json")
    stages.run("extract-clip", "extract-clip", *stages.data, "--cache", root / "cache", *made)


def _folders(config: DemoConfig, order: Sequence[str]) -> dict[Path, tuple[str, int]]:
    """The runs, with variant and seed."""
    return {
        config.out / "runs" / f"{variant}-seed{seed}": (variant, seed)
        for seed in range(config.seeds)
        for variant in order
    }


def _train_and_evaluate(stages: _Stages) -> None:
    root, jobs, folders = stages.config.out, list[Job](), _folders(stages.config, list(VARIANTS))
    for out, (variant, seed) in folders.items():
        settings = (f"train.seed={seed}", f"detector.backbone.weights={root / BACKBONE}", *stages.config.settings)
        sets = [word for setting in settings for word in ("--set", setting)]
        words = ["--cache", root / "cache", "--recipe", "demo", *VARIANTS[variant], *sets]
        train = ["train", *stages.data, *words, "--val-every", 0, "--out", out]
        jobs.append(stages.job(out.name, train, ["eval", out, "--data", root / "world"]))
    stages.side_by_side(jobs)
    for out, (variant, _) in folders.items():
        stages.result.metrics[variant].append(json.loads((out / "metrics.json").read_text()))


def _look(stages: _Stages) -> None:
    """The audit, and what there is to look at."""
    root, result = stages.config.out, stages.result
    distilled, cache, view = root / "runs" / f"{DISTILLED}-seed0", root / "cache", root / "cache-view.png"
    stages.run("audit", "audit", *stages.data, "--cache", cache, "--run", distilled)
    shown = telling_pictures(root / "world", NOVEL)
    stages.run("detect", "detect", distilled, *shown, "--out", root / "detected")
    image = image_with_most_proposals(root / PROPOSALS)
    stages.run("cache view", "cache", "view", cache, "--image", image, "--out", view)
    runs = _folders(stages.config, (DISTILLED, "base-only"))
    stages.run("report", "report", *runs, "--data", root / "world", "--out", root / "report")
    result.report = root / "report" / "index.html"
    detected = [root / "detected" / "pictures" / file.name for file in shown]
    small = stages.config.pictures
    result.pictures = [*detected, view] if small is None else small_pictures(detected, view, small)


def demo_table(result: DemoResult) -> str:
    """Mean over seeds, with the standard deviation where there are several, and the time of each stage."""
    seeds = len(result.metrics[DISTILLED])
    rows = {
        **{variant: [tree["ap50"] for tree in trees] for variant, trees in result.metrics.items()},
        "distilled, split-blind": [tree["split_blind"]["ap50"] for tree in result.metrics[DISTILLED]],
    }
    spent = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in result.seconds.items())
    lines = [
        f"AP50 on the demo world, percent, mean of {seeds} seed{'s' if seeds > 1 else ''}"
        + (" (standard deviation)" if seeds > 1 else ""),
        f"{'':28s}" + "".join(f"{g:>14s}" for g in GROUPS),
        *(
            f"{name:28s}" + "".join(f"{_spread([values[g] for values in of_seeds]):>14s}" for g in GROUPS)
            for name, of_seeds in rows.items()
        ),
        "These are numbers of a drawn world, not of COCO.",
        f"seconds: {spent}; {result.total_s:.0f} in all, for some ran side by side",
    ]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")
