"""Text embeddings of any names for a trained run: its own, kept ones, or of its CLIP, loaded only if it must be.

K names, D embedding size.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.catalog import Catalog, is_tar_form
from hdovd.cache.identity import KeyInputs, differences, key_of
from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.cache.tar_shards import TarShards
from hdovd.core import user_cache_folder
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.options import Precision
from hdovd.pipelines.common.tensors import load_tensors, save_tensors
from hdovd.pipelines.detection.examples import Examples, Gap, embed_examples
from hdovd.pipelines.extraction.source import cache_of
from hdovd.pipelines.runs.config import DEFAULT_MIX
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.teachers.base import Activation, Teacher
from hdovd.pipelines.teachers.prompts import Name, check_templates, folded, said

if TYPE_CHECKING:
    from hdovd.pipelines.teachers.openclip import ClipTeacher

ClipName = tuple[str, str | None]  # name and tag, as `openclip.load_clip` takes them


def kept_row(file: Path, name: str, dim: int) -> np.ndarray | None:
    """(D,) float16; None if it is not there, or damaged, which is told."""
    try:
        if not file.is_file():
            return None
        row = load_tensors(file)["embedding"].numpy()
    except Exception:  # safetensors and torch have errors of their own, for a file that others delete meanwhile too
        log(f"note: {file} is damaged: {name} is embedded anew")
        return None
    return row if row.shape == (dim,) and row.dtype == np.float16 else None


def keep_rows(files: dict[str, Path], rows: dict[str, np.ndarray]) -> None:
    """(D,) float16 each, by name. A folder that cannot be used is told of, and never an error."""
    for name, row in rows.items():
        tensors = {"embedding": torch.from_numpy(row)}
        try:
            replace_file(files[name], partial(save_tensors, tensors, texts={"name": name}), writer=str(os.getpid()))
        except HdovdError as error:
            log(f"note: text embeddings are not kept for the next time ({error})")
            break


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
        if (
            features.levels.get(Level.CLASS) == key
            and "clip" in features.made_from
            and "teacher" not in features.made_from
        ):
            return str(features.made_from["clip"]), features.made_from.get("pretrained")
    raise HdovdError(
        f"other names than the run's classes, and examples, need its CLIP, and it is not known where that is: {why}. "
        f"Give --clip (with --pretrained, as for hdovd extract-clip), or --class-embeddings"
    )


def load_same_clip(
    clip: ClipName,
    inputs: KeyInputs,
    of_classes: KeyInputs,
    device: torch.device,
    *,
    given: bool,
    whose: str,
    without: str,
) -> "ClipTeacher":
    """The CLIP that made embeddings, in the precision of then; that nothing is known of it is told.

    Args:
        inputs: what made the embeddings, of_classes: those of classes.
        given: whether the user said where it lies. whose: "run" or "set", for errors; without: the option that needs no
            CLIP.

    Raises HdovdError if it cannot be had, or is another one.
    """
    identity, (name, pretrained) = clip_identity(inputs), clip
    called = name if pretrained is None else f"{name} with {pretrained}"
    precision = Precision.of(identity.get("compute_dtype")) or Precision.FP32
    if precision is Precision.FP16 and device.type == "cpu":
        raise HdovdError(
            f"the {whose}'s CLIP was computed in float16, which needs a GPU: give --device cuda, or {without}"
        )
    from hdovd.pipelines.teachers.openclip import load_clip

    try:
        loaded = load_clip(
            name,
            pretrained,
            device=str(device),
            precision=precision,
            activation=Activation(identity.get("activation", "auto")),
        )
    except HdovdError as error:
        if given:
            raise
        raise HdovdError(
            f"{error}\nThe {whose}'s cache says that its CLIP is this. If it lies elsewhere now, say where: --clip, "
            f"--pretrained"
        ) from error
    if not identity:
        log(
            f"note: the {whose} does not know which CLIP its embeddings are of: that {called} is the same is taken on "
            f"trust"
        )
    elif lines := differences(identity, loaded.identity, sides=(f"the {whose} has", f"{called} has")):
        raise HdovdError(f"--clip {called} is not the CLIP of the {whose}:\n  " + "\n  ".join(lines))
    else:
        require_tokenizer(loaded, of_classes, called, whose)
    log(f"CLIP: {called}")
    return loaded


def require_tokenizer(clip: Teacher, inputs: KeyInputs, called: str, whose: str) -> None:
    """Raises HdovdError if the CLIP gives other tokens for the names of a class level than `inputs`, what made it,
    say.
    """
    if inputs.get("names") and {"tokens", "templates"} <= inputs.keys():
        synonyms = inputs.get("synonyms", {})
        asked: list[Name] = [tuple(synonyms[row]) if row in synonyms else row for row in inputs["names"]]
        ways = asked, [said(name) for name in asked]  # those of before have underscores in their prompts
        if inputs["tokens"] not in [clip.hash_prompts(names, tuple(inputs["templates"])) for names in ways]:
            raise HdovdError(
                f"--clip {called} has another tokenizer than the {whose}'s CLIP had: it gives other tokens for the "
                f"{whose}'s own classes"
            )


def load_text_tower(run: RunFolder, given: ClipName | None, device: torch.device, with_images: bool = False) -> Teacher:
    """The run's CLIP, which can embed names, and nothing else: its image tower is dropped unless `with_images`.

    given: where it lies, instead of what the cache says. Raises HdovdError if it cannot be had, or is another one than
    the run's.
    """
    inputs, key = class_level(run)
    named, is_given = given or clip_of_cache(run, key), given is not None
    clip = load_same_clip(named, inputs, inputs, device, given=is_given, whose="run", without="--class-embeddings")
    if not with_images:
        clip.model.visual = None  # the larger half of most
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
        self._place = {folded(name): row for row, name in reversed([*enumerate(run.protocol().names)])}
        self._clip: Teacher | None = None
        self._sees = False  # whether that is with its image tower

    @cached_property
    def _gap(self) -> tuple[FeatureCache, Gap]:
        """The run's cache, and what it knows of images and texts."""
        cache = cache_of(self._run)
        return cache, Gap.of(cache, self.own_rows(self._run.protocol().base))

    @property
    def dim(self) -> int:
        return int(self._rows.shape[1])

    def embed(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32. Raises HdovdError if the CLIP is needed and cannot be had, or is not the run's."""
        strange = [name for name in names if folded(name) not in self._place]
        if not names or (not strange and self._asked is None):
            return self.own_rows(names)
        others = self._others(names, strange)
        return torch.stack([others[name] if name in others else self.own_rows([name])[0] for name in names])

    def embed_examples(self, examples: Examples, mix: float = DEFAULT_MIX) -> Tensor:
        """(K, D) float32, L2-normalised: `mix` times the rows of examples, moved among the texts, and (1 - mix) times
        those of their names. Raises HdovdError if the run's cache or its CLIP cannot be had, or a class has no readable
        crop.
        """
        cache, gap = self._gap
        if not self._sees or self._clip is None:
            self._clip, self._sees = load_text_tower(self._run, self._given, self._device, True), True
        rows = gap.moved(embed_examples(examples, self._clip, cache))
        return rows if mix == 1 else F.normalize(mix * rows + (1 - mix) * self.embed(examples.names), dim=1)

    def own_rows(self, names: Sequence[str]) -> Tensor:
        """(K, D) float32, as the run has them, of classes of its protocol."""
        return self._rows[[self._place[folded(name)] for name in names]].float()

    def forget_clip(self) -> None:
        """Free the memory of the text tower; it is loaded again when it is needed."""
        self._clip, self._sees = None, False

    def _others(self, names: Sequence[str], strange: list[str]) -> dict[str, Tensor]:
        """Of the names that are no classes of the run, or of all, if they are wanted in other prompts than its."""
        inputs = class_level(self._run)[0]
        templates = self._templates(inputs.get("templates"))
        others = list(names) if list(templates) != inputs.get("templates", list(templates)) else strange
        if not others:
            return {}
        identity = clip_identity(inputs)
        folder = (
            self._kept_in
            / "names"
            / key_of({"clip": identity, "templates": list(templates), "tokens": inputs.get("tokens")})
        )
        texts = {name: str(said(name)) for name in others}
        asked = list(dict.fromkeys(texts.values()))
        files = {text: folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors" for text in asked}
        found = {
            name: row
            for name, file in files.items()
            if identity and (row := kept_row(file, name, self.dim)) is not None
        }
        new = self._by_clip([text for text in asked if text not in found], templates)
        if identity:
            keep_rows(files, new)
        log(
            f"{len(asked)} name{'s' * (len(asked) > 1)} not of the run's class embeddings: {len(new)} embedded now, "
            f"{len(found)} embedded before; prompts: {shorten(list(templates), 3)}"
        )
        rows = found | new
        return {name: torch.from_numpy(rows[text].astype(np.float32)) for name, text in texts.items()}

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
        log(*self._clip.prompt_notes(names, templates))
        return dict(zip(names, self._clip.embed_names(names, templates).astype(np.float16), strict=True))
