"""The training set: pictures and base boxes, joined to their cached rows by image and annotation id.

`TrainingSet` takes pictures and boxes from COCO files and rows from a Zarr cache. `TarTrainingSet` takes all of an
image from tar shards, read from the first byte of a shard to the last: no data set and no shared file system are
needed. D embedding size.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from hdovd.cache import DEFAULT_SET, Level, Source, require_same
from hdovd.cache.reader import FeatureCache, InstanceRows, no_labels, require_together, require_unit
from hdovd.cache.tar_shards import TarShards
from hdovd.config.recipe import LossConfig, Recipe
from hdovd.core import HdovdError, log, shorten
from hdovd.data import Exif, ImageBoxes, Protocol, Split
from hdovd.data.targets import Targets
from hdovd.pipelines.calibration.values import LabelOrigin, origin_of
from hdovd.pipelines.common.images import pixels_of, read_image, read_pixels
from hdovd.pipelines.common.settings import value_at
from hdovd.pipelines.dataloading.loader import (
    Dealing,
    Draw,
    Order,
    ShardReading,
    Streams,
    block_shuffle,
    is_flipped,
    key_of,
    plain_shuffle,
    shard_shuffle,
)
from hdovd.pipelines.extraction.identities import inputs_of, require_exif
from hdovd.pipelines.extraction.pseudo_labels import label_texts

Sample = tuple[Tensor, Targets, int]  # picture (3, h, w) uint8 RGB, its targets, its image id


class TrainingSet(Dataset[Sample]):
    """The images of a split by their draw, flipped at random; boxes, pseudo boxes and rows stay together."""

    def __init__(self, split: Split, cache: FeatureCache, recipe: Recipe) -> None:
        """Raises HdovdError if a level of the cache that the recipe uses does not fit the split."""
        self.split, self.recipe = split, recipe
        self.cache, self.features, self.dim = cache, cache.set, cache.dim
        self._check()
        failed = cache.failed()  # left out of base-only runs too: runs that are compared see the same images
        self.images = [image for image in split.images if image.id not in failed]
        tell_failed(failed, len(self.images), "the cache says", f"of {split.annotations} has embeddings in {cache.url}")
        self.images = repeated(self.images, recipe)
        has_nouns = uses_nouns(recipe.loss, cache.levels(), cache.url)
        self.nouns = torch.from_numpy(cache.embeddings(Level.NOUN)) if has_nouns else torch.zeros(0, cache.dim)

    def _check(self) -> None:
        loss, cache = self.recipe.loss, self.cache
        if not loss.uses_cache:
            return
        cache.require_together()
        require_exif({level: cache.key_inputs(level) for level in cache.levels()}, self.split.exif, cache.url)
        wanted = inputs_of(self.split, cache)
        held = [Level.IMAGE] * loss.image.enabled + [Level.INSTANCE] * loss.uses_pseudo_boxes
        for level in [Level.BOXES] * loss.uses_pseudo_boxes + held:
            cache.require(level, wanted[level])
        for level in held:
            cache.hold(level)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> Sample:
        image = self.images[draw.index]
        return flipped_at_random(read_pixels(self.split, image), self.targets(image), image.id, draw.epoch, self.recipe)

    def image_ids(self) -> np.ndarray:
        """(n,) int64, by index."""
        return np.array([image.id for image in self.images], np.int64)

    def order(self, streams: Streams) -> Order:
        """How an epoch goes over the images."""
        if self.recipe.loss.uses_pseudo_boxes and self.cache.reads_best_in_blocks:
            return partial(block_shuffle, len(self), self.recipe.train.seed, streams)
        return partial(plain_shuffle, len(self), self.recipe.train.seed)

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that the cache lacks."""
        return self.cache.class_embeddings(names)

    def label_origin(self) -> LabelOrigin:
        """What the weights of pseudo labels depend on."""
        return origin_of(self.cache)

    def record(self) -> dict[str, Any]:
        """Where it came from, for the record of a run."""
        return {"cache": self.cache.identity(), "skipped": self.split.skips.by_reason}

    def targets(self, image: ImageBoxes) -> Targets:
        """What an image of the set brings to the detector. Raises HdovdError if its rows are those of other boxes."""
        rows = None
        if self.recipe.loss.uses_pseudo_boxes:
            rows = self.cache.instances(image.id)
            base = rows.annotation_id[rows.source == Source.BASE_BOX]
            if not np.array_equal(base, image.annotation_ids):
                raise HdovdError(
                    f"{self.cache.url}: the base rows of image {image.id} are of annotations "
                    f"{base.tolist()}, expected {image.annotation_ids.tolist()}: run extract-clip again"
                )
        whole = self.cache.image_embedding(image.id) if self.recipe.loss.image.enabled else None
        where, judged = f"{self.cache.url}: image {image.id}", image.judged
        return make_targets(image.boxes, image.labels, judged, rows, whole, self.nouns, self.dim, where)


