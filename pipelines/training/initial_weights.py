"""Weights from elsewhere: a checkpoint of the authors' detectors as a run folder of ours (`hdovd import-checkpoint`),
and a new run that begins with those of another run, trained here or imported (`hdovd train --init RUN`).

A checkpoint is a stranger's: tensors and plain containers are read from it, nothing is run. With --init optimizer,
schedule and the losses' memories begin anew. No weight depends on the number or the names of classes, so the protocols
may differ. Nothing is left at its initial value, and no tensor left out, without a word. D embedding size.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hdovd.cache import differences, local_run
from hdovd.config.recipe import Recipe, load_recipe, outside_code
from hdovd.core import HdovdError, log, shorten
from hdovd.data import Protocol, load_protocol
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.published_weights import PUBLISHED, Published
from hdovd.pipelines.common.device import provenance
from hdovd.pipelines.common.tensors import floats, load_pth
from hdovd.pipelines.evaluation.evaluate import load_detector
from hdovd.pipelines.runs import ImportCheckpointConfig, RunFolder, Weights, init_hash, weights_hash

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
        source = load_detector(run, run.class_embeddings().shape[1], torch.device("cpu"))
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
    asked = None if init is None else str(local_run(init).resolve())
    same = asked == (began and began["run"])
    if not same and init is not None and began is not None and (Path(str(asked)) / Weights.LAST.file).is_file():
        same = init_hash(init) == began["sha256"]
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
    recipe = model.recipe.model_copy(update={"loss": other.loss})
    has = build_detector(recipe, model.dim, initialise=False).state_dict()
    return [name for name in wanted if name in has]


def _detector_lines(asked: Recipe, there: Recipe, name: str) -> list[str]:
    """The values in which two detectors differ, those too that no shape tells."""
    neither = {"backbone": {"weights"}}  # is loaded
    ours, theirs = (recipe.detector.model_dump(mode="json", exclude=neither) for recipe in (asked, there))
    return differences(ours, theirs, "detector.", sides=("this recipe", name))


def _class_notes(run: RunFolder, init: Path, protocol: Protocol, texts: Tensor) -> Iterator[str]:
    """What is to be known of the classes that `init` was trained with."""
    before = run.protocol().all_base() if run.saw_novel else run.protocol()
    if seen := [name for name in before.base if name in protocol.novel]:
        yield (
            f"{init} was trained with boxes of {len(seen)} classes that are novel in protocol {protocol.name} "
            f"({shorten([*seen], 4)}): what is found of them is no open-vocabulary result"
        )
    names = [name for name in protocol.names if name in before.names]
    rows = run.class_embeddings()[[before.names.index(name) for name in names]]
    cosine = torch.cosine_similarity(rows, texts.cpu()[[protocol.names.index(name) for name in names]], dim=1)
    if names and float(cosine.min()) < SAME_TEXT:
        yield (
            f"the class embeddings of {init} are others (cosine {cosine.min():.3f} to {cosine.max():.3f} over "
            f"{len(names)} names): another CLIP, or other prompts"
        )


# --- published checkpoints ---

_TRUST = (
    "pseudo_boxes.reliability_centre=0.31",
    "pseudo_boxes.reliability_width=0.026",
    "pseudo_boxes.reliability_scale=1.3",
)  # METHOD 2


def import_checkpoint(job: ImportCheckpointConfig) -> RunFolder:
    """Write a run folder with the weights of a checkpoint. Raises HdovdError, before anything is written, for one that
    does not fit.
    """
    job.check()
    published = PUBLISHED[job.detector]
    protocol = load_protocol(job.protocol)
    recipe = load_recipe(published.recipe, [*_TRUST, *published.settings, *job.settings]).with_precision(
        "fp32"
    )  # the authors'
    state = read_checkpoint(job.file)
    if published.background not in state:
        raise HdovdError(
            f"{job.file} is no checkpoint of the authors' {job.detector}: it has no {published.background}, but "
            f"{shorten(list(state))}"
        )
    dim = int(state[published.background].shape[-1])
    texts = _rows(
        job.class_embeddings,
        (len(protocol.names), dim),
        "--class-embeddings",
        f"a checkpoint holds no class embeddings: a row for each class of protocol {protocol.name}, base before novel, "
        f"of the checkpoint's embedding size",
    )
    model = build_detector(recipe, dim, initialise=False)
    _give_object(model, job, dim)
    unused = take(model, state, published, str(job.file))
    record = {
        "cache": {"path": None, "levels": {}},
        "skipped": {},
        **provenance(torch.device("cpu"), 1),
        "imported": {
            "file": str(job.file.resolve()),
            "sha256": weights_hash(job.file),
            "tensors": len(state) - len(unused),
            "unused": unused,
            "class_embeddings": str(job.class_embeddings),
        },
    }
    run = RunFolder.create(job.out, recipe, protocol, texts, record)
    run.save_model(model)
    log(
        f"wrote {run.path}: {recipe.detector.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters; next: hdovd eval {run.path} --data COCO"
    )
    return run


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, floating-point ones as float32.

    Raises HdovdError for a file that is none, or wants to run code.
    """
    content = load_pth(file)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise HdovdError(
            f'{file} is no checkpoint: expected a dict with "state_dict", names to tensors, as mmcv writes it'
        )
    if around := sorted(
        str(name) for name in content if "state_dict" in content and name not in ("state_dict", "meta")
    ):
        log(f"not used: {', '.join(around)}")
    tensors = {
        str(name).removeprefix("module."): torch.from_numpy(floats(value, f"{file}: {name}"))
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
    if bad := [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise HdovdError(
            f"{file} holds numbers that are not finite, in {shorten(list(bad))}: the training that wrote it failed"
        )
    return tensors


def take(model: Detector, state: Mapping[str, Tensor], published: Published, file: str) -> list[str]:
    """Load a checkpoint's tensors into the model; returns the names of those that it does without.

    Raises HdovdError naming what the model lacks, what it has no place for, and what is of another shape.
    """
    own, named = model.state_dict(), {name: published.own_name(name) for name in state}
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[ours].shape)}"
        for name, ours in named.items()
        if ours in own and state[name].shape not in (own[ours].shape, (1, *own[ours].shape))
    ]
    strange, rest = [name for name in state if named[name] not in own], own.keys() - set(named.values())
    unneeded = {name: why for name in strange if (why := _why(name, published.unneeded))}
    anew = {name: why for name in own if name in rest and (why := _why(name, published.anew))}
    missing = [name for name in own if name in rest and name not in anew]
    if problems := misfits(missing, [name for name in strange if name not in unneeded], wrong):
        raise HdovdError(
            f"{file} does not fit detector {model.recipe.detector.name} of this recipe:\n  " + "\n  ".join(problems)
        )
    for names, verb in ((unneeded, "not used"), (anew, "not in the file")):
        for why in dict.fromkeys(names.values()):
            of = [name for name, reason in names.items() if reason == why]
            log(f"{verb}: {len(of)} tensors ({shorten(list(of), 2)}): {why}")
    found = {ours: state[name].reshape(own[ours].shape) for name, ours in named.items() if ours in own}
    model.load_state_dict(found, strict=False)
    log(f"{file}: {len(found)} of {len(state)} tensors used")
    return list(unneeded)


