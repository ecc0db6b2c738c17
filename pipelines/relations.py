"""What the teacher and a trained detector say of how alike the boxes of one batch are: the two matrices of METHOD section 4.

Called by `report`. n boxes of the batch that have a positive RoI, sorted by name so that what is of one kind lies together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hdovd.cache.reader import FeatureCache
from hdovd.cache.schema import Level
from hdovd.coco import DataPaths
from hdovd.detectors import build_detector
from hdovd.errors import HdovdError
from hdovd.losses.instance import relation_loss
from hdovd.pipelines.device import pick_device
from hdovd.pipelines.run_folder import RunFolder
from hdovd.pipelines.training_set import TrainingSet
from hdovd.protocol import Protocol


@dataclass(frozen=True, slots=True)
class Relations:
    """Cosines (n, n) between the teacher's rows e and between the student's rows q, of the same boxes.

    names: what each box is, a base class or the noun of a pseudo box. pseudo: (n,) bool. correlation: Pearson's, of the entries above
    the diagonal; None where there are too few or one side is constant. loss: the relation loss of this batch, without its weight.
    """

    image_ids: list[int]
    names: list[str]
    pseudo: np.ndarray
    teacher: np.ndarray
    student: np.ndarray
    correlation: float | None
    loss: float


def relations(run: RunFolder, data: DataPaths, images: int, *, device: str = "auto", weights: str = "model.safetensors",
              log: Callable[[str], None] = print) -> Relations:
    """The matrices for the first `images` training images with the most boxes of those that hold a pseudo box, or of all if none does.

    Raises HdovdError, saying why, if the run has no instance level, or its cache or training images cannot be read any more.
    """
    recipe, record, protocol = run.recipe(), run.record(), run.protocol()
    if not recipe.loss.instance.enabled:
        raise HdovdError("this run has no instance level, so no student embeddings")
    cache = cache_of(record)
    split = data.load("train2017", protocol, base_only=True, log=log)
    training = TrainingSet(split, cache, recipe.model_copy(update={"input": recipe.input.model_copy(update={"flip": 0.0})}), log)
    batch = [training[i] for i in _telling(training, images)]
    place = pick_device(device)
    model = build_detector(recipe, training.dim, log=None)
    run.load_model(model, weights)
    model.to(place).eval()
    ids = [image_id for _, _, image_id in batch]
    found = model.students([pixels.to(place) for pixels, _, _ in batch], [t.to(place) for _, t, _ in batch], ids)
    if not len(found.box):
        raise HdovdError(f"no box of these {len(ids)} training images has a student embedding: the run finds none of them yet")
    teacher = torch.cat([rows for t in found.targets for rows in (t.embeddings, t.pseudo_embeddings)])[found.box]
    names, pseudo = _names(found.targets, cache, protocol)
    order = sorted(range(len(found.box)), key=lambda k: (bool(pseudo[found.box[k]]), names[found.box[k]]))
    q, e, box = found.q[order], teacher[order], found.box[order].tolist()
    loss = float(relation_loss(q, e, recipe.loss.instance.relation_tau, recipe.loss.instance.relation_temperature))
    of_teacher, of_student = ((rows @ rows.T).cpu().numpy() for rows in (e, q))
    return Relations(ids, [names[b] for b in box], np.array([pseudo[b] for b in box], bool), of_teacher, of_student,
                     _correlation(of_teacher, of_student), loss)


def cache_of(record: dict[str, Any]) -> FeatureCache:
    """The cache that a run was trained from, with the very products of then. Raises HdovdError if they are not there any more."""
    where, keys = record["cache"]["path"], {level: entry["key"] for level, entry in record["cache"]["levels"].items()}
    if "imported" in record:
        raise HdovdError("the run was imported from a checkpoint, so there is no cache that it was trained from")
    if not where or "levels" not in record["cache"]:
        raise HdovdError("the run does not say which cache it was trained from")
    from hdovd.cache.catalog import Catalog

    sets = Catalog(where).sets()
    for name, features in sets.items():
        if {str(level): key for level, key in features.levels.items()} == keys:
            return FeatureCache(where, name)
    raise HdovdError(f"{where} has no set of features with the products that the run was trained from ({', '.join(sets) or 'no sets'})")


def _telling(training: TrainingSet, count: int) -> list[int]:
    """Which images: the most boxes first, those with a pseudo box before all others; then by place."""
    def boxes(index: int) -> tuple[bool, int]:
        rows = training.cache.instances(training.images[index].id)
        usable = len(rows.proposals().box)
        return usable == 0, -len(rows.box)

    return sorted(range(len(training)), key=boxes)[:count]


def _names(targets: list[Any], cache: FeatureCache, protocol: Protocol) -> tuple[list[str], list[bool]]:
    """The name of every box of a batch, and whether it is a pseudo box. A label of several nouns is named by the one most like it."""
    nouns = cache.names(Level.NOUN) if Level.NOUN in cache.levels() else []
    rows = torch.from_numpy(cache.embeddings(Level.NOUN)) if nouns else torch.zeros(0, cache.dim)
    names, pseudo = list[str](), list[bool]()
    for target in targets:
        names += [protocol.names[label] for label in target.labels.tolist()]
        if nouns:
            names += [nouns[k] for k in (target.pseudo_texts.cpu() @ rows.T).argmax(dim=1).tolist()] if len(target.pseudo_texts) else []
        else:
            names += ["pseudo box"] * len(target.pseudo_boxes)
        pseudo += [False] * len(target.boxes) + [True] * len(target.pseudo_boxes)
    return names, pseudo


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    above = np.triu_indices(len(a), k=1)
    x, y = a[above], b[above]
    if len(x) < 2 or x.std() == 0 or y.std() == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
