"""Training from tar shards: pictures, boxes and rows of an image come together, read from the first byte of a shard to the last.

Called by `train.py`, where `training_set` is its counterpart for a Zarr cache. No data set and no shared file system are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hdovd.cache.identity import differences
from hdovd.cache.reader import InstanceRows, no_labels, require_together
from hdovd.cache.schema import DEFAULT_SET, Level, Source
from hdovd.cache.tar_sample import TarSample
from hdovd.cache.tar_shards import TarShards
from hdovd.config.recipe import Recipe
from hdovd.core.errors import HdovdError, shorten
from hdovd.data.coco import Exif
from hdovd.data.protocol import Protocol
from hdovd.pipelines.calibration.values import LabelOrigin
from hdovd.pipelines.common.images import pixels_of, read_image
from hdovd.pipelines.dataloading.sample_keys import Draw, as_draw
from hdovd.pipelines.dataloading.sampler import Dealing, EpochOrder, ShardShuffle, Streams
from hdovd.pipelines.dataloading.shards import ShardReading
from hdovd.pipelines.extraction.identities import require_exif
from hdovd.pipelines.extraction.object_text import object_text_of
from hdovd.pipelines.training.training_set import Sample, flipped_at_random, make_targets, uses_nouns


class TarTrainingSet(Dataset[Sample]):
    """The images of the shards by their draw; those that failed are no part of it.

    Each worker streams the shards that its draws are in. It knows them beforehand from `dealing`, and keeps what it
    comes past before its turn: at most a shuffle buffer of its own stream.
    """

    def __init__(self, url: str, protocol: Protocol, recipe: Recipe, log: Callable[[str], None] = print, *,
                 features: str = DEFAULT_SET) -> None:
        """Raises HdovdError if the shards do not fit the protocol or lack what the recipe uses."""
        self.shards, self.recipe = TarShards(url), recipe
        self.url, self._meta = self.shards.url, self.shards.meta
        self._label = {name: label for label, name in enumerate(protocol.base)}
        self._check(protocol, features)
        failed, ids = self.shards.failed(), self._meta.tensors["image_id"]
        if failed:
            log(f"skipped {len(failed)}: image without embeddings ({shorten(list(failed))}); the shards say why")
        per_shard = [[place for place in self._meta.places_of(number) if int(ids[place]) not in failed] for number in self.shards.numbers]
        self._places = [place for places in per_shard for place in places]
        self._ranges = tuple(range(end - len(some), end) for some, end in zip(per_shard, accumulate(map(len, per_shard)), strict=True))
        if not self._places:
            raise HdovdError(f"no image of {url} has embeddings; first reason: {next(iter(failed.values()))}")
        self._nouns = torch.zeros(0, self.dim)
        if uses_nouns(recipe.loss, self._meta.products, self.url):
            self._nouns = torch.from_numpy(self._meta.tensors[Level.NOUN].astype(np.float32))
        self.dealing: Dealing | None = None
        self._reading: ShardReading | None = None

    def _check(self, protocol: Protocol, features: str) -> None:
        self._meta.check_rows(self.url)
        meta, loss, inputs = self._meta, self.recipe.loss, self._meta.key_inputs()
        if features not in (DEFAULT_SET, meta.name):
            raise HdovdError(f"{self.url} holds the set of features {meta.name}, not {features}: export that one")
        needed = [Level.CLASS] + [Level.IMAGE] * loss.image.enabled + [Level.INSTANCE] * loss.uses_pseudo_boxes
        missing = [str(level) for level in needed if level not in inputs]
        if missing:
            raise HdovdError(f"{self.url} has no {' and no '.join(missing)} level; it has {', '.join(inputs)}")
        if loss.uses_cache:
            require_together(self.url, inputs)
            require_exif(inputs, self.recipe.input.exif, self.url)
        try:
            wanted, theirs = meta.about["data"][Level.BOXES]["base_boxes"], meta.about["protocol"]
            same = set(theirs["base"]) == set(protocol.base) and theirs["min_image_side_px"] == protocol.min_image_side_px
        except (KeyError, TypeError) as error:
            raise HdovdError(f"{self.url} does not say what it was exported from ({error!r}): export the cache again") from error
        if loss.uses_pseudo_boxes and (lines := differences(wanted, inputs[Level.BOXES]["base_boxes"])):
            raise HdovdError(f"{self.url} has no embeddings of the base boxes:\n  " + "\n  ".join(lines)
                             + "\nTrain with --set loss.instance.enabled=false --set loss.class.enabled=false, or extract them")
        if not same:
            differ = sorted(set(theirs["base"]) ^ set(protocol.base))
            raise HdovdError(f"{self.url} holds the images and base boxes of protocol {theirs['name']}, which is not {protocol.name}: "
                             + (f"base classes differ in {shorten([*differ])}" if differ else "min_image_side_px differs")
                             + ". Give the same --protocol, or extract and export with this one")

    def __len__(self) -> int:
        return len(self._places)

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

    def object_text(self) -> Tensor | None:
        """(D,) the text embedding of "object", None if there is none. Raises HdovdError for one that is damaged."""
        return object_text_of(self._meta.features, self.dim, self.url)

    def label_origin(self) -> LabelOrigin:
        """What the weights of pseudo labels depend on."""
        return LabelOrigin(self.url, self._meta.key_inputs(), self._meta.attributes(Level.INSTANCE)["made_with"], self.dim)

    def record(self) -> dict[str, Any]:
        """Where it came from, for the record of a run."""
        inputs, keys = self._meta.key_inputs(), self._meta.features.levels
        levels = {str(level): {"key": keys[level], "inputs": inputs[level]} for level in inputs}
        return {"cache": {"path": self.url, "levels": levels, "shards": self.shards.numbers}, "skipped": self._meta.features.skipped}

    def image_ids(self) -> np.ndarray:
        """(n,) int64, by index."""
        ids: np.ndarray = self._meta.tensors["image_id"][self._places].astype(np.int64)
        return ids

    def order(self, streams: Streams) -> EpochOrder:
        """How an epoch goes over the images."""
        return ShardShuffle(self._ranges, self.recipe.train.seed, streams)

    def __getitem__(self, wanted: Draw | int) -> Sample:
        """Raises HdovdError, naming the shard, for one that cannot be read."""
        draw = as_draw(wanted)
        if self._reading is None or self._reading.epoch != draw.epoch:
            self._reading = ShardReading(self.shards, draw.epoch, {self._places[index] for index in self._wanted(draw)})
        place = self._places[draw.index]
        return self._sample(self.shards.decode(place, self._reading.take(place)), draw.epoch)

    def _wanted(self, draw: Draw) -> Iterable[int]:
        """What this worker will be asked for from here to the end of the epoch."""
        if self.dealing is None:
            return [draw.index]
        worker = get_worker_info()
        steps = range(draw.step, self.dealing.steps, 1 if worker is None else worker.num_workers)
        return (index for step in steps for index in self.dealing.part(draw.epoch, step))

    def _sample(self, sample: TarSample, epoch: int) -> Sample:
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
            none = no_labels(len(base))
            labelled = none | {name: arrays[name] for name in none if name in arrays}
            rows = InstanceRows(arrays["instance"], *(arrays[name] for name in ("boxes", "source", "annotation_id", "score")), **labelled)
        name, exif = f"{where}: {about['file_name']}", Exif(self.recipe.input.exif)
        picture = read_image(name, about["width"], about["height"], sample.picture, exif)
        whole = arrays["image"] if loss.image.enabled else None
        targets = make_targets(boxes.astype(np.float32), labels, rows, whole, self._nouns, self.dim, where)
        return flipped_at_random(pixels_of(picture), targets, sample.image_id, epoch, self.recipe)
