"""The folder of one training run: what is in it, and how it is written so that it is whole or absent.

    config.toml                   the resolved recipe; can be given as --recipe
    run.json                      protocol, cache identity, package versions, git commit, command; `resumed`: the same
                                  of every resumption; `init`: the run whose weights it began with, and their hash;
                                  `adapted`, `mix`: of `hdovd adapt`, data and interpolation;
                                  `oracle`: true where boxes of novel classes were trained on;
                                  `files`: hashes of the two files above and below, which never change
    class_embeddings.safetensors  text embeddings of the protocol's classes, in its order: evaluation needs no cache
    model.safetensors             weights and queues after the last finished epoch; with `train.ema` the averaged
                                  weights
    best.safetensors              the same of the epoch with the best validation AP of base classes
    checkpoint.pt                 what `--resume` goes on from (see `training/hooks.py`)
    stopped                       there while a run rests that a signal ended: it can go on
    log.jsonl, log.csv            losses, learning rate, speed and validation while training
    tracked.json                  how many entries of the log each tracker has been sent; their own files lie in
                                  tensorboard/, wandb/, mlflow/
    metrics.json, detections.json, pictures/   written by hdovd eval
    trained.safetensors, teacher.json, retention.json, naive/   of hdovd adapt: weights before the interpolation, boxes
                                  of the frozen run, AP before and after, plain fine-tuning to compare with

What a run is read by is checked: run.json has a checksum of itself, the weights in their own files (`common.tensors`),
a checkpoint those of a zip file. So there is no moment in which a kill leaves a file and a checksum that do not fit.
Older runs have none, and open as before. What its text files name, code to import and addresses to ask, is followed at
the user's word alone, or if the user trained it here.

Imports nothing heavy, for the sake of --help.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hdovd.cache import hash_file, local_run, require_same, require_seal, sealed
from hdovd.config.recipe import Recipe, load_recipe, outside_code
from hdovd.core import HdovdError, require_readable, shorten, user_cache_folder
from hdovd.data import Protocol, parse_protocol
from hdovd.pipelines.common.atomic_write import replace_file, write_text, writing
from hdovd.pipelines.common.settings import lasting_values

if TYPE_CHECKING:
    from torch import Tensor, nn


class Weights(StrEnum):
    """Which of a run's weights."""

    LAST = "last"
    BEST = "best"

    @property
    def file(self) -> str:
        return "model.safetensors" if self is Weights.LAST else "best.safetensors"


def weights_hash(file: Path) -> str:
    """What tells the weights in a file from others: the start of its SHA-256."""
    return hash_file(file)[:24]