class TarTrainingSet(Dataset[Sample]):
    """The images of the shards by their draw; those that failed are no part of it.

    Each worker streams the shards that its draws are in. It knows them beforehand from `dealing`, and keeps what it
    comes past before its turn: at most a shuffle buffer of its own stream.
    """

    def __init__(self, url: str, protocol: Protocol, recipe: Recipe, *, features: str = DEFAULT_SET) -> None:
        """Raises HdovdError if the shards do not fit the protocol or lack what the recipe uses."""
        if recipe.train.repeat_threshold:
            raise HdovdError(
                f"{url}: tar shards are read once an epoch, but train.repeat_threshold wants images several times: "
                f"train from the Zarr cache, or with --set train.repeat_threshold=0"
            )
        self.shards, self.recipe = TarShards(url), recipe
        self.url, self._meta = self.shards.url, self.shards.meta
        self.features, self.dim = self._meta.features, self._meta.dim
        self._label = {name: label for label, name in enumerate(protocol.base)}
        self._check(protocol, features)
        failed, ids = self.shards.failed(), self._meta.tensors["image_id"]
        per_shard = [
            [place for place in self._meta.places_of(number) if int(ids[place]) not in failed]
            for number in self.shards.numbers
        ]
        self._places = [place for places in per_shard for place in places]
        self._ranges = tuple(
            range(end - len(some), end) for some, end in zip(per_shard, accumulate(map(len, per_shard)), strict=True)
        )
        tell_failed(failed, len(self._places), "the shards say", f"of {url} has embeddings")
        has_nouns = uses_nouns(recipe.loss, self._meta.products, self.url)
        rows = self._meta.tensors[Level.NOUN] if has_nouns else np.zeros((0, self.dim))
        self.nouns = torch.from_numpy(rows.astype(np.float32))
        self.dealing: Dealing | None = None
        self._reading: ShardReading | None = None

    def _check(self, protocol: Protocol, features: str) -> None:
        self._meta.check_rows(self.url)
        meta, loss, inputs = self._meta, self.recipe.loss, self._meta.key_inputs()
        if features not in (DEFAULT_SET, meta.name):
            raise HdovdError(f"{self.url} holds the set of features {meta.name}, not {features}: export that one")
        needed = [Level.CLASS] + [Level.IMAGE] * loss.image.enabled + [Level.INSTANCE] * loss.uses_pseudo_boxes
        if missing := [str(level) for level in needed if level not in inputs]:
            raise HdovdError(f"{self.url} has no {' and no '.join(missing)} level; it has {', '.join(inputs)}")
        if loss.uses_cache:
            require_together(self.url, inputs)
            require_exif(inputs, self.recipe.input.exif, self.url)
        if loss.uses_pseudo_boxes:
            require_same(
                value_at(meta.about, "data.boxes.base_boxes") or {},
                inputs[Level.BOXES]["base_boxes"],
                f"{self.url} has no embeddings of the base boxes",
                "Train with --set loss.instance.enabled=false --set loss.class.enabled=false, or extract them",
            )
        asked, held = (
            {"base": sorted(tree.get("base", ())), "min_image_side_px": tree.get("min_image_side_px")}
            for tree in (protocol.to_dict(), value_at(meta.about, "protocol") or {})
        )
        require_same(
            asked,
            held,
            f"{self.url} holds the images and base boxes of another protocol than {protocol.name}",
            "Give the same --protocol, or extract and export with this one",
            sides=("asked for", "the shards hold"),
        )

    def __len__(self) -> int:
        return len(self._places)

    def class_embeddings(self, names: Sequence[str]) -> np.ndarray:
        """(len(names), D) float32 text embeddings. Raises HdovdError for a name that the shards lack."""
        have = {name: row for row, name in enumerate(self._meta.attributes(Level.CLASS)["names"])}
        if missing := [name for name in names if name not in have]:
            raise HdovdError(
                f"{self.url} has no text embedding of {missing[:8]}: extract and export with the same --protocol"
            )
        return np.asarray(self._meta.tensors[Level.CLASS].astype(np.float32)[[have[name] for name in names]])

    def label_origin(self) -> LabelOrigin:
        """What the weights of pseudo labels depend on."""
        return LabelOrigin(
            self.url,
            self._meta.key_inputs(),
            self._meta.attributes(Level.INSTANCE)["made_with"],
            self.dim,
            self.features.label_weights,
        )

    def record(self) -> dict[str, Any]:
        """Where it came from, for the record of a run."""
        inputs, keys = self._meta.key_inputs(), self._meta.features.levels
        levels = {str(level): {"key": keys[level], "inputs": inputs[level]} for level in inputs}
        return {
            "cache": {"path": self.url, "levels": levels, "shards": self.shards.numbers},
            "skipped": self._meta.features.skipped,
        }

    def image_ids(self) -> np.ndarray:
        """(n,) int64, by index."""
        return np.asarray(self._meta.tensors["image_id"][self._places].astype(np.int64))

    def order(self, streams: Streams) -> Order:
        """How an epoch goes over the images."""
        return partial(shard_shuffle, self._ranges, self.recipe.train.seed, streams)

    def __getitem__(self, draw: Draw) -> Sample:
        """Raises HdovdError, naming the shard, for one that cannot be read."""
        if self._reading is None or self._reading.epoch != draw.epoch:
            self._reading = ShardReading(self.shards, draw.epoch, {self._places[index] for index in self._wanted(draw)})
        place = self._places[draw.index]
        sample = self.shards.decode(place, self._reading.take(place))
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
            known = {name: arrays[name] for name in InstanceRows.__slots__ if name in arrays}
            rows = InstanceRows(arrays["instance"], arrays["boxes"], **no_labels(len(base)) | known)
        name, exif = f"{where}: {about['file_name']}", Exif(self.recipe.input.exif)
        picture = read_image(name, about["width"], about["height"], sample.picture, exif)
        whole, judged = arrays["image"] if loss.image.enabled else None, about.get("judged")
        mask = None if judged is None else np.isin([*self._label], judged)
        targets = make_targets(boxes.astype(np.float32), labels, mask, rows, whole, self.nouns, self.dim, where)
        return flipped_at_random(pixels_of(picture), targets, sample.image_id, draw.epoch, self.recipe)

    def _wanted(self, draw: Draw) -> Iterable[int]:
        """What this worker will be asked for from here to the end of the epoch."""
        if self.dealing is None:
            return [draw.index]
        worker = get_worker_info()
        steps = range(draw.step, self.dealing.steps, 1 if worker is None else worker.num_workers)
        return (index for step in steps for index in self.dealing.part(draw.epoch, step))


