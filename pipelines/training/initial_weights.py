"""`hdovd train --init RUN`: a new run begins with the weights of another run's model, trained here or imported.

Optimizer, schedule and the losses' memories begin anew. No weight depends on the number or the names of
classes, so the protocols may differ. Nothing is left at its initial value, and nothing of RUN left out, without a word.
D embedding size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache.hub import local_run
from hdovd.cache.identity import differences
from hdovd.config.recipe import Recipe, outside_code
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.data.protocol import Protocol
from hdovd.modeling.base import Detector, build_detector
from hdovd.pipelines.evaluation.evaluate import load_detector
from hdovd.pipelines.runs.folder import RunFolder, Weights, init_hash
from hdovd.pipelines.runs.import_checkpoint import misfits

SAME_TEXT = 0.999  # cosine of two embeddings of a name by one CLIP and the same prompts; float16 rows differ by less
COUNTS = ".num_batches_tracked"  # of batch norms; frozen ones have none


def begin_with(model: Detector, init: Path, protocol: Protocol, texts: Tensor) -> dict[str, Any]:
    """Lay the weights of the run `init` into a model, and return what the new run's record says of them.

    Args:
        protocol, texts: the new run's, (C, D) text embeddings of its classes.

    Raises HdovdError if they do not fit; the model is as it was then.
    """
    run = RunFolder.open(init)
    theirs = outside_code(run.written_recipe())
    if theirs and theirs.items() <= outside_code(model.recipe).items():  # the user's own recipe names the same code
        run = RunFolder(run.path, trusted=True)
    with torch.random.fork_rng(devices=[]):  # what is drawn in vain does not change the new run
        source = _source(model, run, init)
        found, anew, unused = _matched(model, source, init)
    own = memories_of(model)
    unused += [name for name in memories_of(source) if name not in own]
    model.load_state_dict(found, strict=False)
    told = {
        f"begin anew: {len(own)} memories of the losses": own,
        f"not in {init}: {len(anew)} tensors begin at their initial values": anew,
        f"not used of {init}: {len(unused)} tensors, of parts that this recipe does without": unused,
    }
    notes = (*_detector_lines(model.recipe, source.recipe, str(init)), *_class_notes(run, init, protocol, texts))
    log(
        f"--init {init}: {len(found)} tensors of its {Weights.LAST.file} are what the model begins with",
        *(f"{what} ({shorten([*names], 4)})" for what, names in told.items() if names),
        *(f"note: {note}" for note in notes),
    )
    return {
        "run": str(run.path.resolve()),
        "weights": Weights.LAST.file,
        "sha256": init_hash(init),
        **({"oracle": True} if run.saw_novel else {}),
        "tensors": len(found),
        "memories_begun_anew": [*own],
        "begun_anew": anew,
        "unused": unused,
    }


def require_same_init(init: Path | None, run: RunFolder) -> None:
    """Raises HdovdError if a run that is resumed began otherwise. Its state has all weights: RUN need not be there any
    more.
    """
    began = run.record().get("init")
    if init is None or began is None:
        same = init is None and began is None
    else:
        there = local_run(init)
        same = str(there.resolve()) == began["run"] or (
            (there / Weights.LAST.file).is_file() and init_hash(init) == began["sha256"]
        )
    if not same:
        raise HdovdError(
            f"{run.path} began otherwise:\n  --init differs: asked for {init or 'none'}, began with "
            f"{began['run'] if began else 'none'}\nGo on with what it began with, or give another --out"
        )


def memories_of(model: Detector) -> list[str]:
    """What the losses keep between steps: buffers of parts that no detection depends on (queues, moving means, counts
    of steps).
    """
    state = model.state_dict().keys()
    return [name for name, _ in model.named_buffers() if name.startswith(model.training_parts) and name in state]


def _source(model: Detector, run: RunFolder, init: Path) -> Detector:
    """The model of `init` with its weights, names of old runs being those of today. Raises HdovdError if it is of
    another kind or D.
    """
    recipe, dim = run.recipe(), run.class_embeddings().shape[1]
    asked, there = model.recipe.detector.name, recipe.detector.name
    if asked != there:
        raise HdovdError(
            f"--init {init}: it is a run of detector {there}, expected {asked}: give a --recipe of {there}, or another "
            f"run"
        )
    if dim != model.dim:
        raise HdovdError(
            f"--init {init}: its embeddings have {dim} values, expected {model.dim}, which the cache has: give a cache "
            f"of the CLIP that it was trained with, or another run"
        )
    return load_detector(run, dim, torch.device("cpu"))


def _matched(model: Detector, source: Detector, init: Path) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors to take, our names that `source` lacks, and its names that we lack.

    Raises HdovdError unless what is lacking is there for training alone, or the levels of distillation, which differ
    from recipe to recipe, are the reason.
    """
    ours, theirs = (  # texts of backgrounds are those of the cache
        {name: value for name, value in one.state_dict().items() if name != "background_texts"}
        for one in (model, source)
    )
    kept, memories = ours.keys() - memories_of(model), set(memories_of(source))
    found = {name: theirs[name] for name in ours if name in kept and name in theirs}
    anew, unused = (
        [n for n in ours if n in kept and n not in theirs],
        [n for n in theirs if n not in ours and n not in memories and not n.endswith(COUNTS)],
    )
    wrong = [
        f"{name} is {tuple(value.shape)}, expected {tuple(ours[name].shape)}"
        for name, value in found.items()
        if value.shape != ours[name].shape
    ]
    if problems := misfits(_of_detector(anew, model, source.recipe), _of_detector(unused, source, model.recipe), wrong):
        raise HdovdError(
            f"--init {init}: its {Weights.LAST.file} does not fit this recipe:\n  "
            + "\n  ".join([*problems, *_detector_lines(model.recipe, source.recipe, init.name)])
            + f"\nGive the detector's values of {init / 'config.toml'} (it can be the --recipe), or another run"
        )
    return found, anew, unused


