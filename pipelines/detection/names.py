"""Text embeddings of any names for a run: its own classes', kept ones, and those of its CLIP, which is loaded only if
it must be.

K names, D embedding size.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.identity import KeyInputs, differences, key_of
from hdovd.cache.schema import Level
from hdovd.cache.tar_shards import TarShards
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.common.process import user_cache_folder
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.base import Teacher
from hdovd.pipelines.teachers.prompts import check_templates


class TextCache:
    """Rows (D,) float16 by name, of one way to embed. A folder that cannot be used is told of, and never an error."""

    def __init__(self, root: Path, inputs: KeyInputs, dim: int) -> None:
        """inputs: all that determines a row but the name."""
        self.folder, self._dim = root / "texts" / key_of(inputs), dim

    def get(self, name: str) -> np.ndarray | None:
        """None if it is not there, or damaged, which is told."""
        file = self._file(name)
        try:
            with safe_open(file, "np") as stored:
                row, about = np.asarray(stored.get_tensor("embedding")), stored.metadata() or {}
        except FileNotFoundError:
            return None
        except Exception as error:  # safetensors and the file system have errors of their own
            log(f"note: {file} is damaged ({error}): {name} is embedded anew")
            return None
        if about != _about(name, row) or row.shape != (self._dim,) or row.dtype != np.float16:
            log(f"note: {file} is damaged (its content is not what it says): {name} is embedded anew")
            return None
        return row

    def put(self, name: str, row: np.ndarray) -> bool:
        """(D,) float16. False, and told, if it cannot be kept."""
        file = self._file(name)
        try:
            replace_file(
                file, lambda partial: save_file({"embedding": row}, partial, _about(name, row)), writer=str(os.getpid())
            )
        except HdovdError as error:
            log(f"note: text embeddings are not kept for the next time ({error})")
            return False
        return True

    def _file(self, name: str) -> Path:
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"


def _about(name: str, row: np.ndarray) -> dict[str, str]:
    return {"name": name, "sha256": hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()}


@dataclass(frozen=True, slots=True)
class ClipName:
    """As `openclip.load_clip` takes them."""

    clip: str
    pretrained: str | None = None


@dataclass(frozen=True, slots=True)
class RunTexts:
    """How a run's class names became embeddings.

    `identity`: of the CLIP; empty if the run does not know it. `templates`: None if the rows came from a file.
    `tokens`: the hash of the prompts of `names`, with `synonyms`. `where`: how the run's cache names its CLIP, None if
    it does not say; `why`: then.
    """

    identity: dict[str, Any]
    templates: tuple[str, ...] | None
    names: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]]
    tokens: str | None
    where: ClipName | None
    why: str

    def inputs(self, templates: tuple[str, ...]) -> KeyInputs | None:
        """All that determines the row of a name, but the name; None if the CLIP is not known."""
        return {"clip": self.identity, "templates": list(templates), "tokens": self.tokens} if self.identity else None


def run_texts(run: RunFolder) -> RunTexts:
    """From a run's record (run.json), and from its cache, if that is still there. Raises HdovdError for a record
    without a class level.
    """
    try:
        level = run.record()["cache"]["levels"]["class"]
        inputs, key = dict(level["inputs"]), str(level["key"])
    except (KeyError, TypeError) as error:
        raise HdovdError(
            f"run.json does not say what made the class embeddings ({error!r}): names other than the run's classes "
            f"need --class-embeddings"
        ) from error
    clip = dict(
        inputs.get("text_clip") or inputs.get("clip") or {}
    )  # imported features have texts of the CLIP that the user named
    identity = clip if "weights_sha256" in clip else {}
    templates = tuple(inputs["templates"]) if "templates" in inputs else None
    where, why = _where(run, key)
    return RunTexts(
        identity,
        templates,
        tuple(inputs.get("names", ())),
        {name: tuple(names) for name, names in inputs.get("synonyms", {}).items()},
        inputs.get("tokens"),
        where,
        why,
    )


def _where(run: RunFolder, key: str) -> tuple[ClipName | None, str]:
    """How the cache of a run names the CLIP of its class product `key`, or why it does not."""
    try:
        url = str(run.cache_url())
        sets: list[FeatureSet] = (
            [TarShards(url).meta.features] if is_tar_form(url) else list(Catalog(url).sets().values())
        )
    except (HdovdError, OSError, ValueError, ImportError) as error:
        return None, f"the run's cache cannot be asked ({error})"
    for features in sets:
        if features.levels.get(Level.CLASS) == key and "clip" in features.made_from:
            return ClipName(str(features.made_from["clip"]), features.made_from.get("pretrained")), ""
    return None, f"no set of {url} says which CLIP made these class embeddings"


def load_text_tower(texts: RunTexts, given: ClipName | None, device: torch.device) -> Teacher:
    """The run's CLIP, its image tower dropped: it can embed names and nothing else.

    given: where it lies, instead of what the cache says. Raises HdovdError if it cannot be had, or is another one than
    the run's.
    """
    name = given or texts.where
    if name is None:
        raise HdovdError(
            f"other names than the run's classes need its CLIP, and it is not known where that is: {texts.why}. Give "
            f"--clip (with --pretrained, as for hdovd extract-clip), or --class-embeddings"
        )
    precision = Precision.of(texts.identity.get("compute_dtype")) or Precision.FP32
    if precision is Precision.FP16 and device.type == "cpu":
        raise HdovdError(
            "the run's CLIP was computed in float16, which needs a GPU: give --device cuda, or --class-embeddings"
        )
    from hdovd.pipelines.teachers.openclip import load_clip

    try:
        clip = load_clip(
            name.clip,
            name.pretrained,
            device=str(device),
            precision=precision,
            activation=Activation(texts.identity.get("activation", "auto")),
        )
    except HdovdError as error:
        told = (
            ""
            if given
            else "\nThe run's cache says that its CLIP is this. If it lies elsewhere now, say where: --clip, "
            "--pretrained"
        )
        raise HdovdError(f"{error}{told}") from error
    called = name.clip if name.pretrained is None else f"{name.clip} with {name.pretrained}"
    if not texts.identity:
        log(
            f"note: the run does not know which CLIP its embeddings are of: that {called} is the same is taken on trust"
        )
    elif lines := differences(texts.identity, clip.identity, sides=("the run has", f"{called} has")):
        raise HdovdError(f"--clip {called} is not the CLIP of the run:\n  " + "\n  ".join(lines))
    clip.model.visual = None  # the larger half of most
    if texts.identity and texts.tokens is not None and texts.templates is not None and texts.names:
        asked = [texts.synonyms.get(row, row) for row in texts.names]
        if clip.hash_prompts(asked, texts.templates) != texts.tokens:
            raise HdovdError(
                f"--clip {called} has another tokenizer than the run's CLIP had: it gives other tokens for the "
                "run's own classes"
            )
    log(f"CLIP {called}: its text tower embeds names")
    return clip


class NameEmbedder:
    """Embeds names as the classes of a run were: by the same CLIP, in the same prompts and precision, rounded to
    float16 as in a cache.
    """

    def __init__(
        self,
        run: RunFolder,
        device: torch.device,
        *,
        clip: str | None = None,
        pretrained: str | None = None,
        templates: Sequence[str] | None = None,
        kept_in: Path | None = None,
    ) -> None:
        """clip, pretrained: the run's CLIP, where it lies elsewhere than its cache says. templates: other prompts than
        the run's. kept_in: None: the user's cache folder. Raises HdovdError.
        """
        if pretrained is not None and clip is None:
            raise HdovdError("--pretrained goes with --clip")
        if templates is not None:
            check_templates(templates)
        self._run, self._device, self._kept_in = run, device, kept_in or user_cache_folder()
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
        return (
            torch.stack([self._rows[self._classes[name.casefold()]] for name in names]).float()
            if names
            else torch.zeros(0, self.dim)
        )

    def forget_clip(self) -> None:
        """Free the memory of the text tower; it is loaded again when it is needed."""
        self._clip = None

    def _others(self, names: Sequence[str], rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of the names that are no classes of the run, or of all, if they are wanted in other prompts than its."""
        texts = self._texts = self._texts or run_texts(self._run)
        templates = self._templates(texts)
        others = (
            list(names) if texts.templates not in (None, templates) else [name for name in names if name not in rows]
        )
        if not others:
            return {}
        inputs = texts.inputs(templates)
        kept = None if inputs is None else TextCache(self._kept_in, inputs, self.dim)
        found = {} if kept is None else {name: row for name in others if (row := kept.get(name)) is not None}
        if new := [name for name in others if name not in found]:
            made = self._by_clip(texts, new, templates)
            found |= dict(zip(new, made, strict=True))
            if kept is not None:
                for name in new:
                    if not kept.put(name, found[name]):
                        break
        said = f"prompts: {shorten(list(templates), 3)}"
        log(
            f"{len(others)} name{'s' * (len(others) > 1)} not of the run's class embeddings: {len(new)} embedded now, "
            f"{len(others) - len(new)} embedded before; {said}"
        )
        return {name: torch.from_numpy(row.astype(np.float32)) for name, row in found.items()}

    def _templates(self, texts: RunTexts) -> tuple[str, ...]:
        if self._asked is not None:
            if texts.templates not in (None, self._asked):
                log("note: --templates are not the prompts that the run's classes were embedded with")
            return self._asked
        if texts.templates is None:
            raise HdovdError(
                f"{self._run.path}: the class embeddings came from a file, so there are no prompts for other names: "
                f"give --templates, or --class-embeddings with a row for each name"
            )
        return texts.templates

    def _by_clip(self, texts: RunTexts, names: list[str], templates: tuple[str, ...]) -> np.ndarray:
        """(n, D) float16."""
        self._clip = self._clip or load_text_tower(texts, self._given, self._device)
        if self._clip.dim != self.dim:
            raise HdovdError(
                f"this CLIP embeds in {self._clip.dim} values, the run has {self.dim}: it is not the CLIP of the run"
            )
        for note in self._clip.prompt_notes(names, templates):
            log(note)
        return self._clip.embed_names(names, templates).astype(np.float16)
