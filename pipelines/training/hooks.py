"""What training does between its steps: tell, log, validate, keep checkpoints, and stop when asked to. Called by `train`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from hdovd.core.errors import HdovdError, Stopped
from hdovd.evaluation.coco import GROUPS
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.distributed import Team
from hdovd.pipelines.common.signals import StopSignal, exit_code
from hdovd.pipelines.runs.checkpoint import rng_state, save_checkpoint
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.training.loop import Hooks, Loop

PLAIN = ("step", "epoch", "lr", "images_per_s", "data_wait", "memory_gb")  # of an entry; the rest are losses


@dataclass(slots=True)
class RunHooks(Hooks):
    """`model`: not wrapped in DDP. `layout`: kept in the checkpoint. `validate`: AP50 by group of a model, every `val_every` epochs.

    A checkpoint is written every `save_minutes`, after every epoch, and when `stop` hears a signal; the run then ends with `Stopped`.
    `best` is the best AP50 of base classes so far: novel boxes are for the test, not for choosing weights. `ended`: epochs whose
    weights were kept and validated. `failed`: validations that could not be done.
    """

    run: RunFolder
    model: nn.Module
    team: Team
    stop: StopSignal
    layout: dict[str, int]
    log: Callable[[str], None]
    save_minutes: float
    validate: Callable[[nn.Module], dict[str, float | None]] | None = None
    val_every: int = 1
    tensorboard: Any = None
    best: float = -1.0
    ended: int = 0
    failed: int = 0
    _saved: float = 0.0

    def __post_init__(self) -> None:
        self._saved = time.monotonic()

    @property
    def shows_bar(self) -> bool:  # type: ignore[override]
        return self.team.leads and sys.stderr.isatty()

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        if not self.team.leads:
            return
        self._record(entry)
        self._say(line_of(entry, left_s))

    def step(self, loop: Loop[Any]) -> None:
        due = time.monotonic() - self._saved > 60 * self.save_minutes
        due_for_all, signal = self.team.agree(int(due), self.stop.received)
        if due_for_all or signal:
            self._save(loop)
        if signal:
            if self.team.leads:
                self.run.mark_stopped()
            raise Stopped(f"stopped at step {loop.step_number} of {loop.total}, saved in {self.run.path}; the same command with --resume "
                          "goes on there", exit_code(signal))

    def epoch(self, loop: Loop[Any], epoch: int) -> None:
        self._save(loop)  # before what takes a while and can be done again
        if loop.step_number < loop.total:
            self.step(loop)
        self.catch_up(loop)
        if loop.step_number == loop.total:
            self._save(loop)

    def catch_up(self, loop: Loop[Any]) -> None:
        """At the end of an epoch: keep its weights, and validate if it is time. A run that was killed meanwhile begins with it."""
        epoch, within = divmod(loop.step_number, len(loop.batches))
        if self.team.leads and not within and epoch > self.ended:
            self.run.save_model(loop.result)
            if self.validate is not None and (epoch % self.val_every == 0 or epoch == loop.config.epochs):
                self._validate(loop, epoch)
            self.run.write_csv()
        self.ended = epoch
        self.team.wait()

    def _validate(self, loop: Loop[Any], epoch: int) -> None:
        assert self.validate is not None
        try:
            ap50 = self.validate(loop.result)
        except Exception as error:  # whatever it is, what was trained for days goes on; its figures are empty in the log
            self.failed += 1
            self._record({"step": loop.step_number, "epoch": epoch, **{f"val_{group}": None for group in GROUPS}})
            kind = "" if isinstance(error, HdovdError) else f"{type(error).__name__}: "
            self._say(f"epoch {epoch}: NOT validated, and training goes on: {kind}{error}")
            return
        self._record({"step": loop.step_number, "epoch": epoch, **{f"val_{group}": value for group, value in ap50.items()}})
        base = ap50["base"]
        better = base is not None and base > self.best
        if better:
            assert base is not None
            self.best = base
            self.run.save_model(loop.result, "best.safetensors")
        numbers = ", ".join(f"{group} {'none' if value is None else f'{value:.1f}'}" for group, value in ap50.items())
        self._say(f"epoch {epoch}: validation AP50 {numbers}" + ("; best of base classes so far" if better else ""))

    def _save(self, loop: Loop[Any]) -> None:
        loop.window.means(loop.device)  # unsound weights never replace good ones
        state = {"rng": self.team.gather(rng_state(self.team.device)), "layout": self.layout, "best": self.best, "ended": self.ended,
                 "failed": self.failed, **loop.state()}
        if self.team.leads:
            save_checkpoint(self.run.path, {"model": self.model.state_dict(), "log_bytes": self.run.synced_log_bytes(), **state})
        self._saved = time.monotonic()

    def _record(self, entry: dict[str, Any]) -> None:
        self.run.log(entry)
        if self.tensorboard is not None:
            for name, value in entry.items():
                if name not in ("step", "epoch") and value is not None:
                    self.tensorboard.add_scalar(name if name in PLAIN or name.startswith("val_") else f"loss/{name}", value, entry["step"])
            self.tensorboard.flush()

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():  # not into the bar
            self.log(line)


def line_of(entry: dict[str, float], left_s: float) -> str:
    """An interval in one line: losses by level, learning rate, speed, waiting for data, memory, time left."""
    parts: dict[str, float] = {}
    for name, value in entry.items():
        if name not in PLAIN:
            level = name.partition("_")[0]
            parts[level] = parts.get(level, 0.0) + value
    losses = ", ".join(f"{level} {value:.3f}" for level, value in parts.items())
    return (f"epoch {entry['epoch']:.0f} step {entry['step']:.0f}: loss {sum(parts.values()):.3f} ({losses}), lr {entry['lr']:.2e}, "
            f"{entry['images_per_s']:.1f} images/s, {entry['data_wait']:.1%} waiting for data, {entry['memory_gb']:.1f} GB, "
            f"{duration(left_s)} left")


def duration(seconds: float) -> str:
    """In words that fit: 45 s, 12 min, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def unsound_record(run: RunFolder, team: Team, record: dict[str, Any]) -> str:
    """Keep what is known of a batch whose loss is not sound, of this process's part of it; returns the file's path."""
    file = run.path / (f"unsound_batch-{team.rank}.json" if team.world > 1 else "unsound_batch.json")
    write_text(file, json.dumps(record, indent=1))
    return str(file)
