"""The search's benchmark: it says what it measured, and when it extrapolates."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_search import SearchBench, bench_search


@pytest.mark.parametrize("held", [1.0, 1e-6])
def test_lines(held: float, tmp_path: Path) -> None:
    lines = bench_search(SearchBench(rows=3_000, dim=8, count=5, rounds=2, held=held), tmp_path)
    assert lines[0].startswith("3,000 rows of 8 values, ")
    assert ("extrapolated from 31 rows" in lines[2]) == (held < 1)
    scanned, product, reading = (float(line.split()[0]) for line in lines[1:4])
    assert scanned >= 0
    assert product >= 0
    assert reading >= 0
    assert lines[5].endswith("scan / product")
