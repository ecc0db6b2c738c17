"""Where Python is told to write no bytecode (as in many containers), keep it beside pytest's own cache. pytest reads this file first.

Tests start dozens of processes that import torch: each of them would compile all of it anew, which is more than half of its start.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if sys.dont_write_bytecode and not sys.pycache_prefix:
    sys.pycache_prefix = str(Path(__file__).parent / ".pytest_cache" / "bytecode")  # never among the sources
    sys.dont_write_bytecode = False
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
