"""An extraction on a Ray cluster of three CPUs here, one of whose workers is killed at work. `test_spread_extraction`
runs it.

    python ray_with_a_death.py EXTRACTION.json CACHE PART_ROWS BATCH_SIZE > FACTS.json

The picture parts are claimed here until three workers are at one each; so they are all at work when one is killed, and
none of them is writing: what it left half-written would be swept by the next extraction, not by this one.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from hdovd.core import lines_to

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray

from hdovd.cache import Catalog, Level, Product
from hdovd.pipelines.extraction.config import Executor, ExtractConfig
from hdovd.pipelines.extraction.extract_clip import extract_clip


def workers_at_work() -> list[int]:
    """Processes that descend from this one and do a shard."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"ray::extract_shard") and _is_ours(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def _is_ours(pid: int) -> bool:
    while pid > 1 and pid != os.getpid():
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return pid > 1


def main(extraction: Path, cache: Path, part_rows: int, batch_size: int) -> None:
    config = ExtractConfig.from_dict(
        json.loads(extraction.read_text()),
        cache,
        device="cpu",
        part_rows=part_rows,
        batch_size=batch_size,
        executor=Executor.RAY,
    )
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    lines: list[str] = []
    most = 0

    def kill_one() -> None:
        nonlocal most
        while not list(cache.glob("pseudo_label/*/parts/tables.json")):
            time.sleep(0.02)
        [product] = [p.parent for p in cache.glob("instance/*/zarr.json")]
        [images] = [p.parent for p in cache.glob("image/*/zarr.json")]
        with ExitStack() as claims:
            folder = Catalog(cache).folder
            for at in (product, images):
                for part in range(100):
                    claims.enter_context(folder.claim(f"{at.relative_to(cache)}/{part}", wait=True))
            texts = [
                Product(folder, level, at.parent.name)
                for level in (Level.CLASS, Level.NOUN)
                for at in cache.glob(f"{level}/*/zarr.json")
            ]
            while most < 3 or not all(product.whole for product in texts):
                time.sleep(0.02)
                most = max(most, len(workers_at_work()))
            os.kill(workers_at_work()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with lines_to(lines.append):
        report = extract_clip(config)
    print(json.dumps({"whole": report.whole, "at_work": most, "killed": not killer.is_alive(), "lines": lines}))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
