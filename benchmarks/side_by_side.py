"""Two trainings on one machine: side by side against one after the other, with the threads that hdovd sets and with
torch's own.

    python benchmarks/side_by_side.py [--epochs 4]

Prints, for each way to wait, seconds and the share of speed that is kept side by side: 1 is as fast as one after the
other; more than 1 is what a training alone leaves idle.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Where torch is loaded before the command sets how threads wait, they wait as torch would have it.
LAUNCHES = {
    "hdovd": ["-m", "hdovd"],
    "torch's own": ["-c", "import runpy, torch; runpy.run_module('hdovd', run_name='__main__')"],
}


def prepare(folder: Path) -> None:
    """A small drawn world and its cache, by random weights; proposals lie on all objects, so that there is something to
    distil.
    """
    from hdovd.data import DataPaths
    from hdovd.pipelines.demo.world import make_world
    from hdovd.pipelines.extraction.config import ExtractConfig
    from hdovd.pipelines.extraction.extract_clip import extract_clip

    make_world(folder / "world", train_images=160, val_images=4, seed=0)
    world, proposals = folder / "world", folder / "proposals.json"
    boxes = json.loads((world / "annotations" / "instances_train2017.json").read_text())["annotations"]
    proposals.write_text(
        json.dumps([{"image_id": one["image_id"], "bbox": one["bbox"], "score": 0.5} for one in boxes])
    )
    extract_clip(
        ExtractConfig(
            data=DataPaths(world),
            cache=folder / "cache",
            clip=tiny_clip(folder),
            proposals=proposals,
            vocabulary=world / "vocabulary.txt",
            protocol=str(world / "protocol.toml"),
        )
    )


def tiny_clip(folder: Path) -> str:
    """The name of a CLIP of the demo's size with random weights, saved in `folder`."""
    import open_clip

    from hdovd.pipelines.demo.run import MODEL_CFG, save_clip

    clip = folder / "clip"
    clip.mkdir()
    save_clip(open_clip.CLIP(**MODEL_CFG), clip)
    return f"local-dir:{clip}"


def training(folder: Path, name: str, epochs: int) -> list[str]:
    return [
        "train",
        "--data",
        str(folder / "world"),
        "--protocol",
        str(folder / "world" / "protocol.toml"),
        "--cache",
        str(folder / "cache"),
        "--recipe",
        "demo",
        "--set",
        f"train.epochs={epochs}",
        "--val-every",
        "0",
        "--overwrite",
        "--out",
        str(folder / name),
    ]


def seconds(commands: list[list[str]], environment: dict[str, str]) -> float:
    """Of commands that run at the same time."""
    since = time.monotonic()
    running = [
        subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for words in commands
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"failed: {' '.join(commands[0])}")
    return time.monotonic() - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4, help="Of ten steps each.")
    epochs = parser.parse_args().epochs
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
        }
        print(f"{len(os.sched_getaffinity(0))} cores, {epochs} epochs of 160 pictures, start-up included")
        for way, launch in LAUNCHES.items():
            commands = [[sys.executable, *launch, *training(folder, name, epochs)] for name in ("one", "two")]
            after = sum(seconds([words], environment) for words in commands)
            beside = seconds(commands, environment)
            print(
                f"{way:12s}  one after the other {after:6.1f} s   side by side {beside:6.1f} s   {after / beside:5.2f}"
            )


if __name__ == "__main__":
    main()
