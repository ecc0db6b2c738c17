"""`hdovd cache import` of embeddings that others published: they become products whose identity says that nobody knows
what made them.

The files are read twice, in flat memory: once for boxes, counts and a hash of all rows, which takes the place of a CLIP
in the keys, and once to write. Class names are embedded by a CLIP of the user's choice, which has to be the one that
the publishers used: no file says which.

`hd-ovd` is what the HD-OVD authors (github: iSEE-Laboratory/HD-OVD) train from. Its folder holds one .pth an image,
named after the picture without its extension, and in it a dict of tensors whose row counts only their trainer tells:
`gt_clip_image_embedding` has a row for every base box in annotation order, crowd boxes left out, and those of no area
or with a side under 1 px (mmdetection's rule); `proposal_clip_image_embedding` and `proposal_clip_text_embedding` have
a row for every box of the proposal file; `clip_full_image_embedding` is one row. Rows are not normalised there. The
proposal file is a pickled list with one (n, 4 or 5) array an image of the annotation file, in the order of its
`images`, those without base boxes too; boxes are xyxy pixels of the original image. Their trainer takes the first five
boxes of over 32 px a side at training size, by the list's order and not by score, so that order is kept. Where the list
has no box, their loader puts one of zeros, so such an image may have one row that means nothing.

`oadp` is what OAKE of OADP (github: LutingWang/OADP, branch main) writes: `objects/train2017/ID.pth`, the image id in
12 digits, with `embeddings` (m, D), `bboxes` (m, 4) xyxy pixels of the original image and `objectness` (m, 1), all
float16 (so coordinates over 512 are rounded to half pixels), of proposals with sides of 4 px or more; and
`globals/train2017/ID.pth`, a tensor (D,) of the image. Base boxes have no embeddings there, and a proposal's embedding
comes from a wider square crop with the surroundings masked in attention, not from a crop of the box. `blocks/`, a grid
over the image, has no place here.

Either way a file is read by `common.tensors` or `proposal_files.pickles`, never by a plain unpickler, and one that is
missing, damaged or does not fit costs its image alone: the reason stands in the image's place.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from hdovd.cache import (
    CHUNK_ROWS,
    IMAGE_PART_ROWS,
    PART_ROWS,
    SCHEMA_VERSION,
    Catalog,
    FeatureSet,
    KeyInputs,
    Level,
    Source,
    key_of,
)
from hdovd.cache.writer import PartFiller, ProductWriter
from hdovd.core import HdovdError, Unfit, counted, log, shorten
from hdovd.data import ImageBoxes, Instances, Split, load_protocol, read_instances
from hdovd.pipelines.cache_tools.config import ImportConfig
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.tensors import floats, load_pth
from hdovd.pipelines.extraction.identities import TextRows, box_table
from hdovd.pipelines.proposal_files.file import Proposals, ProposalTable
from hdovd.pipelines.proposal_files.pickles import boxes_of, load_arrays

GT, PROPOSAL, TEXT, FULL = (
    "gt_clip_image_embedding",
    "proposal_clip_image_embedding",
    "proposal_clip_text_embedding",
    "clip_full_image_embedding",
)


@dataclass(frozen=True, slots=True)
class ForeignImage:
    """What is published of one image of the split: n base boxes, m proposals, D embedding size; all float32, rows of
    norm 1.

    base_embedding: (n, D), in the order of the split's boxes; None if the format has none.
    proposal_box: (m, 4) xyxy pixels of the original image, inside it; proposal_score: (m,), 1 if the file has no
    scores; proposal_embedding: (m, D); proposal_text: (m, D) or None; all in the order in which they are to be
    preferred. image_embedding: (D,) or None. dropped: how many proposals were left out, since nothing of them lies in
    the image or a number is not finite. reason: why the image has none of all that; then the arrays are empty. None if
    it has.
    """

    image_id: int
    base_embedding: np.ndarray | None = None
    proposal_box: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    proposal_score: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    proposal_embedding: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    proposal_text: np.ndarray | None = None
    image_embedding: np.ndarray | None = None
    dropped: int = 0
    reason: str | None = None

    def rows(self) -> np.ndarray:
        """Base boxes, then proposals, as the box table has them: (n + m, D)."""
        return np.concatenate([rows for rows in (self.base_embedding, self.proposal_embedding) if rows is not None])


def read_hd_ovd(folder: Path, proposals_pkl: Path, split: Split) -> Iterator[ForeignImage]:
    """The images of `split`, in its order, from the folder of .pth files and the proposal file of HD-OVD.

    `split` must come from the annotation file that the proposal file goes with: COCO's own, or the base-only one made
    of it.

    Raises HdovdError, at once, if the folder holds no .pth, or the proposal file is unsafe, damaged or for other
    annotations.
    """
    if next(folder.glob("*.pth"), None) is None:
        raise HdovdError(
            f"no folder {folder}, or it holds no .pth: expected the HD-OVD embeddings, one .pth an image "
            f"(000000000009.pth)"
        )
    found = read_instances(
        split.annotations, split.folder
    )  # again, since the split holds neither the other images nor areas
    place = {image_id: number for number, image_id in enumerate(found.images)}
    without_row = {*found.ids[_left_out_by_mmdetection(found)].tolist()}
    proposals = load_arrays(proposals_pkl)
    if not isinstance(proposals, list) or len(proposals) != len(place):
        count = f"one of {len(proposals)}" if isinstance(proposals, list) else f"a {type(proposals).__name__}"
        raise HdovdError(
            f"{proposals_pkl} is no HD-OVD proposal file of {split.annotations}: expected a list of {len(place)} "
            f"arrays, one for each of its images by place in the list, found {count}: give the annotation file that "
            f"the proposals were made for"
        )

    def read(image: ImageBoxes) -> ForeignImage:
        file = folder / f"{Path(image.file_name).name[:-4]}.pth"
        tensors = _load(file, GT, PROPOSAL, FULL)
        if absent := [i for i in image.annotation_ids.tolist() if i in without_row]:
            raise Unfit(
                f"{file} holds no embedding of annotations {shorten(absent)}: the published trainer leaves out boxes "
                f"with a side under 1 px. Leave them out of the annotation file as well"
            )
        base = _rows(tensors[GT], f"{file}: {GT}", len(image.boxes), "base boxes")
        boxes, scores = boxes_of(proposals[place[image.id]], f"{proposals_pkl}: entry {place[image.id]}")
        keys = [key for key in (PROPOSAL, TEXT) if key in tensors]
        of = f"boxes in {proposals_pkl.name}; is that in the order of the annotation file?"
        found = [
            _rows(tensors[key], f"{file}: {key}", len(boxes), of)
            if len(boxes)
            else np.zeros((0, base.shape[1]), np.float32)
            for key in keys
        ]
        boxes, scores, found, dropped = _inside(image, boxes, scores, found)
        units = [_unit(rows, f"{file}: {key}") for rows, key in zip(found, keys, strict=True)]
        return ForeignImage(
            image.id,
            _unit(base, f"{file}: {GT}"),
            boxes,
            scores,
            units[0],
            units[1] if TEXT in keys else None,
            _image_row(tensors[FULL], f"{file}: {FULL}"),
            dropped,
        )

    return _each(split, read)


def read_oadp(folder: Path, split: Split) -> Iterator[ForeignImage]:
    """The images of `split`, in its order, from OADP's `oake` folder: `objects/`, and `globals/` if it is there.

    In both, files lie in a folder named as the split's pictures are (train2017), or at once. Proposals come best first.

    Raises HdovdError, at once, if there are no object files.
    """
    objects, images = _files(folder, "objects", split), _files(folder, "globals", split)
    if objects is None:
        raise HdovdError(
            f"no .pth in {folder / 'objects' / split.folder.name}, nor in {folder / 'objects'}: give the oake folder "
            f"of OADP, with its objects (and globals) unpacked"
        )

    def read(image: ImageBoxes) -> ForeignImage:
        file = objects / f"{image.id:012d}.pth"
        tensors = _load(file, "embeddings", "bboxes", "objectness")
        boxes, _ = boxes_of(floats(tensors["bboxes"], f"{file}: bboxes"), f"{file}: bboxes", (4,))
        scores = floats(tensors["objectness"], f"{file}: objectness").reshape(-1)
        if len(scores) != len(boxes):
            raise Unfit(f"{file}: objectness has {len(scores)} rows, expected one for each of the {len(boxes)} bboxes")
        rows = _rows(tensors["embeddings"], f"{file}: embeddings", len(boxes), "bboxes")
        boxes, scores, (rows,), dropped = _inside(image, boxes, scores, [rows])
        order = np.argsort(-scores, kind="stable")
        whole = None if images is None else _image_row(_load(images / file.name), str(images / file.name))
        return ForeignImage(
            image.id, None, boxes[order], scores[order], _unit(rows[order], f"{file}: embeddings"), None, whole, dropped
        )

    return _each(split, read)


def _each(split: Split, read: Callable[[ImageBoxes], ForeignImage]) -> Iterator[ForeignImage]:
    """All images by `read`; those that do not fit, or whose D is not that of the images before, as a reason."""
    expected = 0
    for image in split.images:
        try:
            found = read(image)
            sizes = {
                a.shape[-1]
                for a in (found.base_embedding, found.proposal_embedding, found.proposal_text, found.image_embedding)
                if a is not None
            }
            if sizes != {expected or min(sizes)}:
                raise Unfit(
                    f"embeddings of size {shorten(sorted(sizes))}, expected "
                    + (f"{expected} as in the images before" if expected else "one size")
                    + ": they are not all of one CLIP"
                )
            expected = min(sizes)
        except Unfit as unfit:
            found = ForeignImage(image.id, reason=str(unfit))
        yield found


def _left_out_by_mmdetection(found: Instances) -> np.ndarray:
    """(A,) bool: whether an annotation that `load_split` keeps gets no row all the same; what lies outside the image
    neither keeps.
    """
    small = ~np.isnan(found.areas) & (found.boxes[:, 2:] < 1).any(axis=1)
    return np.asarray(found.ignored | (found.areas <= 0) | small)


def _files(folder: Path, kind: str, split: Split) -> Path | None:
    """Where the files of `kind` lie, if anywhere."""
    choices = (folder / kind / split.folder.name, folder / kind / "train2017", folder / kind)
    return next((choice for choice in choices if next(choice.glob("*.pth"), None) is not None), None)


def _load(file: Path, *keys: str) -> Any:
    """The content of a .pth of plain tensors, a dict with `keys` if any are given."""
    if not file.is_file():
        raise Unfit(f"no file {file}")
    loaded = load_pth(file)
    if keys and not (isinstance(loaded, dict) and set(keys) <= loaded.keys()):
        found = shorten(list(loaded)) if isinstance(loaded, dict) else f"a {type(loaded).__name__}"
        raise Unfit(f"{file} holds {found}, expected {', '.join(keys)}")
    return loaded


def _rows(value: Any, what: str, count: int, of: str) -> np.ndarray:
    rows = floats(value, what)
    if rows.ndim != 2 or len(rows) != count:
        raise Unfit(f"{what} has shape {rows.shape}, expected {count} rows for {count} {of}")
    return rows


def _image_row(value: Any, what: str) -> np.ndarray:
    rows = floats(value, what)
    if rows.ndim not in (1, 2) or rows.shape[:-1] not in ((), (1,)):
        raise Unfit(f"{what} has shape {rows.shape}, expected one row")
    return _unit(rows.reshape(1, -1), what).reshape(-1)


def _unit(rows: np.ndarray, what: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(norms[:, 0]) & (norms[:, 0] > 0)))
    if len(bad):
        raise Unfit(
            f"{what}: {len(bad)} of {len(rows)} rows cannot be normalised: zero or not finite (rows {shorten([*bad])})"
        )
    return np.asarray(rows / norms)


def _inside(
    image: ImageBoxes, boxes: np.ndarray, scores: np.ndarray, rows: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], int]:
    """All of the boxes that have an area in the image, cut to it, and how many have none."""
    cut = boxes.clip(0, np.array([image.width, image.height] * 2, np.float32))
    keep = np.isfinite(boxes).all(axis=1) & np.isfinite(scores) & (cut[:, 2:] > cut[:, :2]).all(axis=1)
    return cut[keep], scores[keep], [r[keep] for r in rows], int((~keep).sum())


Read = Callable[[Split], Iterator[ForeignImage]]
UNKNOWN_ORIGIN = "imported, origin unknown"


def import_features(config: ImportConfig) -> FeatureSet:
    """Write the products and name them as a set. Raises HdovdError for bad input, or if nothing fits the data."""
    config.check()
    protocol = load_protocol(config.protocol)
    split = config.data.load("train2017", protocol, base_only=True)
    read: Read = (
        partial(read_oadp, Path(config.source))
        if config.proposals is None  # they are of the other format alone
        else partial(read_hd_ovd, Path(config.source), config.proposals)
    )
    found = _Survey(config, split, read)
    catalog = Catalog.create(config.cache)
    writers = _begin(config, found, catalog)
    _write_rows(read, split, found, writers)
    if config.clip is None:
        log("no --clip: no class names were embedded, and training needs them; give the CLIP that the publishers used")
    else:
        writers[Level.CLASS] = _write_classes(config, config.clip, protocol.names, catalog, found.dim)
    features = FeatureSet(
        {level: writer.product.key for level, writer in writers.items()},
        {**split.skips.by_reason, **({"proposal without area, image": found.dropped} if found.dropped else {})},
        proposals={"file": Path(config.proposals or config.source).name, "identity": found.identity, "made_by": None},
    )
    catalog.write_set(config.features, features)
    log(
        f"{config.cache}: set {config.features}: {len(split.images):,d} images, {len(found.table.box):,d} boxes, "
        f"{len(found.texts):,d} texts of pseudo boxes; {UNKNOWN_ORIGIN}"
    )
    return features


class _Survey:
    """What the first reading found: the `table` of boxes; `dropped`, images of which proposals were left out; `texts`,
    the row number of every different text embedding by its bytes; `content`, a hash of all rows of a level that has
    some; `identity` of the proposals; `dim`, D.
    """

    def __init__(self, config: ImportConfig, split: Split, read: Read) -> None:
        hashes = defaultdict[Level, Any](hashlib.sha256)
        proposals, failed = dict[int, Proposals](), dict[int, str]()
        self.dropped, self.texts = list[int | str](), dict[bytes, int]()
        self.dim, with_base = 0, False
        for image in progress(read(split), "reading", "image", total=len(split.images)):
            if image.reason is not None:
                failed[image.image_id] = image.reason
                continue
            proposals[image.image_id] = Proposals(image.proposal_box, image.proposal_score)
            self.dropped += [image.image_id] * bool(image.dropped)
            self.dim, with_base = image.proposal_embedding.shape[1], with_base or image.base_embedding is not None
            hashes[Level.INSTANCE].update(image.rows().tobytes())
            if image.image_embedding is not None:
                hashes[Level.IMAGE].update(image.image_embedding.tobytes())
            for row in () if image.proposal_text is None else image.proposal_text.astype(np.float16):
                hashes[Level.PSEUDO_LABEL].update(
                    self.texts.setdefault(row.tobytes(), len(self.texts)).to_bytes(8, "little")
                )
        log(*(f"left out: image {image_id}: {reason}" for image_id, reason in list(failed.items())[:20]))
        if len(failed) == len(split.images):
            raise HdovdError(
                f"nothing in {config.source} fits {split.annotations}: all {len(failed)} images were left out, first "
                f"of all image {next(iter(failed))}: {next(iter(failed.values()))}"
            )
        if failed:
            log(f"{counted(len(failed), 'image has', 'images have')} no embeddings; hdovd cache info lists them")
        if self.dropped:
            log(f"skipped proposals without area in {counted(len(self.dropped), 'image')} ({shorten(self.dropped)})")
        images = split.images
        if not with_base:
            images = [replace(i, boxes=i.boxes[:0], annotation_ids=i.annotation_ids[:0]) for i in images]
            log(
                f"{config.format} has no embeddings of base boxes: hdovd train will refuse the instance level for the "
                f"boxes that it lacks"
            )
        self.table = box_table(images, proposals)
        self.content = {level: found.hexdigest() for level, found in hashes.items()}
        self.identity = ProposalTable.of(proposals).identity()


def _begin(config: ImportConfig, found: _Survey, catalog: Catalog) -> dict[Level, ProductWriter]:
    schema: KeyInputs = {"schema_version": SCHEMA_VERSION}
    origin, given = schema | _origin(config), found.table.inputs()
    of_images = {"images": given["images"]}
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: schema | given,
        Level.INSTANCE: {**origin, "content": found.content[Level.INSTANCE], **of_images, "boxes": given["boxes"]},
    }
    names = [f"text {row}" for row in range(len(found.texts))]
    if Level.IMAGE in found.content:
        inputs[Level.IMAGE] = {**origin, "content": found.content[Level.IMAGE], **of_images}
    if names:
        inputs[Level.NOUN] = {
            **origin,
            "content": hashlib.sha256(b"".join(found.texts)).hexdigest(),
            "names": {"count": len(names)},
        }
        inputs[Level.PSEUDO_LABEL] = {
            **schema,
            "instance": key_of(inputs[Level.INSTANCE]),
            "noun": key_of(inputs[Level.NOUN]),
            "content": found.content[Level.PSEUDO_LABEL],
        }
    rows = {Level.IMAGE: len(found.table.image_id), Level.NOUN: len(names)}
    return {
        level: ProductWriter.begin(
            catalog.folder,
            level,
            level_inputs,
            rows=rows.get(level, len(found.table.box)),
            part_rows=IMAGE_PART_ROWS if level is Level.IMAGE else PART_ROWS,
            dim=0 if level in (Level.BOXES, Level.PSEUDO_LABEL) else found.dim,
            tables=found.table.tables(level),
            names=names if level is Level.NOUN else None,
            made_with={"clip": UNKNOWN_ORIGIN, "format": str(config.format)},
        )
        for level, level_inputs in inputs.items()
    }


def _origin(config: ImportConfig) -> KeyInputs:
    """What stands for the CLIP in the keys."""
    return {"clip": {"origin": UNKNOWN_ORIGIN, "format": str(config.format)}}


def _write_rows(read: Read, split: Split, found: _Survey, writers: dict[Level, ProductWriter]) -> None:
    """The second reading."""
    parts = {level: PartFiller(writer) for level, writer in writers.items() if writer.product.parts}
    stored = np.frombuffer(b"".join(found.texts), np.float16).reshape(-1, found.dim)
    nouns = stored.astype(np.float32)
    if Level.NOUN in parts:
        parts[Level.NOUN].add({"embedding": stored})
    for number, image in enumerate(progress(read(split), "writing", "image", total=len(split.images))):
        start, stop = found.table.offset[number : number + 2].tolist()
        failed = {} if image.reason is None else {image.image_id: image.reason}
        rows = np.zeros((stop - start, found.dim), np.float32) if failed or start == stop else image.rows()
        parts[Level.INSTANCE].add({"embedding": rows}, failed)
        if Level.IMAGE in parts:
            whole = image.image_embedding
            why = failed or ({image.image_id: "no embedding of the image was published"} if whole is None else {})
            row = np.zeros((1, found.dim), np.float32) if whole is None else whole[None]
            parts[Level.IMAGE].add({"embedding": row}, why)
        if Level.PSEUDO_LABEL in parts:
            extra = found.table.source[start:stop] == Source.PROPOSAL
            parts[Level.PSEUDO_LABEL].add(_pseudo_labels(image, rows, extra, found.texts, nouns))


def _pseudo_labels(
    image: ForeignImage, rows: np.ndarray, extra: np.ndarray, texts: dict[bytes, int], nouns: np.ndarray
) -> dict[str, Any]:
    noun, cosine = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.float32)
    if image.proposal_text is not None and len(image.proposal_text):
        noun[extra] = [texts[row.tobytes()] for row in image.proposal_text.astype(np.float16)]
        cosine[extra] = (rows[extra] * nouns[noun[extra]]).sum(axis=1)
    return {"noun": noun, "noun_cosine": cosine}


def _write_classes(
    config: ImportConfig, named: str, names: tuple[str, ...], catalog: Catalog, dim: int
) -> ProductWriter:
    """The class level, by the CLIP that the user says it was."""
    from hdovd.pipelines.teachers.openclip import load_clip

    clip = load_clip(
        named, config.pretrained, device=config.device, precision=config.precision, activation=config.activation
    )
    log(*clip.notes)
    if clip.dim != dim:
        raise HdovdError(
            f"--clip {named} embeds in {clip.dim} values, {config.source} holds {dim}: it is not the CLIP that was used"
        )
    texts = TextRows(names)
    writer = ProductWriter.begin(
        catalog.folder,
        Level.CLASS,
        {
            "schema_version": SCHEMA_VERSION,
            "text_clip": clip.identity,
            **texts.inputs(clip, config.templates),
            **_origin(config),
        },
        rows=len(names),
        part_rows=CHUNK_ROWS,
        dim=dim,
        names=names,
        made_with=clip.made_with,
    )
    for part in writer.product.missing():
        writer.write_part(part, {"embedding": texts.embed(clip, config.templates, *writer.product.rows_of(part))})
    return writer