def misfits(missing: Sequence[str], unknown: Sequence[str], wrong: Sequence[str]) -> list[str]:
    """What keeps tensors from being the weights of a detector, a line each: names that it lacks, names that it has no
    place for, and what is of another shape.
    """
    told = {
        "weights of the detector are missing": missing,
        "tensors are of no part of it": unknown,
        "tensors are of another shape": wrong,
    }
    return [f"{len(names)} {what}: {shorten([*names])}" for what, names in told.items() if names]


def _why(name: str, reasons: Mapping[str, str]) -> str | None:
    return next((why for pattern, why in reasons.items() if re.fullmatch(pattern, name)), None)


def _give_object(model: Detector, job: ImportCheckpointConfig, dim: int) -> None:
    """AdaMixer measures objectness against one text embedding, which is no weight and so not in a checkpoint."""
    if job.detector == "adamixer":
        meaning = 'what objectness is measured against: the embedding of "object", of the checkpoint\'s embedding size'
        model.set_object_text(_rows(job.object_embedding, (1, dim), "--object-embedding", meaning)[0])
    elif job.object_embedding is not None:
        log(f"not used: --object-embedding; {job.detector} has no use for it")


def _rows(file: Path | None, shape: tuple[int, int], option: str, meaning: str) -> Tensor:
    """The rows of a file, normalised. Raises HdovdError for others than are wanted."""
    if file is None:
        raise HdovdError(f"give {option} FILE, a .pt of {shape[0]} x {shape[1]}: {meaning}")
    rows = torch.from_numpy(floats(load_pth(file), f"{option} {file}"))
    if rows.shape != shape:
        raise HdovdError(f"{option} {file} is {tuple(rows.shape)}, expected {shape}: {meaning}")
    if not (rows.isfinite().all() and rows.any(dim=1).all()):
        raise HdovdError(f"{option} {file} has rows that are zero or not finite")
    return torch.nn.functional.normalize(rows, dim=1)