def _of_detector(names: Iterable[str], model: Detector, other: Recipe) -> list[str]:
    """Those of `names`, which `model` has, that it has with the other recipe's losses too: the losses are no reason for
    them. What is there for training alone may come and go.
    """
    wanted = [name for name in names if not name.endswith(COUNTS) and not name.startswith(model.training_parts)]
    if not wanted:
        return []
    recipe = model.recipe.model_copy(update={"loss": other.loss})
    has = build_detector(recipe, model.dim, initialise=False).state_dict()
    return [name for name in wanted if name in has]


def _detector_lines(asked: Recipe, there: Recipe, name: str) -> list[str]:
    """The values in which two detectors differ, those too that no shape tells."""
    ours, theirs = (recipe.detector.model_dump(mode="json") for recipe in (asked, there))
    for tree in (ours, theirs):
        tree["backbone"].pop("weights", None)  # neither is loaded
    return differences(ours, theirs, "detector.", sides=("this recipe", name))


def _class_notes(run: RunFolder, init: Path, protocol: Protocol, texts: Tensor) -> Iterator[str]:
    """What is to be known of the classes that `init` was trained with."""
    before = run.protocol().all_base() if run.saw_novel else run.protocol()
    if seen := [name for name in before.base if name in protocol.novel]:
        yield (
            f"{init} was trained with boxes of {len(seen)} classes that are novel in protocol {protocol.name} "
            f"({shorten([*seen], 4)}): what is found of them is no open-vocabulary result"
        )
    elif set(before.base) != set(protocol.base):
        yield (
            f"the base classes of {init} are others ({len(before.base)}, now {len(protocol.base)}); no weight depends "
            f"on them"
        )
    names = [name for name in protocol.names if name in before.names]
    rows = run.class_embeddings()[[before.names.index(name) for name in names]]
    cosine = F.cosine_similarity(rows, texts.cpu()[[protocol.names.index(name) for name in names]], dim=1)
    if not names:
        yield f"{init} has no class name of this protocol: whether it was trained with the same CLIP cannot be told"
    elif float(cosine.min()) < SAME_TEXT:
        yield (
            f"the class embeddings of {init} are others (cosine {cosine.min():.3f} to {cosine.max():.3f} over "
            f"{len(names)} names): another CLIP, or other prompts"
        )
