"""What a cache knows of one image: its boxes with their nouns, cosines, weights and nearest class names. No CLIP,
nothing drawn.

D embedding size.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hdovd.cache.reader import FeatureCache, InstanceRows, normalised_rows
from hdovd.cache.schema import Level, Source
from hdovd.config.recipe import Recipe, load_recipe
from hdovd.core.errors import shorten
from hdovd.data.coco import ImageBoxes
from hdovd.pipelines.calibration.values import origin_of, with_reliability

NEAREST = 3  # class names a box


@dataclass(frozen=True, slots=True)
class Reliability:
    """The weight of a pseudo label by its cosine (METHOD section 2). `source`: where the values are from, in words."""

    centre: float
    width: float
    scale: float
    source: str

    def weight(self, cosine: float) -> float:
        """In 0..scale."""
        return float(self.scale / (1 + np.exp(-(cosine - self.centre) / self.width)))


@dataclass(frozen=True, slots=True)
class Likeness:
    """A name and the cosine of its text embedding with a crop's. `share`: its part in a label that is made of several
    nouns.
    """

    name: str
    cosine: float
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ViewRow:
    """A box of an image; all names are what the cache calls them.

    box: xyxy, pixels of the original image. `class_name`: of a base box, None if the annotations do not say. `score`:
    of a proposal. `nouns`: what a proposal's label is made of, best first; empty without label. `cosine`: of the crop's
    embedding with the label's text embedding u, or with the class of a base box; None if there is none. `weight`: of a
    label in training; None if that is not known. `nearest`: the class names that the crop is most like; empty if the
    cache has no class names, or no embedding of this box.
    """

    box: tuple[float, float, float, float]
    source: Source
    class_name: str | None
    annotation_id: int | None
    score: float | None
    nouns: tuple[Likeness, ...]
    cosine: float | None
    weight: float | None
    nearest: tuple[Likeness, ...]

    @property
    def name(self) -> str:
        """What it is called in the cache: its class or its best noun; empty if it is not called anything."""
        return (self.class_name or "") if self.source is Source.BASE_BOX else (self.nouns[0].name if self.nouns else "")


@dataclass(frozen=True, slots=True)
class CacheView:
    """An image as a cache has it: base boxes first, then proposals best first.

    `file` and `size` (width, height): None if no annotations were given. `nearest`: of the whole picture's embedding.
    `notes`: what is missing, and why, in words.
    """

    image_id: int
    file: Path | None
    size: tuple[int, int] | None
    rows: tuple[ViewRow, ...]
    nearest: tuple[Likeness, ...]
    reliability: Reliability | None
    notes: tuple[str, ...]


def find_reliability(
    cache: FeatureCache, calibration: Path | None = None, recipe: Recipe | None = None, base: Sequence[str] = ()
) -> Reliability | None:
    """The values of a calibration, or of a recipe, or (neither given) those known for the cache's CLIP; None if none
    are known.

    `base`: the classes that a calibration may be fitted on. Raises HdovdError for a calibration of other features, and
    for a recipe that says "auto" with a CLIP that is not known.
    """
    if recipe is None:
        recipe = load_recipe("ov-coco-faster-rcnn-r50")  # whose values are "auto"
        if calibration is None and origin_of(cache).known() is None:
            return None
    _, used, record = with_reliability(recipe, lambda: origin_of(cache), calibration, base, lambda _: None)
    return Reliability(*used.pseudo_boxes.reliability, record["reliability"]["source"]) if record else None


def gather_view(
    cache: FeatureCache,
    image_id: int,
    image: ImageBoxes | None = None,
    *,
    names: Sequence[str] = (),
    file: Path | None = None,
    reliability: Reliability | None = None,
) -> CacheView:
    """What `cache` has of an image.

    `image`: the same image in the annotations, whose labels count into `names` (a protocol's); None: base boxes have no
    class name. `file`: its picture, only handed on. Raises HdovdError if the cache does not have the image.
    """
    levels, failed = cache.levels(), cache.failed()
    rows, notes = cache.instances(image_id), list[str]()
    if image_id in failed:
        notes.append(f"the extraction could not read it: {failed[image_id]}")
    crops = normalised_rows(rows.embedding)
    classes = cache.names(Level.CLASS) if Level.CLASS in levels else []
    texts = normalised_rows(cache.embeddings(Level.CLASS)) if classes else np.zeros((0, crops.shape[1]), np.float32)
    labels = _Labels(cache, rows, crops)
    notes += _missing(levels, rows, reliability)
    own = (
        {}
        if image is None
        else {
            number: names[label]
            for number, label in zip(image.annotation_ids.tolist(), image.labels.tolist(), strict=True)
        }
    )
    unknown = [number for number in rows.annotation_id[rows.source == Source.BASE_BOX].tolist() if number not in own]
    if image is not None and unknown:
        notes.append(
            f"the annotations do not have these of the cache: {shorten(unknown)}; is this the data that it was made "
            f"from?"
        )
    found = []
    for row, box in enumerate(rows.box.tolist()):
        base = rows.source[row] == Source.BASE_BOX
        likeness = texts @ crops[row] if crops[row].any() else np.zeros(0, np.float32)
        number = int(rows.annotation_id[row]) if base else None
        class_name = own.get(number) if number is not None else None
        cosine = labels.cosine(row)
        if class_name in classes and len(likeness):
            cosine = float(likeness[classes.index(class_name)])
        weight = reliability.weight(cosine) if reliability and cosine is not None and not base else None
        found.append(
            ViewRow(
                tuple(box),
                Source(rows.source[row]),
                class_name,
                number,
                None if base else float(rows.score[row]),
                labels.nouns(row),
                cosine,
                weight,
                _nearest(classes, likeness),
            )
        )
    whole = (
        normalised_rows(cache.image_embedding(image_id)[None])[0] if Level.IMAGE in levels else np.zeros(0, np.float32)
    )
    size = None if image is None else (image.width, image.height)
    return CacheView(
        image_id,
        file,
        size,
        tuple(found),
        _nearest(classes, texts @ whole) if whole.any() else (),
        reliability,
        tuple(notes),
    )


class _Labels:
    """The pseudo labels of one image's rows."""

    def __init__(self, cache: FeatureCache, rows: InstanceRows, crops: np.ndarray) -> None:
        self._names: list[str] = []
        if Level.NOUN not in cache.levels():
            return
        self._names, self._crops = cache.names(Level.NOUN), crops
        if rows.top_noun.shape[1]:
            self._noun, self._share = rows.top_noun, rows.top_weight
        else:
            self._noun, self._share = rows.noun[:, None], np.ones((len(rows.noun), 1), np.float32)
        used = np.unique(self._noun[self._noun >= 0])
        self._text = dict(zip(used.tolist(), normalised_rows(cache.embeddings(Level.NOUN)[used]), strict=True))

    def nouns(self, row: int) -> tuple[Likeness, ...]:
        return tuple(
            Likeness(self._names[noun], float(self._text[noun] @ self._crops[row]), share)
            for noun, share in self._made_of(row)
        )

    def cosine(self, row: int) -> float | None:
        """Of the crop and u, the normalised weighted mean of the nouns' embeddings."""
        made_of = self._made_of(row)
        if not made_of:
            return None
        u = np.sum([self._text[noun] * share for noun, share in made_of], axis=0)
        return float(u @ self._crops[row] / max(np.linalg.norm(u), 1e-12))

    def _made_of(self, row: int) -> list[tuple[int, float]]:
        if not self._names:
            return []
        return [
            (noun, share)
            for noun, share in zip(self._noun[row].tolist(), self._share[row].tolist(), strict=True)
            if noun >= 0
        ]


def _missing(levels: Collection[Level], rows: InstanceRows, reliability: Reliability | None) -> list[str]:
    proposals = rows.source == Source.PROPOSAL
    notes = []
    if not proposals.any():
        notes.append("the cache has no proposals of this image")
    elif Level.PSEUDO_LABEL not in levels or Level.NOUN not in levels:
        notes.append("the cache has no nouns, so proposals have no label: extract-clip --nouns or --vocabulary")
    elif without := int((rows.noun[proposals] < 0).sum()):
        notes.append(
            f"{without} of {int(proposals.sum())} proposals have no noun: the image offers none, or its picture was "
            f"not read"
        )
    if Level.PSEUDO_LABEL in levels and reliability is None:
        notes.append(
            "no weights: no values are known for this CLIP and these prompts; give --calibration FILE (hdovd "
            "calibrate), or a --recipe that has some"
        )
    if Level.CLASS not in levels:
        notes.append("the cache has no class names, so there are no nearest classes")
    if Level.IMAGE not in levels:
        notes.append("the cache has no image level")
    return notes


def _nearest(names: Sequence[str], cosines: np.ndarray) -> tuple[Likeness, ...]:
    return tuple(Likeness(names[k], float(cosines[k])) for k in np.argsort(-cosines, kind="stable")[:NEAREST].tolist())


def marked(name: str, novel: Collection[str]) -> str:
    """The name, with a star if it is a novel class's."""
    return f"{name}*" if name in novel else name


def names_and_cosines(found: Sequence[Likeness], novel: Collection[str]) -> str:
    """Names with their cosines, best first."""
    return ", ".join(f"{marked(one.name, novel)} {one.cosine:.2f}" for one in found)