def repeated(images: list[ImageBoxes], recipe: Recipe) -> list[ImageBoxes]:
    """The images of an epoch: those of rare classes several times, one after the other, as the recipe says.

    An image comes as often as the rarest of its classes asks for, sqrt(threshold / share of the images that hold it),
    one time at least (arXiv 1908.03195, appendix B). What is left over of a whole number comes by chance, the same in
    all epochs, so that they are of one length.
    """
    threshold = recipe.train.repeat_threshold
    if not threshold:
        return images
    held = [np.unique(image.labels) for image in images]
    share = np.bincount(np.concatenate(held)) / len(images)
    wanted = np.sqrt(threshold / np.maximum(share, np.finfo(float).tiny)).clip(min=1)
    times = np.array([wanted[labels].max(initial=1.0) for labels in held])
    times += np.random.default_rng(recipe.train.seed).random(len(images))
    chosen = [image for image, count in zip(images, times.astype(int).tolist(), strict=True) for _ in range(count)]
    log(f"{len(chosen):,d} images an epoch of {len(images):,d}: those of rare classes come several times")
    return chosen


def tell_failed(failed: Mapping[int, str], left: int, where: str, what: str) -> None:
    """Say which images are left out since extraction could not read them. Raises HdovdError if no image is left."""
    if failed:
        log(f"skipped {len(failed)}: image without embeddings ({shorten(list(failed))}); {where} why")
    if failed and not left:
        raise HdovdError(f"no image {what}; first reason: {next(iter(failed.values()))}")


