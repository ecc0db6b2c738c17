"""Extraction with a stub in place of CLIP: it writes what it counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from bench_scale import BASE_BOXES, Figures, ScaleBench, bench_scale

from hdovd.cache import Level
from hdovd.cache.reader import FeatureCache


def test_figures(tmp_path: Path) -> None:
    figures = bench_scale(tmp_path, ScaleBench(images=20, boxes=6, dim=16))
    assert figures.rows == 20 + 20 * (BASE_BOXES + 6)
    products = [product for level in Level for product in (tmp_path / "cache" / level).iterdir() if product.is_dir()]
    files = [file for product in products for file in product.rglob("*") if file.is_file()]
    assert figures.cache_bytes == sum(file.stat().st_size for file in files)
    assert 50e6 < figures.main_peak < 20e9  # torch alone is 200 MB
    cache = FeatureCache(tmp_path / "cache")
    found = np.concatenate([cache.instance_embeddings(image) for image in range(20)])
    assert found.shape == (200, 16)
    assert len(np.unique(found, axis=0)) > 150  # crops differ, and so do their embeddings
    assert cache.levels() == list(Level)


def test_peaks_add_up() -> None:
    figures = Figures(1000, 2.0, main_peak=10**9, worker_peak=2 * 10**8, workers=3, cache_bytes=5 * 10**6)
    assert figures.lines() == [
        "1,000 rows in 2 s, 500 rows/s",
        "peak host memory 1.6 GB (main 1.0 GB, 3 workers of 200.0 MB)",
        "cache 5.0 MB",
    ]
