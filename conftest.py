"""What has to be set before torch is loaded. pytest reads this file first.

Where Python is told to write no bytecode (as in many containers), keep it beside pytest's own cache.

Tests start dozens of processes that import torch: each of them would compile all of it anew, which is more than half of
its start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Files of tests run side by side (make test): each has its share of the cores, and takes none from the others while it
# waits.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_cores, _workers = len(os.sched_getaffinity(0)), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores // _workers)))
os.environ.setdefault("HDOVD_PRECISION", "fp32")  # on any CPU the same numbers

if sys.dont_write_bytecode and not sys.pycache_prefix:
    sys.pycache_prefix = str(Path(__file__).parent / ".pytest_cache" / "bytecode")  # never among the sources
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
