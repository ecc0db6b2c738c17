"""Trackers: programs that show the log of a run beside others: TensorBoard, Weights & Biases, MLflow, the user's own.

What they are sent is the log (log.jsonl), entry by entry, by the process that leads. `tracked.json` counts what each
has been sent: a run that goes on after a kill sends nothing twice, and what a tracker has missed follows.

Imports nothing heavy, for the sake of --help.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar

from hdovd.cache.identity import SEAL, key_of
from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.core.registry import Registry
from hdovd.core.text_files import read_json
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.options import Option
from hdovd.pipelines.common.settings import flat
from hdovd.pipelines.runs.folder import TRACKED, RunFolder

TRACKERS = Registry(
    "--track",
    {
        "tensorboard": "hdovd.pipelines.runs.trackers:TensorBoard",
        "wandb": "hdovd.pipelines.runs.trackers:WeightsAndBiases",
        "mlflow": "hdovd.pipelines.runs.trackers:MLflow",
    },
)
PLAIN = ("step", "epoch", "lr", "images_per_s", "data_wait", "memory_gb")  # of an entry; the rest are losses
PROJECT = "hdovd"  # where neither WANDB_PROJECT nor MLFLOW_EXPERIMENT_NAME says another

Track = Annotated[
    tuple[str, ...],
    Option(f"Send the log to {', '.join(TRACKERS)}, or my_module:Tracker of your own, too (docs/TRAINING.md)."),
]


class Tracker:
    """A run in a tracking program, opened when the run begins, goes on or is evaluated.

    `package`: what it needs, if anything; the extra of hdovd of the tracker's name installs it.
    """

    package: ClassVar[str] = ""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        """`identity`: of the run, the same whenever it goes on. `settings`: the recipe's values by dotted key."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name after `step` steps. May be called several times for a step, with other names."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close it, for now or for good."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard."""

    package = "tensorboard"

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard")

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases with its files in RUN/wandb. Its own variables hold: WANDB_MODE, WANDB_PROJECT, ..."""

    package = "wandb"

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        import wandb

        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds that a kill may lose, not its 15
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=run,
            id=identity,
            name=os.environ.get("WANDB_NAME", run.resolve().name),
            config=settings,
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own steps count calls, and anew in every offline file

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def finish(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """A run at MLFLOW_TRACKING_URI, or in the file RUN/mlflow/mlflow.db."""

    package = "mlflow"

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        (run / "mlflow").mkdir(exist_ok=True)
        own = f"sqlite:///{run.resolve()}/mlflow/mlflow.db"
        self._client = client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        tag = f"{PROJECT}.run"
        found = client.search_runs([experiment], f"tags.`{tag}` = '{identity}'")
        name = run.resolve().name
        opened = found[0] if found else client.create_run(experiment, tags={tag: identity}, run_name=name)
        self._id = opened.info.run_id
        client.update_run(self._id, "RUNNING")
        params = [Param(key, str(value)) for key, value in settings.items() if not found]
        for first in range(0, len(params), 100):  # the most that it takes at once
            client.log_batch(self._id, params=params[first : first + 100])

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in values.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._id)


def tracker_class(name: str) -> type[Tracker]:
    """Raises HdovdError if there is none of that name, or what it needs is not installed."""
    TRACKERS.require(name)
    found = TRACKERS.find_class(name, Tracker, "hdovd.pipelines.runs.trackers.Tracker")
    if found.package and find_spec(found.package) is None:
        raise HdovdError(f'--track {name} needs the package {found.package}: pip install "hdovd[{name}]"')
    return found


@dataclass(slots=True)
class Tracking:
    """The trackers of a run, by name. One that fails is told of once, and sent what it has missed the next time."""

    run: RunFolder
    trackers: dict[str, Tracker] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def follow(self) -> None:
        """Send what of the log has not been sent."""
        if not self.trackers:
            return
        entries, file = self.run.entries(), self.run.path / TRACKED
        sent: dict[str, int] = read_json(file, "entries sent to trackers") if file.exists() else {}
        for name in self.trackers:
            for number in range(sent.get(name, 0), len(entries)):
                write_text(file, json.dumps(sent | {name: number + 1}))  # before: a kill must not send it twice
                if not self.send(entries[number], name):
                    write_text(file, json.dumps(sent))
                    break
                sent[name] = number + 1

    def send(self, entry: dict[str, Any], name: str) -> bool:
        """Whether the tracker `name` took the numbers of an entry of the log."""
        values = {key: value for key, value in entry.items() if key not in ("step", "epoch") and value is not None}
        plain = {key: key in PLAIN or key.startswith(("val_", "eval_")) for key in values}
        try:
            self.trackers[name].log(
                entry["step"], {key if plain[key] else f"loss/{key}": values[key] for key in values}
            )
        except Exception as error:  # what is trained for days goes on
            if name not in self.failed:
                log(f"NOT tracked by {name} for now, and the run goes on: {_line_of(error)}")
            self.failed.add(name)
            return False
        self.failed.discard(name)
        return True


@contextmanager
def tracking(run: RunFolder, names: Sequence[str]) -> Iterator[Tracking]:
    """The trackers of these names, closed at the end. Raises HdovdError if one cannot be opened."""
    record = {key: value for key, value in run.record().items() if key not in ("resumed", SEAL)} if names else {}
    settings = flat(run.written_recipe().model_dump(by_alias=True)) if names else {}
    found = Tracking(run)
    try:
        for name in names:
            kind = tracker_class(name)
            try:
                found.trackers[name] = kind(run.path, key_of(record), settings)
            except Exception as error:
                raise HdovdError(
                    f"--track {name} cannot begin: {_line_of(error)}. Is it configured, and its server to be reached? "
                    f"Offline, WANDB_MODE=offline or no MLFLOW_TRACKING_URI; or leave --track {name} out"
                ) from error
        found.follow()
        yield found
        found.follow()
    finally:
        for name, tracker in found.trackers.items():
            try:
                tracker.finish()
            except Exception as error:
                log(f"note: --track {name} was not closed: {_line_of(error)}")


def _line_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
