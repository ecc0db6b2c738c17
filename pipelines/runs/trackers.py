"""Trackers: programs that show the log of a run beside others: TensorBoard, Weights & Biases, MLflow, the user's own.

What they are sent is the log (log.jsonl), entry by entry, by the process that leads. `tracked.json` counts what each
has been sent: a run that goes on after a kill sends nothing twice, and what a tracker has missed follows.

Imports nothing heavy, for the sake of --help.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from hdovd.cache import SEAL, key_of
from hdovd.core import HdovdError, in_a_line, log
from hdovd.core.registry import Registry
from hdovd.core.text_files import read_json
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.options import Option
from hdovd.pipelines.common.settings import flat
from hdovd.pipelines.runs.folder import TRACKED, RunFolder

TRACKERS = Registry(
    "--track",
    {  # those of hdovd are named as the package and the extra that they need
        "tensorboard": "hdovd.pipelines.runs.trackers:TensorBoard",
        "wandb": "hdovd.pipelines.runs.trackers:WeightsAndBiases",
        "mlflow": "hdovd.pipelines.runs.trackers:MLflow",
    },
)
PLAIN = ("step", "epoch", "lr", "images_per_s", "data_wait", "memory_gb")  # of an entry; the rest are losses
PROJECT = "hdovd"  # where neither WANDB_PROJECT nor MLFLOW_EXPERIMENT_NAME says another


class Tracker:
    """A run in a tracking program, opened when the run begins, goes on or is evaluated."""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        """`identity`: of the run, the same whenever it goes on. `settings`: the recipe's values by dotted key."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Numbers by name after `step` steps. May be called several times for a step, with other names."""
        raise NotImplementedError

    def finish(self) -> None:
        """Close it, for now or for good."""


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(run / "tensorboard")
        self.finish = self._writer.close  # type: ignore[method-assign]

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases with its files in RUN/wandb. Its own variables hold: WANDB_MODE, WANDB_PROJECT, ..."""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        import wandb

        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds that a kill may lose, not its 15
        project, name = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_NAME", run.resolve().name)
        self._run = wandb.init(project=project, name=name, id=identity, resume="allow", dir=run, config=settings)
        self._run.define_metric("*", step_metric="step")  # W&B's own steps count calls, and anew in every offline file
        self.finish = self._run.finish  # type: ignore[method-assign]

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})


class MLflow(Tracker):
    """A run at MLFLOW_TRACKING_URI, or in the file RUN/mlflow/mlflow.db."""

    def __init__(self, run: Path, identity: str, settings: dict[str, Any]) -> None:
        import mlflow

        (run / "mlflow").mkdir(exist_ok=True)
        mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{run.resolve()}/mlflow/mlflow.db"))
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        about = {f"{PROJECT}.run": identity}
        found = mlflow.search_runs(filter_string=f"tags.`{PROJECT}.run` = '{identity}'", output_format="list")
        mlflow.start_run(found[0].info.run_id if found else None, run_name=run.resolve().name, tags=about)
        mlflow.log_params(settings)
        self._log, self.finish = mlflow.log_metrics, mlflow.end_run  # type: ignore[method-assign]

    def log(self, step: int, values: dict[str, float]) -> None:
        self._log(values, step=step)


def tracker_class(name: str) -> type[Tracker]:
    """Raises HdovdError if there is none of that name, or what it needs is not installed."""
    TRACKERS.require(name)
    if name in TRACKERS and find_spec(name) is None:
        raise HdovdError(f'--track {name} needs the package {name}: pip install "hdovd[{name}]"')
    return TRACKERS.find_class(name, Tracker, "hdovd.pipelines.runs.trackers.Tracker")


@dataclass(frozen=True, kw_only=True)
class TrackOptions:
    """Where the log of a run goes besides."""

    track: Annotated[
        tuple[str, ...],
        Option(f"Send the log to {', '.join(TRACKERS)}, or my_module:Tracker of your own, too (docs/TRAINING.md)."),
    ] = ()

    def check(self) -> None:
        """Raises HdovdError as `tracker_class`."""
        for name in self.track:
            tracker_class(name)


@dataclass(slots=True)
class Tracking:
    """The trackers of a run, by name. One that fails is told of once, and sent what it has missed the next time."""

    run: RunFolder
    trackers: dict[str, Tracker] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)

    def follow(self) -> None:
        """Send what of the log has not been sent."""
        entries, file = self.run.entries() if self.trackers else [], self.run.path / TRACKED
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
        values = {
            key if key in PLAIN or key.startswith(("val_", "eval_")) else f"loss/{key}": value
            for key, value in entry.items()
            if key not in ("step", "epoch") and value is not None
        }
        try:
            self.trackers[name].log(entry["step"], values)
            self.failed.discard(name)
        except Exception as error:  # what is trained for days goes on
            if name not in self.failed:
                log(f"NOT tracked by {name} for now, and the run goes on: {in_a_line(error)}")
            self.failed.add(name)
        return name not in self.failed

    def finish(self, name: str) -> None:
        try:
            self.trackers[name].finish()
        except Exception as error:
            log(f"{name} was not closed as it should be: {in_a_line(error)}")


@contextmanager
def tracking(run: RunFolder, names: Sequence[str]) -> Iterator[Tracking]:
    """The trackers of these names, closed at the end. Raises HdovdError if one cannot be opened."""
    found = Tracking(run)
    with ExitStack() as stack:
        for name in names:
            kind, record = tracker_class(name), run.record()
            identity = key_of({key: value for key, value in record.items() if key not in ("resumed", SEAL)})
            settings = flat(run.written_recipe().model_dump(by_alias=True))
            try:
                found.trackers[name] = kind(run.path, identity, settings)
            except Exception as error:
                raise HdovdError(
                    f"--track {name} cannot begin: {in_a_line(error)}. Is it configured, and its server to be reached? "
                    f"Offline, WANDB_MODE=offline or no MLFLOW_TRACKING_URI; or leave --track {name} out"
                ) from error
            stack.callback(found.finish, name)
        found.follow()
        yield found
        found.follow()