TRACKED = "tracked.json"
FILES = (
    "config.toml",
    "run.json",
    "class_embeddings.safetensors",
    "model.safetensors",
    "best.safetensors",
    "trained.safetensors",
    "checkpoint.pt",
    "stopped",
    "log.jsonl",
    "log.csv",
    "metrics.json",
    "detections.json",
    TRACKED,
    "retention.json",
)
FOLDERS = ("pictures", "tensorboard", "wandb", "mlflow", "naive")
UPPER_BOUND = "an upper bound, and no open-vocabulary result"  # what an oracle's AP is
LASTING = ("config.toml", "class_embeddings.safetensors")
NORM_TOLERANCE = 0.01  # of class embeddings


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`path`: of hf://USER/NAME[@REVISION] the folder into which it is pulled. `trusted`: the user answers for what
    run.json and config.toml name, and for changes to them.
    """

    path: Path
    trusted: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", local_run(self.path))

    @classmethod
    def create(
        cls, path: Path, recipe: Recipe, protocol: Protocol, class_embeddings: Tensor, record: dict[str, Any]
    ) -> RunFolder:
        """Start a run, in place of one that is there."""
        run = cls(path, trusted=True)
        if (path / "run.json").exists():
            run.remove(*FILES, *FOLDERS, "unsound_batch*.json", ".*.partial")
        write_text(path / "config.toml", recipe.to_toml())
        run._save({"embeddings": class_embeddings}, "class_embeddings.safetensors")
        run._write_record(  # the last: what has one is begun
            {
                "protocol": protocol.to_dict(),
                **record,
                "resumed": [],
                "files": {name: weights_hash(path / name) for name in LASTING},
            }
        )
        return run

    def check_same(self, recipe: Recipe, protocol: Protocol, record: dict[str, Any]) -> None:
        """Raises HdovdError naming what is asked for otherwise than the run began."""
        asked, began = (
            {
                "recipe": lasting_values(own),
                "protocol": about["protocol"],
                "cache": {level: entry["key"] for level, entry in about["cache"]["levels"].items()},
                "oracle": about.get("oracle", False),
            }
            for own, about in (
                (recipe, record | {"protocol": protocol.to_dict()}),
                (self.written_recipe(), self.record()),
            )
        )
        require_same(
            asked,
            began,
            f"{self.path} began otherwise",
            "Go on with what it began with, or give another --out",
            sides=("asked for", "began with"),
        )

    def go_on(self, log_bytes: int, now: dict[str, Any]) -> None:
        """The log is cut back to `log_bytes`; detections of weights on the way go."""
        self.remove("stopped", "metrics.json", "detections.json", "retention.json", "pictures")
        self.cut_log(log_bytes)
        before = self.record()
        self._write_record(before | {"resumed": [*before["resumed"], now]})

    def cut_log(self, log_bytes: int) -> None:
        """Take back what was logged after a checkpoint."""
        with (self.path / "log.jsonl").open("ab") as log:
            log.truncate(min(log_bytes, log.tell()))

    def remove(self, *patterns: str) -> None:
        """Delete the files and folders of these names, as far as they are there."""
        for file in [file for pattern in patterns for file in self.path.glob(pattern)]:
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                file.unlink(missing_ok=True)

    def add_to_record(self, **entries: Any) -> None:
        """What became of the run after its training."""
        self._write_record(self.record() | entries)

    def _write_record(self, record: dict[str, Any]) -> None:
        write_text(self.path / "run.json", json.dumps(sealed(record), indent=1))
        with suppress(OSError):  # then the user will be asked for --trust
            self._made_here().parent.mkdir(parents=True, exist_ok=True)
            self._made_here().touch()

    @staticmethod
    def require_none(path: Path) -> None:
        """Raises HdovdError if a run is there."""
        if (path / "run.json").exists():
            raise HdovdError(
                f"{path} holds a run already: --resume goes on with it; or give another --out, or --overwrite"
            )

    @classmethod
    def open(cls, path: Path, *, trusted: bool = False) -> RunFolder:
        """A finished run. Raises HdovdError if there is none."""
        run = cls(path, trusted)
        if not (run.path / "run.json").is_file():
            raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote")
        if not (run.path / "model.safetensors").is_file():
            raise HdovdError(
                f"{path} has no model.safetensors: its training did not finish an epoch; go on with its hdovd train "
                f"command and --resume"
            )
        return run

    def written_recipe(self) -> Recipe:
        """The recipe to compare with, not to build from. Raises HdovdError for one that was changed, unless the run is
        trusted.
        """
        if not self.trusted and (self.path / "run.json").exists():
            self._require_as_written("config.toml")
        return load_recipe(str(self.path / "config.toml"))

    def recipe(self) -> Recipe:
        """Raises HdovdError for one that was changed, or names code outside of hdovd, unless the run is trusted."""
        recipe = self.written_recipe()
        if code := [f"{key} = {use!r}" for key, use in outside_code(recipe).items()]:
            self._require_trust(f"names code outside of hdovd, which would be run: {shorten([*code])}")
        return recipe

    def record(self) -> dict[str, Any]:
        """Raises HdovdError for one that is damaged, or was changed, unless the run is trusted."""
        file = self.path / "run.json"
        require_readable(file)
        try:
            record: dict[str, Any] = json.loads(file.read_bytes())
            if not self.trusted:
                require_seal(record)
            parse_protocol(record["protocol"])
            levels = record["cache"]["levels"].values()
            texts = [record["cache"].get("path"), *(entry["key"] for entry in levels)]
            if began := record.get("init"):
                texts += [began["run"], began["sha256"]]
            if known := record.get("reliability"):
                texts.append(known["source"])
                _ = [float(known[name]) for name in ("centre", "width", "scale")]
            trees = [record.get("files", {}), *(entry.get("inputs", {}) for entry in levels)]
            if not (all(isinstance(text, str | None) for text in texts) and all(isinstance(t, dict) for t in trees)):
                raise TypeError("expected texts and objects")
            return record | {"resumed": list(record.get("resumed", []))}
        except (HdovdError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = error if isinstance(error, HdovdError | ValueError) else repr(error)
            raise HdovdError(
                f"{file} is damaged ({why}): was the run copied whole? If you changed it yourself: --trust"
            ) from error

    def cache_url(self) -> str | None:
        """Where the cache lay that the run was trained from. Raises HdovdError for an address that is to be asked over
        a network, unless the run is trusted.
        """
        url: str | None = self.record()["cache"].get("path")
        if url is not None and "://" in url and not url.startswith("file://"):
            self._require_trust(f"names the cache {url}, which would be asked with your credentials")
        return url

    def _require_as_written(self, name: str) -> None:
        """Raises HdovdError for a file of LASTING that is not what run.json says."""
        wanted = self.record().get("files", {}).get(name)
        if wanted is not None and wanted != weights_hash(self.path / name):
            raise HdovdError(
                f"{self.path / name} is not what hdovd train wrote: copy it again"
                + ("; or, if you changed it yourself: --trust" if name == "config.toml" else "")
            )

    def _require_trust(self, what: str) -> None:
        if not self.trusted and not self._made_here().exists():
            raise HdovdError(
                f"{self.path} {what}. It was not trained here by you: if you trust who made it, give --trust"
            )

    def _made_here(self) -> Path:
        """A file of the user's own that is there if hdovd wrote a run in this place, of this recipe and cache: nobody
        can send it along.
        """
        about = (
            str(self.path.resolve()),
            (self.path / "config.toml").read_text(),
            str(self.record()["cache"].get("path")),
        )
        return user_cache_folder() / "runs" / hashlib.sha256("\0".join(about).encode()).hexdigest()

    def protocol(self) -> Protocol:
        return parse_protocol(self.record()["protocol"])

    @property
    def saw_novel(self) -> bool:
        """Whether boxes of novel classes were trained on, by this run or by the one whose weights it began with."""
        record = self.record()
        return bool(record.get("oracle") or (record.get("init") or {}).get("oracle"))

    def class_embeddings(self) -> Tensor:
        """(C, D) text embeddings of the protocol's classes. Raises HdovdError if the file is not there, damaged, or of
        other classes.
        """
        file, names = self.path / "class_embeddings.safetensors", self.protocol().names
        rows = self._tensors(file.name).get("embeddings")
        self._require_as_written(file.name)
        if (
            rows is None
            or rows.ndim != 2
            or len(rows) != len(names)
            or not rows.is_floating_point()
            or not ((rows.float().norm(dim=1) - 1).abs() < NORM_TOLERANCE).all()
        ):
            found = "none" if rows is None else f"{rows.dtype} {tuple(rows.shape)}"
            raise HdovdError(
                f"{file}: expected embeddings of norm 1, a row for each of the {len(names)} classes of run.json, found "
                f"{found}: it is damaged, or of other classes"
            )
        return rows

    def _tensors(self, name: str) -> dict[str, Tensor]:
        """Raises HdovdError for a file that is not there, or damaged."""
        from hdovd.pipelines.common.tensors import load_tensors

        if not (self.path / name).is_file():
            raise HdovdError(f"{self.path} has no {name}: was the run copied whole, and validated while it trained?")
        return load_tensors(self.path / name)

    def save_model(self, model: nn.Module, name: str = "model.safetensors") -> None:
        self._save(model.state_dict(), name)

    def _save(self, tensors: dict[str, Tensor], name: str) -> None:
        from hdovd.pipelines.common.tensors import save_tensors

        whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
        replace_file(self.path / name, lambda partial: save_tensors(whole, partial))

    def load_model(self, model: nn.Module, name: str = "model.safetensors") -> None:
        """Raises HdovdError if there are no such weights, they are damaged or not finite, or they are not of this
        model.
        """
        state, begun = self._tensors(name), model.state_dict()
        if bad := [
            key
            for key, value in state.items()
            if value.is_floating_point()
            and not value.isfinite().all()
            and not (key in begun and begun[key].isinf().any())
        ]:  # a mask of a model's own is full of infinities
            raise HdovdError(
                f"{self.path / name}: values that are not finite in {len(bad)} of {len(state)} tensors "
                f"({shorten([*bad], 4)}): training diverged, or the file is damaged"
            )
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise HdovdError(f"{self.path}: {name} does not fit config.toml: {error}") from error

    def log(self, entry: dict[str, Any]) -> None:
        with writing(self.path / "log.jsonl"), (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def synced_log_bytes(self) -> int:
        """The length of the log, all of which is on the disk then."""
        with (self.path / "log.jsonl").open("ab") as log:
            os.fsync(log.fileno())
            return log.tell()

    def entries(self, wrong: list[str] | None = None) -> list[dict[str, Any]]:
        """What was logged, but for a last line that is torn: the process was killed while it wrote. Another line that
        is no entry is told in `wrong`; without it HdovdError is raised.
        """
        file, found = self.path / "log.jsonl", list[dict[str, Any]]()
        lines = file.read_bytes().rpartition(b"\n")[0].splitlines() if file.is_file() else []
        for number, line in enumerate(lines, start=1):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                if wrong is None:
                    raise HdovdError(f"{file}: line {number} is damaged ({error})") from error
                wrong.append(f"{file.name}: line {number} is damaged ({error})")
        return found

    def write_csv(self) -> None:
        """The log as a table, a line an entry."""
        entries = self.entries()
        table = io.StringIO()
        writer = csv.DictWriter(table, list(dict.fromkeys(name for entry in entries for name in entry)))
        writer.writeheader()
        writer.writerows(entries)
        write_text(self.path / "log.csv", table.getvalue())


def init_hash(init: Path) -> str:
    """What tells the weights of a run from others. Raises HdovdError if it has none."""
    return weights_hash(RunFolder.open(init).path / Weights.LAST.file)
