"""Processor time of every command's --help and of typical mistakes, beside that of `import torch`. Run as: python
benchmarks/startup.py

Limits: 0.5 s for help, 1 s for a mistake, user and system time together, with bytecode that is compiled, as that of an
installed package is; it goes to a temporary folder. Exit code 1 if a median is over its limit.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hdovd.cli.main import app

HELP_S, MISTAKE_S = 0.5, 1.0
NO = "/no/such/place"
MISTAKES = (
    f"train --data {NO} --cache {NO} --out {{out}}",
    f"train --data {{data}} --cache {NO} --out {{out}}",
    "train --data {data} --cache c --out {out} --recipe demmo",
    "train --data {data} --cache c --out {out} --set train.lerning_rate=1",
    "train --data {data} --cache c --out {out} --protocol nowhere",
    "train --data {data} --cache c --out {out} --preset nothing",
    "train --data {data} --cache c --out {out} --val-every often",
    "train --data {data} --cache c --out {out} --no-such-option",
    f"train --data {{data}} --cache c --out {{out}} --init {NO}",
    f"train --data {{data}} --cache c --out {{out}} --calibration {NO}",
    f"propose --data {NO} --out {{out}}.json",
    "propose --data {data} --out {out}.txt",
    f"propose --data {{data}} --out {{out}}.json --checkpoint {NO}",
    "propose --report --data {data} --recipe demmo",
    f"nouns --captions {NO} --out {{out}}",
    f"nouns --captions {{data}}/annotations/instances_train2017.json --out {{out}} --vocabulary {NO}",
    f"extract-clip --data {NO} --cache {{out}} --clip x",
    f"extract-clip --data {{data}} --cache {{out}} --clip x --proposals {NO}",
    f"extract-clip --data {{data}} --cache {{out}} --clip x --templates {NO}",
    "extract-clip --data {data} --cache {data} --clip x",
    "extract-clip --data {data} --cache {out} --clip x --shard 4/4",
    f"calibrate --cache {NO}",
    f"eval {NO} --data {{data}}",
    "eval {data} --data {data} --workers many",
    f"search {NO} umbrella",
    "search c",
    f"detect {NO} a.jpg --out {{out}}",
    f"export {NO} --out {{out}}.onnx",
    f"import-checkpoint {NO} --out {{out}} --detector adamixer",
    f"ablate --data {{data}} --cache {NO} --out {{out}} --grid train.lr=0.1",
    "ablate --data {data} --cache c --out {out} --grid train.lerning_rate=1",
    f"report {NO} --out {{out}}",
    f"audit --data {{data}} --cache {NO}",
    f"audit --data {NO} --cache c",
    f"cache ls {NO}",
    f"cache info {NO}",
    f"cache diff {NO} a b",
    f"cache gc {NO}",
    f"cache verify {NO}",
    f"cache export {NO} --to webdataset --out {{out}}",
    f"cache import {NO} --format oadp --data {{data}} --cache {{out}}",
    f"cache index {NO}",
    f"cache view {NO}",
    f"cache export {NO} --to parquet --out {{out}}.parquet",
    "cache export c --to parquet --out {out}.csv",
    f"runs ls {NO}",
    f"runs diff {NO} {NO}",
    f"proposals info {NO}",
    f"proposals convert {NO} --out {{out}}.npz",
    "bench extract --picture large",
    "demo --set train.lerning_rate=1 --out {out}",
    "demo --out {data}",
    "no-such-command",
)


def commands() -> Iterator[list[str]]:
    """The words of every command and group, the app itself first."""
    root: Any = typer.main.get_command(app)
    waiting: list[tuple[list[str], Any, typer.Context]] = [([], root, typer.Context(root))]
    while waiting:
        words, command, context = waiting.pop(0)
        yield words
        for name in getattr(command, "commands", ()):
            found = command.get_command(context, name)
            waiting.append(([*words, name], found, typer.Context(found, parent=context)))


def small_data(folder: Path) -> Path:
    """A COCO folder that has all its files, for mistakes of other kinds."""
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        file = folder / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text('{"images": [], "annotations": [], "categories": []}')
    return folder


def mistakes(folder: Path) -> list[list[str]]:
    """The command lines of MISTAKES, with paths in `folder` filled in. None of them writes there."""
    places = {"data": str(small_data(folder / "data")), "out": str(folder / "out")}
    return [[word.format(**places) for word in line.split()] for line in MISTAKES]


def seconds(words: list[str], rounds: int, environment: dict[str, str], cwd: Path) -> float:
    """Median processor time of a Python process."""
    found = []
    for round_ in range(rounds + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], env=environment, cwd=cwd, capture_output=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if round_:  # the first one compiles
            found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    slow = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": str(folder / "bytecode"), "OMP_NUM_THREADS": "1"}
        whole = seconds(["-c", "import torch"], rounds, environment, folder)
        print(f"{'seconds':>8s}{'of torch':>9s}  (limit {HELP_S} s for help, {MISTAKE_S} s for a mistake)")
        print(f"{whole:8.2f}{1:9.2f}  import torch")
        lines = [([*words, "--help"], HELP_S) for words in commands()] + [
            (words, MISTAKE_S) for words in mistakes(folder)
        ]
        for words, limit in lines:
            took = seconds(["-m", "hdovd", *words], rounds, environment, folder)
            slow += took > limit
            shown = " ".join(words).replace(str(folder), "TMP")
            print(
                f"{took:8.2f}{took / whole:9.2f}  hdovd {shown}{'  OVER THE LIMIT' if took > limit else ''}", flush=True
            )
    print(f"{slow} of {len(lines)} over the limit")
    return int(slow > 0)


if __name__ == "__main__":
    sys.exit(main())
