"""Training from tar shards: pictures, boxes and rows of an image come together, read from the first byte of a shard to the last.

Called by `train.py`, where `training_set` is its counterpart for a Zarr cache. No data set and no shared file system are needed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hdovd.cache.identity import differences
from hdovd.cache.reader import InstanceRows, require_together
from hdovd.cache.schema import DEFAULT_SET, Level, Source
from hdovd.cache.tar_sample import RawSample, TarSample
from hdovd.cache.tar_shards import TarShards
from hdovd.config import Recipe
from hdovd.errors import HdovdError, shorten
from hdovd.pipelines.images import pixels_of, read_image
from hdovd.pipelines.training_set import Sample, flipped_at_random, make_targets, uses_nouns
from hdovd.protocol import Protocol

SHUFFLE_BUFFER = 512  # samples, of which the next one is drawn: about 100 MB a worker at COCO


class TarTrainingSet(IterableDataset[Sample]):
    """The images of the shards, each once an epoch, for all workers together; going over it again is the next epoch.

    With `shuffle`, shards come in an order drawn anew every epoch, and samples through a buffer; without, in the cache's order.
    """

    def __init__(self, url: str, protocol: Protocol, recipe: Recipe, log: Callable[[str], None] = print, *, features: str = DEFAULT_SET,
                 shuffle: bool = True) -> None:
        """Raises HdovdError if the shards do not fit the protocol or lack what the recipe uses."""
        self.shards, self.recipe, self._shuffle = TarShards(url), recipe, shuffle
        self.url, self._meta, self._epoch = self.shards.url, self.shards.meta, -1
        self._label = {name: label for label, name in enumerate(protocol.base)}
        self._check(protocol, features)
        self._failed = self.shards.failed()
        if self._failed:
            log(f"skipped {len(self._failed)}: image without embeddings ({shorten(list(self._failed))}); the shards say why")
        if not len(self):
            raise HdovdError(f"no image of {url} has embeddings; first reason: {next(iter(self._failed.values()))}")
        self._nouns = torch.zeros(0, self.dim)
        if uses_nouns(recipe.loss, self._meta.products, self.url):
            self._nouns = torch.from_numpy(self._meta.tensors[Level.NOUN].astype(np.float32))

    def _check(self, protocol: Protocol, features: str) -> None:
        meta, loss, inputs = self._meta, self.recipe.loss, self._meta.key_inputs()
        if features not in (DEFAULT_SET, meta.name):
            raise HdovdError(f"{self.url} holds the set of features {meta.name}, not {features}: export that one")
        needed = [Level.CLASS] + [Level.IMAGE] * loss.image.enabled + [Level.INSTANCE] * loss.uses_pseudo_boxes
        missing = [str(level) for level in needed if level not in inputs]
        if missing:
            raise HdovdError(f"{self.url} has no {' and no '.join(missing)} level; it has {', '.join(inputs)}")
        if loss.uses_cache:
            require_together(self.url, inputs)
        wanted = meta.about["data"][Level.BOXES]["base_boxes"]
        if loss.uses_pseudo_boxes and (lines := differences(wanted, inputs[Level.BOXES]["base_boxes"])):
            raise HdovdError(f"{self.url} has no embeddings of the base boxes:\n  " + "\n  ".join(lines)
                             + "\nTrain with --set loss.instance.enabled=false --set loss.class.enabled=false, or extract them")
        theirs = meta.about["protocol"]
        if set(theirs["base"]) != set(protocol.base) or theirs["min_image_side_px"] != protocol.min_image_side_px:
            differ = sorted(set(theirs["base"]) ^ set(protocol.base))
            raise HdovdError(f"{self.url} holds the images and base boxes of protocol {theirs['name']}, which is not {protocol.name}: "
                             + (f"base classes differ in {shorten([*differ])}" if differ else "min_image_side_px differs")
                             + ". Give the same --protocol, or extract and export with this one")

    def __len__(self) -> int:
        return self.shards.images - len(self._failed)

    def describe(self) -> str:
        """What there is to train on, in words."""
        return f"{len(self)} images in {len(self.shards.numbers)} of {self._meta.shards} tar shards, base boxes"

    @property
    def dim(self) -> int:
        return self._meta.dim

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that the shards lack."""
        have = {name: row for row, name in enumerate(self._meta.attributes(Level.CLASS)["names"])}
        missing = [name for name in names if name not in have]
        if missing:
            raise HdovdError(f"{self.url} has no text embedding of {missing[:8]}: extract and export with the same --protocol")
        rows: np.ndarray = self._meta.tensors[Level.CLASS].astype(np.float32)[[have[name] for name in names]]
        return rows

    def record(self) -> dict[str, Any]:
        """Where it came from, for the record of a run."""
        inputs, keys = self._meta.key_inputs(), self._meta.features.levels
        levels = {str(level): {"key": keys[level], "inputs": inputs[level]} for level in inputs}
        return {"cache": {"path": self.url, "levels": levels, "shards": self.shards.numbers}, "skipped": self._meta.features.skipped}

    def __iter__(self) -> Iterator[Sample]:
        """This worker's samples of the next epoch. Raises HdovdError, naming the shard, for one that cannot be read."""
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        self._epoch += 1
        numbers = list(self.shards.numbers)
        if self._shuffle:
            random.Random(f"{self.recipe.train.seed} {self._epoch}").shuffle(numbers)  # the same in all workers
        samples = self.share(numbers, index, count)
        if self._shuffle:
            from webdataset.filters import shuffle  # type: ignore[import-untyped]

            draw = random.Random(f"{self.recipe.train.seed} {self._epoch} {index}")
            samples = shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=draw)(samples)
        for place, raw in samples:
            yield self._sample(self.shards.decode(place, raw))

    def share(self, numbers: list[int], index: int, count: int) -> Iterator[tuple[int, RawSample]]:
        """What worker `index` of `count` does of these shards, failed images left out, by place in the list of all images.

        Whole shards, as many for each; of the shards left over every `count`-th sample, so that none is idle meanwhile.
        """
        whole = len(numbers) - len(numbers) % count
        for number in numbers[index:whole:count]:
            yield from ((place, raw) for place, raw in self.shards.raw(number) if not self._is_failed(place))
        for number in numbers[whole:]:
            yield from ((place, raw) for place, raw in self.shards.raw(number) if place % count == index and not self._is_failed(place))

    def _is_failed(self, place: int) -> bool:
        return bool(self._failed) and int(self._meta.tensors["image_id"][place]) in self._failed

    def _sample(self, sample: TarSample) -> Sample:
        about, arrays, loss = sample.about, sample.arrays, self.recipe.loss
        where = f"{self.url}: image {sample.image_id}"
        if sample.picture is None:
            raise HdovdError(f"{where} has no picture; export again")
        boxes = np.array([a["bbox"] for a in about["annotations"]], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([self._label[a["category"]] for a in about["annotations"]], np.int64)
        rows = None
        if loss.uses_pseudo_boxes:
            base = arrays["source"] == Source.BASE_BOX
            if [a["id"] for a in about["annotations"]] != arrays["annotation_id"][base].tolist():
                raise HdovdError(f"{where}: its .json and .annotation_id.npy name other annotations; export again")
            none = np.full(len(base), -1, np.int32), np.zeros(len(base), np.float32)
            labelled = (arrays["noun"], arrays["noun_cosine"]) if Level.PSEUDO_LABEL in self._meta.products else none
            rows = InstanceRows(arrays["instance"], *(arrays[name] for name in ("boxes", "source", "annotation_id", "score")), *labelled)
        picture = read_image(f"{where}: {about['file_name']}", about["width"], about["height"], sample.picture)
        whole = arrays["image"] if loss.image.enabled else None
        targets = make_targets(boxes.astype(np.float32), labels, rows, whole, self._nouns, self.dim)
        return flipped_at_random(pixels_of(picture), targets, sample.image_id, self.recipe.input.flip)
