"""All benchmarks, or some, at small sizes: `python benchmarks/run.py [NAME...]`.

Each runs in a process of its own, with a tiny CLIP of random weights, and prints the ratios that it measured in this run. A file alone,
with its own options, measures at the size that its first lines tell: `python benchmarks/bench_cache.py --help`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from arguments import workplace
from side_by_side import tiny_clip

SMALL = {
    "bench_cache": "--images 1000 --rounds 5 --reads 500 --workers 1",
    "bench_crops": "--clip CLIP --images 8 --rounds 2",
    "bench_dense": "--clip CLIP --images 8 --sides 64 96 --rounds 3",
    "bench_eval": "--images 300 --objects 2000 --rounds 3",
    "bench_scale": "--images 1000 --boxes 10 --dim 64 --workers 1",
    "bench_train": "--clip CLIP --images 32 --picture 160 120 --rounds 2 --steps 2",
    "checksums": "--images 1000 --weights 1 --rounds 3",
    "precision": "--steps 3 --set train.batch_size=2 --set train.warmup_iterations=0",
    "side_by_side": "--epochs 1",
    "startup": "--rounds 1",
}


def main(names: list[str]) -> int:
    """How many of them failed. Raises SystemExit for a name that there is not."""
    if unknown := [name for name in names if name not in SMALL]:
        raise SystemExit(f"no benchmark {', '.join(unknown)}: expected {', '.join(SMALL)}")
    failed = 0
    with workplace() as place:
        clip = tiny_clip(place)
        for name in names or SMALL:
            print(f"\n# python benchmarks/{name}.py {SMALL[name]}", flush=True)
            words = [clip if word == "CLIP" else word for word in SMALL[name].split()]
            failed += subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *words], check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
