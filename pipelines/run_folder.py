"""The folder of one training run: what is in it, and how it is written so that it is whole or absent.

    config.toml                   the resolved recipe; can be given as --recipe
    run.json                      protocol, cache identity, package versions, git commit, command; `resumed`: the same of every resumption;
                                  `init`: the run whose weights it began with, and their hash
    class_embeddings.safetensors  text embeddings of the protocol's classes, in its order: evaluation needs no cache
    model.safetensors             weights and queues after the last finished epoch; with `train.ema` the averaged weights
    best.safetensors              the same of the epoch with the best validation AP50 of base classes
    checkpoint.pt                 what `--resume` goes on from (see `checkpoint`)
    stopped                       there while a run rests that a signal ended: it can go on
    log.jsonl, log.csv            losses, learning rate, speed and validation while training
    metrics.json, detections.json, pictures/   written by hdovd eval
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.cache.identity import differences
from hdovd.config import Recipe, load_recipe
from hdovd.errors import HdovdError, require_readable
from hdovd.pipelines.settings import lasting_values
from hdovd.pipelines.whole_file import replace_file, write_text, writing
from hdovd.protocol import Protocol, parse_protocol

if TYPE_CHECKING:
    from torch import Tensor, nn

FILES = ("config.toml", "run.json", "class_embeddings.safetensors", "model.safetensors", "best.safetensors", "checkpoint.pt", "stopped",
         "log.jsonl", "log.csv", "metrics.json", "detections.json")
FOLDERS = ("pictures", "tensorboard")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, protocol: Protocol, class_embeddings: Tensor, record: dict[str, Any], *,
               overwrite: bool) -> RunFolder:
        """Start a run. Raises HdovdError if one is there, unless `overwrite`."""
        from safetensors.torch import save_file  # here: whether there is a run is asked before torch is imported

        if not overwrite:
            cls.require_none(path)
        if (path / "run.json").exists():
            for name in FILES:
                (path / name).unlink(missing_ok=True)
            for file in (*path.glob("unsound_batch*.json"), *path.glob(".*.partial")):
                file.unlink()
            for name in FOLDERS:
                shutil.rmtree(path / name, ignore_errors=True)
        write_text(path / "config.toml", recipe.to_toml())
        replace_file(path / "class_embeddings.safetensors", lambda file: save_file({"embeddings": class_embeddings.contiguous()}, file))
        run = cls(path)
        run._write_record({"protocol": protocol.to_dict(), **record, "resumed": []})  # the last: what has one is begun
        return run

    def check_same(self, recipe: Recipe, protocol: Protocol, record: dict[str, Any]) -> None:
        """Raises HdovdError naming what is asked for otherwise than the run began."""
        before = self.record()
        wanted: dict[str, Any] = {"recipe": lasting_values(recipe), "protocol": protocol.to_dict(), "cache": _levels(record)}
        began = {"recipe": lasting_values(self.recipe()), "protocol": before["protocol"], "cache": _levels(before)}
        if lines := differences(wanted, began, sides=("asked for", "began with")):
            raise HdovdError(f"{self.path} began otherwise:\n  " + "\n  ".join(lines)
                             + "\nGo on with what it began with, or give another --out")

    def go_on(self, log_bytes: int, now: dict[str, Any]) -> None:
        """The log is cut back to `log_bytes`; detections of weights on the way go."""
        for name in ("stopped", "metrics.json", "detections.json"):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "pictures", ignore_errors=True)
        before = self.record()
        file = self.path / "log.jsonl"
        if file.exists():
            os.truncate(file, min(log_bytes, file.stat().st_size))
        self._write_record(before | {"resumed": [*before.get("resumed", []), now]})

    def _write_record(self, record: dict[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(record, indent=1))

    @staticmethod
    def require_none(path: Path) -> None:
        """Raises HdovdError if a run is there."""
        if (path / "run.json").exists():
            raise HdovdError(f"{path} holds a run already: --resume goes on with it; or give another --out, or --overwrite")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run. Raises HdovdError if there is none."""
        if not (path / "run.json").is_file():
            raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote")
        if not (path / "model.safetensors").is_file():
            raise HdovdError(f"{path} has no model.safetensors: its training did not finish an epoch; go on with its hdovd train command "
                             "and --resume")
        return cls(path)

    def recipe(self) -> Recipe:
        return load_recipe(str(self.path / "config.toml"))

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))

    def protocol(self) -> Protocol:
        return parse_protocol(self.record()["protocol"])

    def class_embeddings(self) -> Tensor:
        """(C, D) text embeddings of the protocol's classes. Raises HdovdError if the file is not there, or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = self.path / "class_embeddings.safetensors"
        if not file.is_file():
            raise HdovdError(f"{self.path} has no {file.name}, which hdovd train writes: was the run copied whole?")
        require_readable(file)
        try:
            return load_file(file)["embeddings"]
        except (SafetensorError, KeyError) as error:
            raise HdovdError(f"{file} is damaged ({error}): was it copied whole?") from error

    def save_model(self, model: nn.Module, name: str = "model.safetensors") -> None:
        from safetensors.torch import save_file

        state = {k: v.contiguous() for k, v in model.state_dict().items()}
        replace_file(self.path / name, lambda partial: save_file(state, partial))

    def load_model(self, model: nn.Module, name: str = "model.safetensors") -> None:
        """Raises HdovdError if there are no such weights, or they are not of this model."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (self.path / name).is_file():
            raise HdovdError(f"{self.path} has no {name}: was the run validated while it trained?")
        require_readable(self.path / name)
        try:
            model.load_state_dict(load_file(self.path / name))
        except SafetensorError as error:
            raise HdovdError(f"{self.path / name} is damaged ({error}): was it copied whole?") from error
        except RuntimeError as error:
            raise HdovdError(f"{self.path}: {name} does not fit config.toml: {error}") from error

    def log(self, entry: dict[str, Any]) -> None:
        with writing(self.path / "log.jsonl"), (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def mark_stopped(self) -> None:
        """For job files, which do not see this process's exit code through torchrun."""
        (self.path / "stopped").touch()

    def synced_log_bytes(self) -> int:
        """The length of the log, all of which is on the disk then."""
        file = self.path / "log.jsonl"
        if not file.exists():
            return 0
        with file.open("ab") as log:
            os.fsync(log.fileno())
            return log.tell()

    def entries(self) -> list[dict[str, Any]]:
        """What was logged, but for a last line that is torn: the process was killed while it wrote. Raises HdovdError for another line
        that is no entry."""
        file = self.path / "log.jsonl"
        try:
            whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise HdovdError(f"{file} is damaged: {error}") from error

    def write_csv(self) -> None:
        """The log as a table, a line an entry."""
        entries = self.entries()
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for entry in entries for name in entry)))
        writer.writeheader()
        writer.writerows(entries)
        write_text(self.path / "log.csv", table.getvalue())


def _levels(record: dict[str, Any]) -> dict[str, str]:
    return {level: entry["key"] for level, entry in record["cache"]["levels"].items()}
