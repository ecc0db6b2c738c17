"""A checkpoint of the authors' detectors as a run folder of ours, for eval, detect, export and report.

The file is a stranger's: tensors and plain containers are read from it, nothing is run.
Every tensor of it is used or named, and every weight of the detector comes from it or is named. D embedding size.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.config.recipe import load_recipe
from hdovd.core.errors import HdovdError, shorten
from hdovd.core.log import log
from hdovd.data.protocol import load_protocol
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.published_weights import PUBLISHED, Published
from hdovd.pipelines.common.device import provenance
from hdovd.pipelines.common.tensors import floats, load_pth
from hdovd.pipelines.runs.config import ImportCheckpointConfig
from hdovd.pipelines.runs.folder import RunFolder, weights_hash

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
    state, about = read_checkpoint(job.file)
    _require_detector(state, job)
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
            **about,
            "class_embeddings": str(job.class_embeddings),
        },
    }
    run = RunFolder.create(job.out, recipe, protocol, texts, record, overwrite=job.overwrite)
    run.save_model(model)
    log(
        f"wrote {run.path}: {recipe.detector.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M "
        f"parameters; next: hdovd eval {run.path} --data COCO"
    )
    return run


def read_checkpoint(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, floating-point ones as float32, and what its meta says of epoch and
    iteration.

    Raises HdovdError for a file that is none, or wants to run code.
    """
    content = load_pth(file)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise HdovdError(
            f'{file} is no checkpoint: expected a dict with "state_dict", names to tensors, as mmcv writes it'
        )
    state = {str(name).removeprefix("module."): value for name, value in state.items()}
    tensors = {
        name: torch.from_numpy(floats(value, f"{file}: {name}")) if value.is_floating_point() else value
        for name, value in state.items()
    }
    kinds = Counter(str(value.dtype).removeprefix("torch.") for value in state.values() if value.is_floating_point())
    log(*(f"{count} tensors are {kind}: made float32" for kind, count in kinds.items() if kind != "float32"))
    if bad := [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise HdovdError(
            f"{file} holds numbers that are not finite, in {shorten(list(bad))}: the training that wrote it failed"
        )
    around = (
        {str(name): value for name, value in content.items() if name != "state_dict"} if "state_dict" in content else {}
    )
    meta = around.pop("meta", None)
    if around:
        log(f"not used: {', '.join(sorted(around))}")
    meta = meta if isinstance(meta, Mapping) else {}
    return tensors, {key: meta[key] for key in ("epoch", "iter") if isinstance(meta.get(key), int)}


def take(model: Detector, state: Mapping[str, Tensor], published: Published, file: str) -> list[str]:
    """Load a checkpoint's tensors into the model; returns the names of those that it does without.

    Raises HdovdError naming what the model lacks, what it has no place for, and what is of another shape.
    """
    own, found = model.state_dict(), dict[str, Tensor]()
    unneeded, unknown, wrong = dict[str, str](), list[str](), list[str]()
    for name, value in state.items():
        ours = published.own_name(name)
        if ours in own:
            if value.shape not in (own[ours].shape, (1, *own[ours].shape)):
                wrong.append(f"{name} is {tuple(value.shape)}, expected {tuple(own[ours].shape)}")
            else:
                found[ours] = value.reshape(own[ours].shape)
        elif why := _why(name, published.unneeded):
            unneeded[name] = why
        else:
            unknown.append(name)
    rest = [name for name in own if name not in found]
    anew = {name: why for name in rest if (why := _why(name, published.anew))}
    if problems := misfits([name for name in rest if name not in anew], unknown, wrong):
        raise HdovdError(
            f"{file} does not fit detector {model.recipe.detector.name} of this recipe:\n  " + "\n  ".join(problems)
        )
    for names, verb in ((unneeded, "not used"), (anew, "not in the file")):
        for why in dict.fromkeys(names.values()):
            of = [name for name, reason in names.items() if reason == why]
            log(f"{verb}: {len(of)} tensors ({shorten(list(of), 2)}): {why}")
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


def _require_detector(state: Mapping[str, Tensor], job: ImportCheckpointConfig) -> None:
    """Raises HdovdError for a checkpoint of another detector."""
    known = {name: sum(p.own_name(key) is not None for key in state) for name, p in PUBLISHED.items()}
    best = max(known, key=lambda name: known[name])
    if known[best] > known[job.detector]:
        raise HdovdError(
            f"{job.file} is a checkpoint of {best}, not of {job.detector} ({known[best]} and {known[job.detector]} of "
            f"{len(state)} tensors are of it): give --detector {best}"
        )
    if PUBLISHED[job.detector].background not in state:
        raise HdovdError(
            f"{job.file} is no checkpoint of the authors' {job.detector}: it has no "
            f"{PUBLISHED[job.detector].background}, but {shorten(list(state))}"
        )


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
    return F.normalize(rows, dim=1)
