"""Transfer: a run on data sets that it was not trained on, by the names of their classes (ViLD, arXiv 2104.13921,
section 4.5).

No class is called base: all are scored alike, as novel ones are. Names that data sets spell in their own way are said
as others say them: by a list that ships (`names/synonyms.txt`), and `A/B` is both A and B. K classes, D embedding size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from hdovd.core import log, shorten
from hdovd.data import DataPaths, Protocol, read_instances
from hdovd.pipelines.common.device import pick_device
from hdovd.pipelines.common.name_list import shipped
from hdovd.pipelines.detection.names import NameEmbedder
from hdovd.pipelines.evaluation.config import ZERO_SHOT, EvalConfig
from hdovd.pipelines.evaluation.evaluate import EvalResult, evaluate_by
from hdovd.pipelines.runs import RunFolder, ap, table_lines
from hdovd.pipelines.teachers.base import folded
from hdovd.pipelines.transfer.config import TransferConfig, data_name

SEEN, UNSEEN = "seen", "unseen"
LVIS_DETECTIONS = (300,)


def transfer(job: TransferConfig) -> dict[str, EvalResult]:
    """Results of a run on each data set, by its name; files go to RUN/transfer/NAME. Raises HdovdError."""
    job.check()
    found = {}
    for folder in job.data:
        name = data_name(folder)
        log(f"{name}:")
        config = EvalConfig(
            run=job.run,
            data=DataPaths(folder),
            protocol=ZERO_SHOT,
            clip=job.clip,
            pretrained=job.pretrained,
            device=job.device,
            batch_size=job.batch_size,
            workers=job.workers,
            engine=job.engine,
            weights=job.weights,
            trust=job.trust,
        )
        found[name] = zero_shot(config)
    return found


def zero_shot(job: EvalConfig) -> EvalResult:
    """Evaluate a run on any data set by the names of its classes, of which none is base. CLIP is needed for names that
    are no classes of the run.
    """
    job.check()
    run = RunFolder(job.run, job.trust)
    embedder = NameEmbedder(run, pick_device(job.device), clip=job.clip, pretrained=job.pretrained)
    trained = run.protocol()
    protocol, said = protocol_of(job.data, trained.names, trained.names if run.saw_novel else trained.base)
    texts = embed(embedder, [said[name] for name in protocol.novel])
    embedder.forget_clip()
    out = run.path / "transfer" / data_name(job.data.root or job.data.annotation_file("val2017"))
    return evaluate_by(job, protocol, texts, out)


def protocol_of(
    data: DataPaths, own: Sequence[str], trained: Sequence[str]
) -> tuple[Protocol, dict[str, tuple[str, ...]]]:
    """All classes of a data set as novel ones, in two groups, seen and unseen, by whether the run was trained on boxes
    of a class of that name, or of one that is called the same; and what each is called in prompts. Both are told.
    Raises HdovdError.

    Args:
        own: the run's classes, which keep their names. trained: those of them with boxes in training.
    """
    annotations, folder = data.locate("val2017")
    found = read_instances(annotations, folder)
    names = tuple(found.names.values())
    kept, known = set(map(folded, own)), set[str]().union(*map(_calls, trained))
    said = {name: (name,) if folded(name) in kept else spoken(name) for name in names}
    seen = tuple(name for name in names if known & _calls(name))
    unseen = tuple(name for name in names if name not in seen)
    others = [f"{name} as {' or '.join(calls)}" for name, calls in said.items() if calls != (name,)]
    log(
        f"{len(names)} classes, {len(seen)} of which the run was trained on; said as they are: "
        f"{len(names) - len(others)}" + (f"; otherwise: {shorten(list(others))}" if others else "")
    )
    groups = {name: own for name, own in ((SEEN, seen), (UNSEEN, unseen)) if own}
    protocol = Protocol(ZERO_SHOT, (), names, keep_empty_val=True, groups=groups)
    if found.absent:
        protocol = replace(protocol, federated=True, max_detections=LVIS_DETECTIONS)
    return protocol, said


def embed(embedder: NameEmbedder, calls: Sequence[tuple[str, ...]]) -> Tensor:
    """(K, D) float32, L2-normalised: of each class the mean over what it is called."""
    rows = embedder.embed([name for own in calls for name in own]).split([len(own) for own in calls])
    return torch.nn.functional.normalize(torch.stack([own.mean(dim=0) for own in rows]), dim=1)


@cache
def _synonyms() -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(calls.split(", ")) for name, calls in (line.split(" = ") for line in shipped("synonyms"))}


def _calls(name: str) -> set[str]:
    """A name and what it is called, folded."""
    return {folded(one) for one in (name, *spoken(name))}


def spoken(name: str) -> tuple[str, ...]:
    """What a class is called in prompts: `tvmonitor` is a tv or a monitor, `Cabinet/shelf` a cabinet or a shelf."""
    plain = folded(name)
    if plain in _synonyms():
        return _synonyms()[plain]
    parts = tuple(part.strip() for part in plain.split("/") if part.strip())
    return parts if len(parts) > 1 else (name,)


def transfer_table(found: Mapping[str, EvalResult]) -> str:
    """A row a data set: AP50 and AP of classes seen and unseen, and of all, all scored alike; and of all by the
    classification score alone.
    """
    groups, kinds, rows = (SEEN, UNSEEN, "all"), {"ap50": "AP50", "ap": "AP"}, []
    columns = [f"{kind} {group}" for kind in kinds.values() for group in (*groups, "split-blind")]
    head = ("data", "images", "classes", *columns)
    for name, one in found.items():
        summary, blind = one.combined.summary(), one.split_blind.summary()
        numbers = [
            ap(value)
            for kind in kinds
            for value in (*(summary[kind].get(group) for group in groups), blind[kind]["all"])
        ]
        rows.append((name, f"{len(one.detections):,d}", f"{len(one.combined.protocol.novel):,d}", *numbers))
    about = (
        "AP in percent, of both scores, combined as novel classes' are; split-blind: all classes by the "
        "classification score alone; seen: the run was trained on boxes of a class that is called so"
    )
    return "\n".join([*table_lines(head, rows, set(head[1:])), about])
