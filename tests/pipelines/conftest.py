"""Two trained micro runs that several tests read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hdovd.coco import DataPaths
from hdovd.config import PRESETS, Recipe
from hdovd.pipelines.run_folder import RunFolder
from hdovd.pipelines.train import TrainJob, train

TrainMicro = Callable[..., RunFolder]


@pytest.fixture(scope="session")
def train_micro(world: Path, training_cache: Path, micro_recipe: Callable[..., Recipe]) -> TrainMicro:
    """Train a micro run: `train_micro(out, "train.seed=1", overwrite=True)`."""

    def run(out: Path, *settings: str, data: Path | None = None, from_cache: Path | None = None, overwrite: bool = False,
            log: Callable[[str], None] = lambda _: None) -> RunFolder:
        root = data or world
        recipe, protocol = micro_recipe(*settings), str(root / "protocol.toml")
        job = TrainJob(DataPaths(root), from_cache or training_cache, out, recipe, protocol, "cpu", overwrite)
        return train(job, log)

    return run


@pytest.fixture(scope="session")
def distilled(train_micro: TrainMicro, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with all three levels."""
    return train_micro(tmp_path_factory.mktemp("runs") / "distilled", "train.epochs=3")


@pytest.fixture(scope="session")
def base_only(train_micro: TrainMicro, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run without distillation."""
    return train_micro(tmp_path_factory.mktemp("runs") / "base-only", *PRESETS["base-only"])
