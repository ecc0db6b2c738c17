"""The CLIP whose text tower made a run's class embeddings: what the run says of it, where it lies, and loading it.

Called by `name_embedding`. Imports open_clip only when a CLIP is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hdovd.cache.catalog import Catalog, FeatureSet, is_tar_form
from hdovd.cache.identity import KeyInputs, differences
from hdovd.cache.schema import Level
from hdovd.cache.tar_shards import TarShards
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.runs.folder import RunFolder
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.base import Teacher


@dataclass(frozen=True, slots=True)
class ClipName:
    """As `clip_teacher.load_clip` takes them."""

    clip: str
    pretrained: str | None = None


@dataclass(frozen=True, slots=True)
class RunTexts:
    """How a run's class names became embeddings.

    `identity`: of the CLIP; empty if the run does not know it. `templates`: None if the rows came from a file. `tokens`: the hash
    of the prompts of `names`, with `synonyms`. `where`: how the run's cache names its CLIP, None if it does not say; `why`: then.
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
    """From a run's record (run.json), and from its cache, if that is still there. Raises HdovdError for a record without a class level."""
    try:
        level = run.record()["cache"]["levels"]["class"]
        inputs, key = dict(level["inputs"]), str(level["key"])
    except (KeyError, TypeError) as error:
        raise HdovdError(f"run.json does not say what made the class embeddings ({error!r}): names other than the run's classes need "
                         "--class-embeddings") from error
    clip = dict(inputs.get("text_clip") or inputs.get("clip") or {})  # imported features have texts of the CLIP that the user named
    identity = clip if "weights_sha256" in clip else {}
    templates = tuple(inputs["templates"]) if "templates" in inputs else None
    where, why = _where(run, key)
    return RunTexts(identity, templates, tuple(inputs.get("names", ())),
                    {name: tuple(names) for name, names in inputs.get("synonyms", {}).items()}, inputs.get("tokens"), where, why)


def _where(run: RunFolder, key: str) -> tuple[ClipName | None, str]:
    """How the cache of a run names the CLIP of its class product `key`, or why it does not."""
    try:
        url = str(run.cache_url())
        sets: list[FeatureSet] = [TarShards(url).meta.features] if is_tar_form(url) else list(Catalog(url).sets().values())
    except (HdovdError, OSError, ValueError, ImportError) as error:
        return None, f"the run's cache cannot be asked ({error})"
    for features in sets:
        if features.levels.get(Level.CLASS) == key and "clip" in features.made_from:
            return ClipName(str(features.made_from["clip"]), features.made_from.get("pretrained")), ""
    return None, f"no set of {url} says which CLIP made these class embeddings"


def load_text_tower(texts: RunTexts, given: ClipName | None, device: torch.device, log: Callable[[str], None]) -> Teacher:
    """The run's CLIP, its image tower dropped: it can embed names and nothing else.

    given: where it lies, instead of what the cache says. Raises HdovdError if it cannot be had, or is another one than the run's.
    """
    name = given or texts.where
    if name is None:
        raise HdovdError(f"other names than the run's classes need its CLIP, and it is not known where that is: {texts.why}. Give --clip "
                         "(with --pretrained, as for hdovd extract-clip), or --class-embeddings")
    precision = Precision.of(texts.identity.get("compute_dtype")) or Precision.FP32
    if precision is Precision.FP16 and device.type == "cpu":
        raise HdovdError("the run's CLIP was computed in float16, which needs a GPU: give --device cuda, or --class-embeddings")
    from hdovd.pipelines.teachers.openclip import load_clip

    try:
        clip = load_clip(name.clip, name.pretrained, device=str(device), precision=precision,
                         activation=Activation(texts.identity.get("activation", "auto")))
    except HdovdError as error:
        told = "" if given else "\nThe run's cache says that its CLIP is this. If it lies elsewhere now, say where: --clip, --pretrained"
        raise HdovdError(f"{error}{told}") from error
    called = name.clip if name.pretrained is None else f"{name.clip} with {name.pretrained}"
    if not texts.identity:
        log(f"note: the run does not know which CLIP its embeddings are of: that {called} is the same is taken on trust")
    elif lines := differences(texts.identity, clip.identity, sides=("the run has", f"{called} has")):
        raise HdovdError(f"--clip {called} is not the CLIP of the run:\n  " + "\n  ".join(lines))
    clip.model.visual = None  # the larger half of most
    if texts.identity and texts.tokens is not None and texts.templates is not None and texts.names:
        asked = [texts.synonyms.get(row, row) for row in texts.names]
        if clip.hash_prompts(asked, texts.templates) != texts.tokens:
            raise HdovdError(f"--clip {called} has another tokenizer than the run's CLIP had: it gives other tokens for the "
                             "run's own classes")
    log(f"CLIP {called}: its text tower embeds names")
    return clip
