"""Text embeddings of any names for a run: its own classes', kept ones, and those of its CLIP, which is loaded only if it must be.

Called by `detector`. K names, D embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hdovd.core.errors import HdovdError, shorten
from hdovd.pipelines.common.user_cache import user_cache_folder
from hdovd.pipelines.detection.text_cache import TextCache
from hdovd.pipelines.detection.text_tower import ClipName, RunTexts, load_text_tower, run_texts
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.prompts import check_templates


class NameEmbedder:
    """Embeds names as the classes of a run were: by the same CLIP, in the same prompts and precision, rounded to float16 as in a cache."""

    def __init__(self, run: RunFolder, device: torch.device, *, clip: str | None = None, pretrained: str | None = None,
                 templates: Sequence[str] | None = None, kept_in: Path | None = None, log: Callable[[str], None] = print) -> None:
        """clip, pretrained: the run's CLIP, where it lies elsewhere than its cache says. templates: other prompts than the run's.
        kept_in: None: the user's cache folder. Raises HdovdError."""
        if pretrained is not None and clip is None:
            raise HdovdError("--pretrained goes with --clip")
        if templates is not None:
            check_templates(templates)
        self._run, self._device, self._log, self._kept_in = run, device, log, kept_in or user_cache_folder()
        self._given = None if clip is None else ClipName(clip, pretrained)
        self._asked = None if templates is None else tuple(templates)
        self._rows = run.class_embeddings()
        self._classes = {name.casefold(): row for row, name in reversed([*enumerate(run.protocol().names)])}
        self._texts: RunTexts | None = None
        self._clip: Teacher | None = None

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def embed(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32. Raises HdovdError if the CLIP is needed and cannot be had, or is not the run's."""
        rows = {name: self._rows[self._classes[name.casefold()]] for name in names if name.casefold() in self._classes}
        if (len(rows) < len(names) or self._asked is not None) and names:
            rows |= self._others(names, rows)
        return torch.stack([rows[name] for name in names]).float()

    def own_rows(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32, as the run has them, of classes of its protocol."""
        return torch.stack([self._rows[self._classes[name.casefold()]] for name in names]).float() if names else torch.zeros(0, self.dim)

    def forget_clip(self) -> None:
        """Free the memory of the text tower; it is loaded again when it is needed."""
        self._clip = None

    def _others(self, names: Sequence[str], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the names that are no classes of the run, or of all, if they are wanted in other prompts than its."""
        texts = self._texts = self._texts or run_texts(self._run)
        templates = self._templates(texts)
        others = list(names) if texts.templates not in (None, templates) else [name for name in names if name not in rows]
        if not others:
            return {}
        inputs = texts.inputs(templates)
        kept = None if inputs is None else TextCache(self._kept_in, inputs, self.dim, self._log)
        found = {} if kept is None else {name: row for name in others if (row := kept.get(name)) is not None}
        if new := [name for name in others if name not in found]:
            made = self._by_clip(texts, new, templates)
            found |= dict(zip(new, made, strict=True))
            if kept is not None:
                for name in new:
                    if not kept.put(name, found[name]):
                        break
        said = f"prompts: {shorten(list(templates), 3)}"
        self._log(f"{len(others)} name{'s' * (len(others) > 1)} not of the run's class embeddings: {len(new)} embedded now, "
                  f"{len(others) - len(new)} embedded before; {said}")
        return {name: torch.from_numpy(row.astype(np.float32)) for name, row in found.items()}

    def _templates(self, texts: RunTexts) -> tuple[str, ...]:
        if self._asked is not None:
            if texts.templates not in (None, self._asked):
                self._log("note: --templates are not the prompts that the run's classes were embedded with")
            return self._asked
        if texts.templates is None:
            raise HdovdError(f"{self._run.path}: the class embeddings came from a file, so there are no prompts for other names: give "
                             "--templates, or --class-embeddings with a row for each name")
        return texts.templates

    def _by_clip(self, texts: RunTexts, names: list[str], templates: tuple[str, ...]) -> np.ndarray:
        """(n, D) float16."""
        self._clip = self._clip or load_text_tower(texts, self._given, self._device, self._log)
        if self._clip.dim != self.dim:
            raise HdovdError(f"this CLIP embeds in {self._clip.dim} values, the run has {self.dim}: it is not the CLIP of the run")
        for note in self._clip.prompt_notes(names, templates):
            self._log(note)
        return self._clip.embed_names(names, templates).astype(np.float16)
