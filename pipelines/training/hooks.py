"""What training does between its steps: tell, log, validate, keep checkpoints, and stop when asked to.

A checkpoint is all that a run needs to go on sample by sample, in one file that is whole or absent:

    model                    weights and queues
    optimizer, step, window  as of `loop.Loop`
    rng                      torch's generators, a process each
    layout                   of `train.batches_of`: what the order depends on
    log_bytes                length of log.jsonl
    best, ended, failed      of `RunHooks`
    ema                      with `train.ema`: of `loop.WeightAverage`; `model` has the weights that are trained

Losses, samples and their order follow from seed and epoch; torch's generators matter only to what else draws from them.
"""

import json
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hdovd.core.errors import HdovdError, Stopped, require_readable
from hdovd.core.log import log
from hdovd.data.protocol import GROUPS
from hdovd.pipelines.common.atomic_write import replace_file, write_text
from hdovd.pipelines.common.console import duration
from hdovd.pipelines.common.device import Team
from hdovd.pipelines.common.process import StopSignal, exit_code
from hdovd.pipelines.common.tensors import load_pth
from hdovd.pipelines.dataloading.loader import key_of
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.runs.trackers import PLAIN
from hdovd.pipelines.training.loop import Hooks, Loop

CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint; a kill, a power cut or a full disk leaves the old one or the new one. Raises
    HdovdError."""
    replace_file(folder / CHECKPOINT, lambda partial: torch.save(state, partial))


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
            f"{folder / CHECKPOINT} does not fit this training ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}): is it that of another run?"
        ) from error


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of this process."""
    return {
        "cpu": torch.get_rng_state(),
        **({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}),
    }


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@dataclass(slots=True)
class SavingHooks(Hooks):
    """Tells how training goes, and keeps a checkpoint in `folder`: every `save_minutes`, after every epoch, and when
    `stop` hears a signal; training then ends with `Stopped`.

    `model`: not wrapped in DDP. `extra`: kept in the checkpoint too. `command`: what goes on with it, in the message of
    `Stopped`.
    """

    folder: Path
    model: nn.Module
    team: Team
    stop: StopSignal
    extra: dict[str, Any]
    save_minutes: float
    command: str = "the same command"
    _saved: float = field(default_factory=time.monotonic)

    @property
    def shows_bar(self) -> bool:  # type: ignore[override]
        return self.team.leads and sys.stderr.isatty()

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        self._say(line_of(entry, left_s))

    def step(self, loop: Loop[Any]) -> None:
        due, signal = self.team.agree(int(time.monotonic() - self._saved > 60 * self.save_minutes), self.stop.received)
        if due or signal:
            self._save(loop)
        if signal:
            if self.team.leads:  # for job files, which do not see this process's exit code through torchrun
                (self.folder / "stopped").touch()
            raise Stopped(
                f"stopped at step {loop.step_number} of {loop.total}, saved in {self.folder}; {self.command} goes on "
                f"there",
                exit_code(signal),
            )

    def epoch(self, loop: Loop[Any], epoch: int) -> None:
        self._save(loop)  # before what takes a while and can be done again
        if loop.step_number < loop.total:
            self.step(loop)

    def kept(self) -> dict[str, Any]:
        """What the checkpoint holds besides weights, generators and the loop's state; asked of the process that
        leads."""
        return self.extra

    def restore(self, state: dict[str, Any], loop: Loop[Any]) -> None:
        """Go on from a checkpoint. Raises HdovdError if it does not fit."""
        with fits(self.folder):
            self.model.load_state_dict(state["model"])
            loop.load(state)
            if len(state["rng"]) == self.team.world:
                set_rng_state(state["rng"][self.team.rank], self.team.device)
            else:  # as many generators as there are processes now: none of the old ones
                torch.manual_seed(key_of(loop.config.seed, -2 - loop.step_number, self.team.rank))

    def _save(self, loop: Loop[Any]) -> None:
        loop.window.means(loop.device)  # unsound weights never replace good ones
        state = {"rng": self.team.gather(rng_state(self.team.device)), **loop.state()}
        if self.team.leads:
            save_checkpoint(self.folder, {"model": self.model.state_dict(), **state, **self.kept()})
        self._saved = time.monotonic()

    def _say(self, line: str) -> None:
        with tqdm.external_write_mode():  # not into the bar
            log(line)


@dataclass(slots=True)
class RunHooks(SavingHooks):
    """Those of `hdovd train`: log and validation too. `validate`: AP by group of a model, every `val_every` epochs;
    `metric`: which. `follow`: called after every entry of the log.

    `best` is the best AP of base classes so far: novel boxes are for the test, not for choosing weights. `ended`:
    epochs whose weights were kept and validated. `failed`: validations that could not be done.
    """

    validate: Callable[[nn.Module], dict[str, float | None]] | None = None
    val_every: int = 1
    metric: str = "AP50"
    follow: Callable[[], None] = lambda: None
    best: float = -1.0
    ended: int = 0
    failed: int = 0

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder)

    def interval(self, entry: dict[str, float], left_s: float) -> None:
        if self.team.leads:
            self._record(entry)
        SavingHooks.interval(self, entry, left_s)

    def epoch(self, loop: Loop[Any], epoch: int) -> None:
        SavingHooks.epoch(self, loop, epoch)
        self.catch_up(loop)
        if loop.step_number == loop.total:
            self._save(loop)

    def kept(self) -> dict[str, Any]:
        return {
            **self.extra,
            "best": self.best,
            "ended": self.ended,
            "failed": self.failed,
            "log_bytes": self.run.synced_log_bytes(),
        }

    def restore(self, state: dict[str, Any], loop: Loop[Any]) -> None:
        SavingHooks.restore(self, state, loop)
        with fits(self.folder):
            self.best, self.ended, self.failed = float(state["best"]), int(state["ended"]), int(state.get("failed", 0))

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
    parts = defaultdict[str, float](float)
    for name, value in entry.items():
        if name not in PLAIN:
            parts[name.partition("_")[0]] += value
    losses = ", ".join(f"{level} {value:.3f}" for level, value in parts.items())
    return (
        f"epoch {entry['epoch']:.0f} step {entry['step']:.0f}: loss {sum(parts.values()):.3f} ({losses}), lr "
        f"{entry['lr']:.2e}, "
        f"{entry['images_per_s']:.1f} images/s, {entry['data_wait']:.1%} waiting for data, {entry['memory_gb']:.1f} "
        f"GB, {duration(left_s)} left"
    )


def unsound_record(run: RunFolder, team: Team, record: dict[str, Any]) -> str:
    """Keep what is known of a batch whose loss is not sound, of this process's part of it; returns the file's path."""
    file = run.path / (f"unsound_batch-{team.rank}.json" if team.world > 1 else "unsound_batch.json")
    write_text(file, json.dumps(record, indent=1))
    return str(file)
