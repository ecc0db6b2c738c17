"""What an extraction is asked to do. Imports no CLIP, so that the command line can name it at no cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, is_set_name
from hdovd.cache.schema import CHUNK_ROWS, DEFAULT_SET, PART_ROWS
from hdovd.core.errors import HdovdError, is_file, require_files
from hdovd.data.coco import DataPaths, Exif
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.common.name_list import is_shipped, read_vocabulary
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, DenseRecipe
from hdovd.pipelines.extraction.label_rule import ONE_NOUN, LabelRule
from hdovd.pipelines.nouns.config import Matching
from hdovd.pipelines.teachers.activation import Activation
from hdovd.pipelines.teachers.prompts import check_templates

DEFAULT_TEMPLATES = ("a photo of a {}",)
_FILES = ("proposals", "vocabulary", "captions")
_LATER_FILES = ("synonyms", "class_embeddings", "nouns")  # not in `to_dict` without a value: sets that are older than these stay the same




class Store(StrEnum):
    ZARR = "zarr"
    WEBDATASET = "webdataset"


class InstanceTeacher(StrEnum):
    CROP = "crop"
    DENSE = "dense"


class Executor(StrEnum):
    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the work that this process does: worker `index` of `count`, index from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise HdovdError(f"--shard {self.index}/{self.count}: expected I/N with I from 0 to N-1")

    @classmethod
    def parse(cls, text: str) -> Share:
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit()):
            raise HdovdError(f"--shard {text}: expected I/N, such as 0/8")
        return cls(int(index), int(count))


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """What to extract. `clip` and `pretrained` as in `clip_teacher.load_clip`; sizes in crops and rows.

    `recipe`: what becomes of a box. `features` names the set that the products make up. `batch_size`: None for the teacher's
    best. `workers`: None for what suits the device. `share`: None for torchrun's own, or all of the work. `store`: what `cache`
    becomes, a Zarr cache or a folder of tar shards. `synonyms` and `class_embeddings`: files of `text_rows.read_classes`.
    `nouns`: a file of `hdovd nouns`, instead of `vocabulary` and `captions`; `matching`: how these are, if there are captions.
    `labels`: how many nouns a pseudo label is made of. `exif`: how pictures are read.
    """

    data: DataPaths
    cache: Path | str
    clip: str
    pretrained: str | None = None
    proposals: Path | None = None
    vocabulary: Path | None = None
    captions: Path | None = None
    protocol: str = "ov-coco"
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    recipe: CropRecipe | DenseRecipe = PLAIN_BOX
    precision: Precision = Precision.AUTO
    activation: Activation = Activation.AUTO
    features: str = DEFAULT_SET
    device: str = "auto"
    batch_size: int | None = None
    part_rows: int = PART_ROWS
    workers: int | None = None
    dry_run: bool = False
    retry_failed: bool = False
    share: Share | None = None
    executor: Executor = Executor.LOCAL
    store: Store = Store.ZARR
    synonyms: Path | None = None
    class_embeddings: Path | None = None
    nouns: Path | None = None
    matching: Matching = Matching.LEMMAS
    labels: LabelRule = ONE_NOUN
    exif: Exif = Exif.APPLY

    def __post_init__(self) -> None:
        if self.nouns is not None and (self.vocabulary is not None or self.captions is not None):
            raise HdovdError("--nouns holds a vocabulary and what of it each image offers: leave --vocabulary and --captions out")
        if self.captions is not None and self.vocabulary is None:
            raise HdovdError("--captions needs --vocabulary too: the names, one a line, that are looked for in the captions")
        for option in ("vocabulary", "nouns"):
            if self.proposals is None and getattr(self, option) is not None:
                raise HdovdError(f"--{option} names pseudo boxes, and there are none without --proposals")
        if self.labels.top > 1 and self.vocabulary is None and self.nouns is None:
            raise HdovdError(f"--label-top-k {self.labels.top} is of pseudo labels, and there are none without --nouns or --vocabulary")
        if self.synonyms is not None and self.class_embeddings is not None:
            raise HdovdError("--synonyms has no use with --class-embeddings, which takes the place of all class names")
        check_templates(self.templates)
        if self.part_rows < 1 or (self.part_rows > CHUNK_ROWS and self.part_rows % CHUNK_ROWS):
            raise HdovdError(f"--part-rows {self.part_rows}: expected at most {CHUNK_ROWS}, or a multiple of it")
        if not is_set_name(self.features):
            raise HdovdError(f"--features {self.features[:100]!r}: expected {SET_NAME_TOLD}")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.store is Store.ZARR:  # else it is a folder of tar shards, which the extraction looks into
            Catalog.find_at(self.cache)
        load_protocol(self.protocol)
        self.data.locate("train2017")
        require_files(proposals=self.proposals, captions=self.captions, nouns=self.nouns, synonyms=self.synonyms,
                      class_embeddings=self.class_embeddings)
        if self.vocabulary is not None:
            read_vocabulary(self.vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """What another process needs to make the same products: JSON values, absolute paths."""
        paths = {name: _absolute(getattr(self, name)) for name in _FILES}
        if self.captions is not None and self.matching is not Matching.WORDS:  # sets that do not say it are of whole words
            paths["matching"] = str(self.matching)
        paths |= {name: _absolute(file) for name in _LATER_FILES if (file := getattr(self, name)) is not None}
        data = {name: _absolute(getattr(self.data, name)) for name in ("root", "images", "annotations")}
        pretrained = self.pretrained if self.pretrained is None or not is_file(self.pretrained) else _absolute(Path(self.pretrained))
        clip = f"local-dir:{_absolute(Path(self.clip[10:]))}" if self.clip.startswith("local-dir:") else self.clip
        protocol = _absolute(Path(self.protocol)) if is_file(self.protocol) else self.protocol
        recipe = {"dense": {"side": self.recipe.side}} if isinstance(self.recipe, DenseRecipe) else {"crop": self.recipe.inputs()}
        return {"data": data, **paths, "clip": clip, "pretrained": pretrained, "protocol": protocol, "templates": list(self.templates),
                **recipe, "precision": str(self.precision), "activation": str(self.activation),
                "features": self.features, **({} if self.labels.top == 1 else {"labels": self.labels.inputs()}),
                **({} if self.exif is Exif.APPLY else {"exif": str(self.exif)})}

    @classmethod
    def from_dict(cls, tree: dict[str, Any], cache: Path | str, **changes: Any) -> ExtractConfig:
        """The extraction that `to_dict` described, with changes."""
        paths = {name: _path(tree[name]) for name in _FILES} | {name: _path(tree.get(name)) for name in _LATER_FILES}
        data = DataPaths(**{name: _path(value) for name, value in tree["data"].items()})
        recipe = DenseRecipe(**tree["dense"]) if "dense" in tree else CropRecipe.from_inputs(tree["crop"]) if "crop" in tree else PLAIN_BOX
        rest = {name: value for name, value in tree.items() if name not in ("crop", "dense", "labels")}
        given = {**rest, **paths, "data": data, "templates": tuple(tree["templates"]), "recipe": recipe,
                 "labels": LabelRule.of(tree.get("labels", {})), "matching": _matching(tree),
                 "precision": Precision(tree["precision"]), "exif": Exif(tree.get("exif", Exif.APPLY)),
                 "activation": Activation(tree["activation"]), "cache": cache}
        return cls(**(given | changes))


def _matching(tree: dict[str, Any]) -> Matching:
    """What a set says of how names were found in captions; one without captions says nothing, and one that is older neither."""
    return Matching(tree.get("matching", Matching.LEMMAS if tree.get("captions") is None else Matching.WORDS))


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path) if is_shipped(path) else str(path.absolute())


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
