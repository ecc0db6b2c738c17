"""Two trained micro runs that several tests read, and a browser for the pages."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hdovd.config.recipe import PRESETS, Recipe
from hdovd.core import lines_to
from hdovd.data import DataPaths
from hdovd.pipelines.runs import RunFolder
from hdovd.pipelines.training.train import TrainConfig, train

TrainMicro = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def train_micro(world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe]) -> TrainMicro:
    """Train a micro run: `train_micro(out, "train.seed=1", overwrite=True)`."""

    def run(
        out: Path,
        *settings: str,
        data: Path | None = None,
        from_cache: Path | None = None,
        overwrite: bool = False,
        log: Callable[[str], None] = lambda _: None,
    ) -> RunFolder:
        root = data or world
        recipe, protocol = micro_recipe(*settings), str(root / "protocol.toml")
        job = TrainConfig(
            data=DataPaths(root),
            cache=from_cache or training_cache,
            out=out,
            recipe=recipe,
            protocol=protocol,
            device="cpu",
            overwrite=overwrite,
        )
        with lines_to(log):
            return train(job)

    return run


@pytest.fixture(scope="session")
def distilled(train_micro: TrainMicro, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with all three levels."""
    return train_micro(tmp_path_factory.mktemp("runs") / "distilled", "train.epochs=3")


@pytest.fixture(scope="session")
def base_only(train_micro: TrainMicro, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run without distillation."""
    return train_micro(tmp_path_factory.mktemp("runs") / "base-only", *PRESETS["base-only"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, driven by Playwright. Tests that ask for it are skipped where there is none.

    One a file: while it is open, an event loop runs in this thread, and no other can.
    """
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with pytest.importorskip("playwright.sync_api").sync_playwright() as tools:
        opened = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
