"""All benchmarks, or some, at small sizes: `python benchmarks/run.py [NAME...]`; one at any size: `python
benchmarks/run.py NAME OPTIONS`.

Each runs in a process of its own and prints the ratios that it measured in this run; at small sizes with a tiny CLIP of
random weights. Threads are as hdovd sets them, which a file that is run alone leaves to torch: `python
benchmarks/bench_cache.py --help`.
"""

from __future__ import annotations

import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from arguments import workplace
from side_by_side import tiny_clip

from hdovd.pipelines.common.process import limit_threads

SMALL = {
    "bench_cache": "--images 1000 --rounds 5 --reads 500 --workers 1",
    "bench_crops": "--clip CLIP --images 8 --rounds 2",
    "bench_dense": "--clip CLIP --images 8 --sides 64 96 --rounds 3",
    "bench_detectors": "--side 64 --train-side 64 --rounds 1 --train-rounds 1",
    "bench_eval": "--images 300 --objects 2000 --rounds 3",
    "bench_scale": "--images 1000 --boxes 10 --dim 64 --workers 1",
    "bench_index": "--rows 5000 --dim 64 --centres 50 --queries 20",
    "bench_search": "--rows 20000 --dim 64 --rounds 2",
    "bench_train": "--clip CLIP --images 32 --picture 160 120 --rounds 2 --steps 2",
    "checksums": "--images 1000 --weights 1 --rounds 3",
    "precision": "--steps 3 --set train.batch_size=2 --set train.warmup_iterations=0",
    "side_by_side": "--epochs 1",
    "startup": "--rounds 1",
}


def main(words: list[str]) -> int:
    """How many of them failed. Raises SystemExit for a name that there is not."""
    names = list(takewhile(lambda word: not word.startswith("-"), words))
    options = words[len(names) :]
    unknown = [name for name in names if name not in SMALL]
    if unknown or (options and len(names) != 1):
        raise SystemExit(
            f"expected names of benchmarks, or one with its options: {', '.join(SMALL)}; found {' '.join(words)}"
        )
    limit_threads()
    failed = 0
    with workplace() as place:
        clip = tiny_clip(place)
        for name in names or SMALL:
            given = options or SMALL[name].split()
            print(f"\n# python benchmarks/run.py {name} {' '.join(given)}", flush=True)
            command = [
                sys.executable,
                str(Path(__file__).with_name(f"{name}.py")),
                *(clip if word == "CLIP" else word for word in given),
            ]
            failed += subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
