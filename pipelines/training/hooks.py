"""What training does between its steps: tell, log, validate, keep checkpoints, and stop when asked to.

A checkpoint is all that a run needs to go on sample by sample, in one file that is whole or absent:

    model                    weights and queues
    optimizer, step, window  as of `loop.Loop`
    layout                   of `train.batches_of`: what the order depends on
    log_bytes                length of log.jsonl
    best, ended, failed      of `RunHooks`
    ema                      with `train.ema`: of `loop.WeightAverage`; `model` has the weights that are trained

Samples and their order follow from seed and epoch, and what draws from torch's generators from seed and step: none of
these has a state that a run would have to keep.
"""

import time
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hdovd.core import HdovdError, Stopped, in_a_line, log, require_readable
from hdovd.data import GROUPS
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.console import duration
from hdovd.pipelines.common.device import Team
from hdovd.pipelines.common.process import StopSignal, exit_code
from hdovd.pipelines.common.tensors import load_pth
from hdovd.pipelines.runs import PLAIN, RunFolder
from hdovd.pipelines.training.loop import Hooks, Loop

CHECKPOINT = "checkpoint.pt"


def load_checkpoint(folder: Path, needs: Collection[str] = ()) -> dict[str, Any] | None:
    """The checkpoint, or None if there is none. Raises HdovdError for one that cannot be read, is not what was written
    (by the checksums of its zip file, which torch does not look at), or lacks something of `needs`.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    require_readable(file)
    try:
        with zipfile.ZipFile(file) as records:
            if (damaged := records.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        state: dict[str, Any] = load_pth(file)
        if missing := set(needs) - state.keys():
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except Exception as error:
        raise HdovdError(
            f"{file} cannot be read ({error}): was it copied whole? Without it training can only begin anew: "
            "--overwrite, and no --resume"
        ) from error
    return state


@contextmanager
def fits(folder: Path) -> Iterator[None]:
    """Raises HdovdError if what is done with the checkpoint of a folder fails."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise HdovdError(
            f"{folder / CHECKPOINT} does not fit this training ({in_a_line(error)}): is it that of another run?"
        ) from error


@dataclass(slots=True)
class RunHooks(Hooks):
    """Tells how training goes, logs and validates, and keeps weights and a checkpoint in `run`: every
    `save_minutes`, after every epoch, and when `stop` hears a signal; training then ends with `Stopped`.

    `model`: not wrapped in DDP. `extra`: kept in the checkpoint too. `command`: what goes on with it, in the message of
    `Stopped`. `validate`: AP by group of a model, every `val_every` epochs; `metric`: which. `follow`: called after
    every entry of the log.

    `best` is the best AP of base classes so far: novel boxes are for the test, not for choosing weights. `ended`:
    epochs whose weights were kept and validated. `failed`: validations that could not be done.
    """

    run: RunFolder
    model: nn.Module
    team: Team
    stop: StopSignal
    extra: dict[str, Any]
    save_minutes: float
    command: str = "the same command"
    validate: Callable[[nn.Module], dict[str, float | None]] | None = None
    val_every: int = 1
    metric: str = "AP50"
    follow: Callable[[], None] = lambda: None
    best: float = -1.0
    ended: int = 0
    failed: int = 0
    _saved: float = field(default_factory=time.monotonic)

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        if self.team.leads:
            self._record(entry)
        self._say(line_of(entry, left_s))

    def step(self, loop: Loop[Any]) -> None:
        due, signal = self.team.agree(int(time.monotonic() - self._saved > 60 * self.save_minutes), self.stop.received)
        if due or signal:
            self._save(loop)
        if signal:
            if self.team.leads:  # for job files, which do not see this process's exit code through torchrun
                (self.run.path / "stopped").touch()
            raise Stopped(
                f"stopped at step {loop.step_number} of {loop.total}, saved in {self.run.path}; {self.command} goes on "
                f"there",
                exit_code(signal),
            )

    def epoch(self, loop: Loop[Any], epoch: int) -> None:
        self._save(loop)  # before what takes a while and can be done again
        if loop.step_number < loop.total:
            self.step(loop)
        self.catch_up(loop)
        if loop.step_number == loop.total:
            self._save(loop)

    def restore(self, state: dict[str, Any], loop: Loop[Any]) -> None:
        """Go on from a checkpoint. Raises HdovdError if it does not fit."""
        with fits(self.run.path):
            self.model.load_state_dict(state["model"])
            loop.load(state)
            self.best, self.ended, self.failed = (
                float(state.get("best", -1.0)),
                int(state.get("ended", 0)),
                int(state.get("failed", 0)),
            )

    def _save(self, loop: Loop[Any]) -> None:
        loop.window.means(loop.device)  # unsound weights never replace good ones
        state = loop.state()
        if self.team.leads:
            state |= {
                "model": self.model.state_dict(),
                "log_bytes": self.run.synced_log_bytes(),
                "best": self.best,
                "ended": self.ended,
                "failed": self.failed,
                **self.extra,
            }
            replace_file(self.run.path / CHECKPOINT, lambda partial: torch.save(state, partial))
        self._saved = time.monotonic()

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():  # not into the bar
            log(line)

    def catch_up(self, loop: Loop[Any]) -> None:
        """At the end of an epoch: keep its weights, and validate if it is time. A run that was killed meanwhile begins
        with it.
        """
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
        ap50: dict[str, float | None] = dict.fromkeys(GROUPS)
        try:
            ap50 = self.validate(loop.result)
            numbers = (f"{group} {'none' if value is None else f'{value:.1f}'}" for group, value in ap50.items())
            line = f"validation {self.metric} {', '.join(numbers)}"
        except Exception as error:  # what was trained for days goes on; its figures are empty in the log
            self.failed += 1
            kind = "" if isinstance(error, HdovdError) else f"{type(error).__name__}: "
            line = f"NOT validated, and training goes on: {kind}{error}"
        self._record(
            {"step": loop.step_number, "epoch": epoch} | {f"val_{group}": value for group, value in ap50.items()}
        )
        base = ap50["base"]
        if base is not None and base > self.best:
            self.best = base
            self.run.save_model(loop.result, "best.safetensors")
            line += "; best of base classes so far"
        self._say(f"epoch {epoch}: {line}")

    def _record(self, entry: dict[str, Any]) -> None:
        self.run.log(entry)
        self.follow()


def line_of(entry: dict[str, float], left_s: float) -> str:
    """An interval in one line: losses by level, learning rate, speed, waiting for data, memory, time left."""
    losses = {name: value for name, value in entry.items() if name not in PLAIN}
    levels = dict.fromkeys(name.partition("_")[0] for name in losses)
    told = ", ".join(
        f"{level} {sum(losses[n] for n in losses if n.partition('_')[0] == level):.3f}" for level in levels
    )
    return (
        f"epoch {entry['epoch']:.0f} step {entry['step']:.0f}: loss {sum(losses.values()):.3f} ({told}), lr "
        f"{entry['lr']:.2e}, "
        f"{entry['images_per_s']:.1f} images/s, {entry['data_wait']:.1%} waiting for data, {entry['memory_gb']:.1f} "
        f"GB, {duration(left_s)} left"
    )
