"""Text embeddings of any names for a run: its own classes', kept ones, and those of its CLIP, which is loaded only if
it must be.

K names, D embedding size.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from hdovd.cache.catalog import Catalog, is_tar_form
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

ClipName = tuple[str, str | None]  # name and tag, as `openclip.load_clip` takes them


def kept_row(file: Path, name: str, dim: int) -> np.ndarray | None:
    """(D,) float16; None if it is not there, or damaged, which is told."""
    try:
        with safe_open(file, "np") as stored:
            row, about = np.asarray(stored.get_tensor("embedding")), stored.metadata() or {}
    except FileNotFoundError:
        return None
    except Exception as error:  # safetensors and the file system have errors of their own
        log(f"note: {file} is damaged ({error}): {name} is embedded anew")
        return None
    if about != _about(name, row) or row.shape != (dim,) or row.dtype != np.float16:
        log(f"note: {file} is damaged (its content is not what it says): {name} is embedded anew")
        return None
    return row


def keep_rows(files: dict[str, Path], rows: dict[str, np.ndarray]) -> None:
    """(D,) float16 each, by name. A folder that cannot be used is told of, and never an error."""
    for name, row in rows.items():
        tensors, about = {"embedding": row}, _about(name, row)
        try:
            replace_file(files[name], partial(save_file, tensors, metadata=about), writer=str(os.getpid()))
        except HdovdError as error:
            log(f"note: text embeddings are not kept for the next time ({error})")
            break


def _about(name: str, row: np.ndarray) -> dict[str, str]:
    return {"name": name, "sha256": hashlib.sha256(np.ascontiguousarray(row).tobytes()).hexdigest()}


def class_level(run: RunFolder) -> tuple[KeyInputs, str]:
    """What made the class embeddings of a run, and their key, from its record (run.json). Raises HdovdError if it does
    not say.
    """
    try:
        level = run.record()["cache"]["levels"]["class"]
        return dict(level["inputs"]), str(level["key"])
    except (KeyError, TypeError) as error:
        raise HdovdError(
            f"run.json does not say what made the class embeddings ({error!r}): names other than the run's classes "
            f"need --class-embeddings"
        ) from error


def clip_identity(inputs: KeyInputs) -> KeyInputs:
    """Of the CLIP that made class embeddings; empty if it is not known."""
    clip = inputs.get("text_clip") or inputs.get("clip") or {}  # imports have texts of the CLIP that the user named
    return dict(clip) if "weights_sha256" in clip else {}


def clip_of_cache(run: RunFolder, key: str) -> ClipName:
    """How the cache of a run names the CLIP of its class product `key`. Raises HdovdError if it does not."""
    try:
        url = str(run.cache_url())
        sets = [TarShards(url).meta.features] if is_tar_form(url) else list(Catalog(url).sets().values())
        why = f"no set of {url} says which CLIP made these class embeddings"
    except (HdovdError, OSError, ValueError, ImportError) as error:
        sets, why = [], f"the run's cache cannot be asked ({error})"
    for features in sets:
        if features.levels.get(Level.CLASS) == key and "clip" in features.made_from:
            return str(features.made_from["clip"]), features.made_from.get("pretrained")
    raise HdovdError(
        f"other names than the run's classes need its CLIP, and it is not known where that is: {why}. Give --clip "
        f"(with --pretrained, as for hdovd extract-clip), or --class-embeddings"
    )


def load_text_tower(run: RunFolder, given: ClipName | None, device: torch.device) -> Teacher:
    """The run's CLIP, its image tower dropped: it can embed names and nothing else.

    given: where it lies, instead of what the cache says. Raises HdovdError if it cannot be had, or is another one than
    the run's.
    """
    inputs, key = class_level(run)
    identity = clip_identity(inputs)
    name, pretrained = given or clip_of_cache(run, key)
    called = name if pretrained is None else f"{name} with {pretrained}"
    precision = Precision.of(identity.get("compute_dtype")) or Precision.FP32
    if precision is Precision.FP16 and device.type == "cpu":
        raise HdovdError(
            "the run's CLIP was computed in float16, which needs a GPU: give --device cuda, or --class-embeddings"
        )
    from hdovd.pipelines.teachers.openclip import load_clip

    try:
        activation = Activation(identity.get("activation", "auto"))
        clip = load_clip(name, pretrained, device=str(device), precision=precision, activation=activation)
    except HdovdError as error:
        if given is not None:
            raise
        raise HdovdError(
            f"{error}\nThe run's cache says that its CLIP is this. If it lies elsewhere now, say where: --clip, "
            f"--pretrained"
        ) from error
    if not identity:
        log(
            f"note: the run does not know which CLIP its embeddings are of: that {called} is the same is taken on trust"
        )
    elif lines := differences(identity, clip.identity, sides=("the run has", f"{called} has")):
        raise HdovdError(f"--clip {called} is not the CLIP of the run:\n  " + "\n  ".join(lines))
    clip.model.visual = None  # the larger half of most
    if identity and inputs.get("names") and {"tokens", "templates"} <= inputs.keys():
        synonyms = inputs.get("synonyms", {})
        asked = [tuple(synonyms[row]) if row in synonyms else row for row in inputs["names"]]
        if clip.hash_prompts(asked, tuple(inputs["templates"])) != inputs["tokens"]:
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
        self._given = None if clip is None else (clip, pretrained)
        self._asked = None if templates is None else tuple(templates)
        self._rows = run.class_embeddings()
        self._place = {name.casefold(): row for row, name in reversed([*enumerate(run.protocol().names)])}
        self._clip: Teacher | None = None

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def embed(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32. Raises HdovdError if the CLIP is needed and cannot be had, or is not the run's."""
        strange = [name for name in names if name.casefold() not in self._place]
        if not strange and self._asked is None:
            return self.own_rows(names)
        others = self._others(names, strange)
        return torch.stack([others[name] if name in others else self.own_rows([name])[0] for name in names])

    def own_rows(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32, as the run has them, of classes of its protocol."""
        return self._rows[[self._place[name.casefold()] for name in names]].float()

    def forget_clip(self) -> None:
        """Free the memory of the text tower; it is loaded again when it is needed."""
        self._clip = None

    def _others(self, names: Sequence[str], strange: list[str]) -> dict[str, Tensor]:
        """Of the names that are no classes of the run, or of all, if they are wanted in other prompts than its."""
        inputs = class_level(self._run)[0]
        templates = self._templates(inputs.get("templates"))
        others = list(names) if list(templates) != inputs.get("templates", list(templates)) else strange
        if not others:
            return {}
        identity = clip_identity(inputs)
        determine = {"clip": identity, "templates": list(templates), "tokens": inputs.get("tokens")}
        folder = self._kept_in / "texts" / key_of(determine)
        files = {name: folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors" for name in others}
        kept = {name: kept_row(file, name, self.dim) for name, file in files.items() if identity}
        found = {name: row for name, row in kept.items() if row is not None}
        new = self._by_clip([name for name in others if name not in found], templates)
        if identity:
            keep_rows(files, new)
        log(
            f"{len(others)} name{'s' * (len(others) > 1)} not of the run's class embeddings: {len(new)} embedded now, "
            f"{len(found)} embedded before; prompts: {shorten(list(templates), 3)}"
        )
        return {name: torch.from_numpy(row.astype(np.float32)) for name, row in (found | new).items()}

    def _templates(self, of_run: list[str] | None) -> tuple[str, ...]:
        if self._asked is None and of_run is None:
            raise HdovdError(
                f"{self._run.path}: the class embeddings came from a file, so there are no prompts for other names: "
                f"give --templates, or --class-embeddings with a row for each name"
            )
        if self._asked is not None and of_run is not None and list(self._asked) != list(of_run):
            log("note: --templates are not the prompts that the run's classes were embedded with")
        return tuple(of_run or ()) if self._asked is None else self._asked

    def _by_clip(self, names: list[str], templates: tuple[str, ...]) -> dict[str, np.ndarray]:
        """(D,) float16 each."""
        if not names:
            return {}
        self._clip = self._clip or load_text_tower(self._run, self._given, self._device)
        if self._clip.dim != self.dim:
            raise HdovdError(
                f"this CLIP embeds in {self._clip.dim} values, the run has {self.dim}: it is not the CLIP of the run"
            )
        for note in self._clip.prompt_notes(names, templates):
            log(note)
        return dict(zip(names, self._clip.embed_names(names, templates).astype(np.float16), strict=True))
