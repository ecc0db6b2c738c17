"""The folder of one training run: what is in it, and how it is written so that it is whole or absent.

    config.toml                   the resolved recipe; can be given as --recipe
    run.json                      protocol, cache identity, package versions, command
    class_embeddings.safetensors  text embeddings of the protocol's classes, in its order: evaluation needs no cache
    model.safetensors             weights and queues after the last finished epoch
    log.jsonl                     losses, learning rate and speed while training
    metrics.json, detections.json, pictures/   written by hdovd eval
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdovd.config import Recipe, load_recipe
from hdovd.errors import HdovdError
from hdovd.protocol import Protocol, parse_protocol

FILES = ("config.toml", "run.json", "class_embeddings.safetensors", "model.safetensors", "log.jsonl", "metrics.json", "detections.json")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @classmethod
    def create(cls, path: Path, recipe: Recipe, protocol: Protocol, class_embeddings: Tensor, record: dict[str, Any], *,
               overwrite: bool) -> RunFolder:
        """Start a run. Raises HdovdError if one is there, unless `overwrite`."""
        if (path / "run.json").exists():
            if not overwrite:
                raise HdovdError(f"{path} holds a run already: give another --out, or --overwrite")
            for name in FILES:
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / "pictures", ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(recipe.to_toml())
        (path / "run.json").write_text(json.dumps({"protocol": protocol.to_dict(), **record}, indent=1))
        save_file({"embeddings": class_embeddings.contiguous()}, path / "class_embeddings.safetensors")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run. Raises HdovdError if there is none."""
        if not (path / "run.json").is_file():
            raise HdovdError(f"{path} is no run: expected the folder that hdovd train --out wrote")
        if not (path / "model.safetensors").is_file():
            raise HdovdError(f"{path} has no model.safetensors: its training did not finish an epoch; train it again with --overwrite")
        return cls(path)

    def recipe(self) -> Recipe:
        return load_recipe(str(self.path / "config.toml"))

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))

    def protocol(self) -> Protocol:
        return parse_protocol(self.record()["protocol"])

    def class_embeddings(self) -> Tensor:
        return load_file(self.path / "class_embeddings.safetensors")["embeddings"]

    def save_model(self, model: nn.Module) -> None:
        partial = self.path / ".model.safetensors.partial"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial)
        os.replace(partial, self.path / "model.safetensors")

    def load_model(self, model: nn.Module) -> None:
        """Raises HdovdError if the weights are not of this model."""
        try:
            model.load_state_dict(load_file(self.path / "model.safetensors"))
        except RuntimeError as error:
            raise HdovdError(f"{self.path}: model.safetensors does not fit config.toml: {error}") from error

    def log(self, entry: dict[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