def uses_nouns(loss: LossConfig, levels: Collection[Level], where: str) -> bool:
    """Whether pseudo boxes have nouns. Raises HdovdError if the losses need them and the features have none."""
    if loss.uses_pseudo_boxes and loss.class_.enabled and Level.NOUN not in levels:
        raise HdovdError(
            f"{where} has no nouns, so no pseudo box has a text embedding: extract it with --nouns, or "
            "--vocabulary (and --captions), or train with --set loss.class.enabled=false"
        )
    return loss.uses_pseudo_boxes and Level.NOUN in levels


def make_targets(
    boxes: np.ndarray,
    labels: np.ndarray,
    judged: np.ndarray | None,
    rows: InstanceRows | None,
    image_embedding: np.ndarray | None,
    nouns: Tensor,
    dim: int,
    where: str,
) -> Targets:
    """The targets of one image: zeros for levels that are off. Raises HdovdError, naming `where`, for embeddings not of
    norm one.

    boxes (n, 4) float32 and labels (n,) int64 of the base boxes; judged (K,) bool, or None; rows: theirs, in this
    order, and the proposals'; image_embedding (D,) float16; nouns (K, D) float32, no rows if pseudo boxes have none.
    """
    embeddings, pseudo_boxes = torch.zeros(len(boxes), dim), torch.zeros(0, 4)
    pseudo_embeddings, pseudo_texts = torch.zeros(0, dim), torch.zeros(0, dim)
    if rows is not None:
        require_unit(rows.embedding, f"{where}, instance level")
        proposals = rows.proposals()
        if len(nouns):  # else the instance level alone: no noun, no weight in text space
            proposals = proposals.select(proposals.noun >= 0)
        embeddings, pseudo_embeddings = _normalised(rows.base_boxes().embedding), _normalised(proposals.embedding)
        pseudo_boxes = torch.from_numpy(proposals.box)
        pseudo_texts = _texts(proposals, nouns) if len(nouns) else torch.zeros(len(proposals.box), dim)
    if image_embedding is not None:
        require_unit(image_embedding[None], f"{where}, image level")
    return Targets(
        torch.from_numpy(boxes),
        torch.from_numpy(labels),
        embeddings,
        pseudo_boxes,
        pseudo_embeddings,
        pseudo_texts,
        torch.zeros(dim) if image_embedding is None else _normalised(image_embedding),
        None if judged is None else torch.from_numpy(judged),
    )


def _texts(rows: InstanceRows, nouns: Tensor) -> Tensor:
    """(n, D) u of rows that have a label: their noun's embedding, or the mean of several."""
    if not rows.top_noun.shape[1]:
        return nouns[torch.from_numpy(rows.noun.astype(np.int64))]
    return label_texts(nouns, torch.from_numpy(rows.top_noun.astype(np.int64)), torch.from_numpy(rows.top_weight))


def flipped_at_random(pixels: Tensor, targets: Targets, image_id: int, epoch: int, recipe: Recipe) -> Sample:
    """A sample, mirrored left to right as its key says; boxes, pseudo boxes and rows stay together."""
    if is_flipped(key_of(recipe.train.seed, epoch, image_id), recipe.input.flip):
        return pixels.flip(-1), targets.flipped(pixels.shape[-1]), image_id
    return pixels, targets, image_id


def _normalised(rows: np.ndarray) -> Tensor:
    """Stored float16 rows, of norm one again in float32."""
    return torch.nn.functional.normalize(torch.from_numpy(rows).float(), dim=-1)
