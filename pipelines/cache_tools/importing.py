"""`hdovd cache import` of embeddings that others published: they become products whose identity says that nobody knows
what made them.

The files are read twice, in flat memory: once for boxes, counts and a hash of all rows, which takes the place of a CLIP
in the keys, and once to write. Class names are embedded by a CLIP of the user's choice, which has to be the one that
the publishers used: no file says which.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hdovd.cache.catalog import Catalog, FeatureSet
from hdovd.cache.identity import KeyInputs, key_of
from hdovd.cache.schema import CHUNK_ROWS, IMAGE_PART_ROWS, PART_ROWS, SCHEMA_VERSION, Level, Source
from hdovd.cache.writer import ProductWriter
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.data.coco import Split
from hdovd.data.protocol import load_protocol
from hdovd.pipelines.cache_tools.import_config import ForeignFormat, ImportConfig
from hdovd.pipelines.cache_tools.published_features import ForeignImage, read_hd_ovd, read_oadp
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.extraction.boxes import BoxTable, box_table
from hdovd.pipelines.proposal_files.table import Proposals, ProposalTable

UNKNOWN_ORIGIN = "imported, origin unknown"


def import_features(config: ImportConfig, log: Callable[[str], None] = print) -> FeatureSet:
    """Write the products and name them as a set. Raises HdovdError for bad input, or if nothing fits the data."""
    config.check()
    protocol = load_protocol(config.protocol)
    split = config.data.load("train2017", protocol, base_only=True, log=log)
    found = _survey(config, split, log)
    catalog = Catalog.create(config.cache)
    writers = _begin(config, found, catalog)
    _write_rows(config, split, found, writers)
    if config.clip is None:
        log("no --clip: no class names were embedded, and training needs them; give the CLIP that the publishers used")
    else:
        writers[Level.CLASS] = _write_classes(config, protocol.names, catalog, found.dim, log)
    features = FeatureSet(
        {level: writer.product.key for level, writer in writers.items()},
        {**split.skips.by_reason, **({"proposal without area, image": list(found.dropped)} if found.dropped else {})},
        proposals={"file": (config.proposals or config.folder).name, "identity": found.proposals, "made_by": None},
    )
    catalog.write_set(config.features, features)
    log(
        f"{config.cache}: set {config.features}: {len(split.images):,d} images, {len(found.table.box):,d} boxes, "
        f"{len(found.texts):,d} texts of pseudo boxes; {UNKNOWN_ORIGIN}"
    )
    return features


@dataclass(slots=True)
class _Survey:
    """What the first reading found. `texts`: the row number of every different text embedding, by its bytes.

    `proposals`: their identity.
    """

    table: BoxTable
    failed: dict[int, str]
    dropped: list[int | str]
    texts: dict[bytes, int]
    content: dict[Level, str]
    dim: int
    proposals: str
    with_base: bool
    with_images: bool


def _read(config: ImportConfig, split: Split) -> Iterator[ForeignImage]:
    if config.format is ForeignFormat.HD_OVD:
        assert config.proposals is not None
        return read_hd_ovd(config.folder, config.proposals, split)
    return read_oadp(config.folder, split)


def _survey(config: ImportConfig, split: Split, log: Callable[[str], None]) -> _Survey:
    hashes = {level: hashlib.sha256() for level in (Level.INSTANCE, Level.IMAGE, Level.PSEUDO_LABEL)}
    proposals: dict[int, Proposals] = {}
    failed: dict[int, str] = {}
    dropped: list[int | str] = []
    texts: dict[bytes, int] = {}
    dim, with_base, with_images = 0, False, False
    for image in progress(_read(config, split), "reading", "image", total=len(split.images)):
        if image.reason is not None:
            failed[image.image_id] = image.reason
            continue
        proposals[image.image_id] = Proposals(image.proposal_box, image.proposal_score)
        dropped += [image.image_id] * bool(image.dropped)
        dim = max(
            dim, image.proposal_embedding.shape[1], 0 if image.image_embedding is None else len(image.image_embedding)
        )
        with_base, with_images = (
            with_base or image.base_embedding is not None,
            with_images or image.image_embedding is not None,
        )
        hashes[Level.INSTANCE].update(_instance_rows(image, dim).tobytes())
        hashes[Level.IMAGE].update(b"" if image.image_embedding is None else image.image_embedding.tobytes())
        for row in () if image.proposal_text is None else image.proposal_text.astype(np.float16):
            hashes[Level.PSEUDO_LABEL].update(texts.setdefault(row.tobytes(), len(texts)).to_bytes(8, "little"))
    for image_id, reason in list(failed.items())[:20]:
        log(f"left out: image {image_id}: {reason}")
    if len(failed) == len(split.images):
        raise HdovdError(
            f"nothing in {config.folder} fits {split.annotations}: all {len(failed)} images were left out, first of "
            f"all image {next(iter(failed))}: {next(iter(failed.values()))}"
        )
    if failed:
        log(f"{counted(len(failed), 'image has', 'images have')} no embeddings; hdovd cache info lists them")
    if not with_base:
        log(
            f"{config.format} has no embeddings of base boxes: hdovd train will refuse the instance level for the "
            f"boxes that it lacks"
        )
    images = (
        split.images
        if with_base
        else [replace(i, boxes=i.boxes[:0], annotation_ids=i.annotation_ids[:0]) for i in split.images]
    )
    if dropped:
        log(f"skipped proposals without area in {counted(len(dropped), 'image')} ({shorten(list(dropped))})")
    return _Survey(
        box_table(images, proposals),
        failed,
        dropped,
        texts,
        {level: h.hexdigest() for level, h in hashes.items()},
        dim,
        ProposalTable.of(proposals).identity(),
        with_base,
        with_images,
    )


def _instance_rows(image: ForeignImage, dim: int) -> np.ndarray:
    """Base boxes, then proposals, as the box table has them: (n, D) float32."""
    pieces = [rows for rows in (image.base_embedding, image.proposal_embedding) if rows is not None and len(rows)]
    return np.concatenate(pieces) if pieces else np.zeros((0, dim), np.float32)


def _begin(config: ImportConfig, found: _Survey, catalog: Catalog) -> dict[Level, ProductWriter]:
    table = found.table
    origin: KeyInputs = {
        "schema_version": SCHEMA_VERSION,
        "clip": {"origin": UNKNOWN_ORIGIN, "format": str(config.format)},
    }
    images, boxes = table.image_inputs(), table.box_inputs()
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {
            "schema_version": SCHEMA_VERSION,
            "images": images,
            "base_boxes": table.base_box_inputs(),
            "proposals": table.proposal_inputs(),
            "boxes": boxes,
        },
        Level.INSTANCE: {**origin, "content": found.content[Level.INSTANCE], "images": images, "boxes": boxes},
    }
    names = [f"text {row}" for row in range(len(found.texts))]
    if found.with_images:
        inputs[Level.IMAGE] = {**origin, "content": found.content[Level.IMAGE], "images": images}
    if names:
        texts = hashlib.sha256(b"".join(found.texts)).hexdigest()
        inputs[Level.NOUN] = {**origin, "content": texts, "names": {"count": len(names)}}
        inputs[Level.PSEUDO_LABEL] = {
            "schema_version": SCHEMA_VERSION,
            "instance": key_of(inputs[Level.INSTANCE]),
            "noun": key_of(inputs[Level.NOUN]),
            "content": found.content[Level.PSEUDO_LABEL],
        }
    rows = {Level.IMAGE: len(table.image_id), Level.NOUN: len(names)}
    writers = {}
    for level, level_inputs in inputs.items():
        writers[level] = ProductWriter.begin(
            catalog.folder,
            level,
            level_inputs,
            rows=rows.get(level, len(table.box)),
            part_rows=IMAGE_PART_ROWS if level is Level.IMAGE else PART_ROWS,
            dim=0 if level in (Level.BOXES, Level.PSEUDO_LABEL) else found.dim,
            tables=table.tables(level),
            names=names if level is Level.NOUN else None,
            made_with={"clip": UNKNOWN_ORIGIN, "format": str(config.format)},
        )
    return writers


class _Parts:
    """Collects the rows of one product and writes every part when it is full."""

    def __init__(self, writer: ProductWriter) -> None:
        self._writer, self._part, self._rows = writer, 0, 0
        self._pending: list[dict[str, np.ndarray]] = []
        self._failed: dict[int, str] = {}

    def add(self, rows: dict[str, np.ndarray], failed: dict[int, str]) -> None:
        self._failed |= failed
        self._pending.append(rows)
        self._rows += len(next(iter(rows.values())))
        product = self._writer.product
        while self._part < product.parts and self._rows >= (wanted := np.diff(product.rows_of(self._part))[0]):
            arrays = {name: np.concatenate([piece[name] for piece in self._pending]) for name in rows}
            if not product.is_finished(self._part):
                self._writer.write_part(
                    self._part, {name: values[:wanted] for name, values in arrays.items()}, self._failed
                )
            self._pending = [{name: values[wanted:] for name, values in arrays.items()}]
            self._rows -= wanted
            self._part += 1
            self._failed = failed if self._rows else {}  # an image that reaches into the next part


def _write_rows(config: ImportConfig, split: Split, found: _Survey, writers: dict[Level, ProductWriter]) -> None:
    """The second reading."""
    parts: dict[Level, _Parts] = {level: _Parts(writer) for level, writer in writers.items() if writer.product.parts}
    nouns = np.zeros((0, found.dim), np.float32)
    if Level.NOUN in writers:
        stored = np.frombuffer(b"".join(found.texts), np.float16).reshape(-1, found.dim)
        nouns = stored.astype(np.float32)
        parts[Level.NOUN].add({"embedding": stored}, {})
    for number, image in enumerate(progress(_read(config, split), "writing", "image", total=len(split.images))):
        start, stop = int(found.table.offset[number]), int(found.table.offset[number + 1])
        failed = {} if image.reason is None else {image.image_id: image.reason}
        rows = np.zeros((stop - start, found.dim), np.float32) if failed else _instance_rows(image, found.dim)
        parts[Level.INSTANCE].add({"embedding": rows}, failed)
        if Level.IMAGE in parts:
            whole = image.image_embedding
            why = failed or ({image.image_id: "no embedding of the image was published"} if whole is None else {})
            parts[Level.IMAGE].add(
                {"embedding": np.zeros((1, found.dim), np.float32) if whole is None else whole[None]}, why
            )
        if Level.PSEUDO_LABEL in parts:
            parts[Level.PSEUDO_LABEL].add(
                _pseudo_labels(image, rows, found.table.source[start:stop], found.texts, nouns), {}
            )


def _pseudo_labels(
    image: ForeignImage, rows: np.ndarray, source: np.ndarray, texts: dict[bytes, int], nouns: np.ndarray
) -> dict[str, Any]:
    noun, cosine = np.full(len(rows), -1, np.int32), np.zeros(len(rows), np.float32)
    if image.proposal_text is not None and len(image.proposal_text):
        extra = source == Source.PROPOSAL
        noun[extra] = [texts[row.tobytes()] for row in image.proposal_text.astype(np.float16)]
        cosine[extra] = (rows[extra] * nouns[noun[extra]]).sum(axis=1)
    return {"noun": noun, "noun_cosine": cosine}


def _write_classes(
    config: ImportConfig, names: tuple[str, ...], catalog: Catalog, dim: int, log: Callable[[str], None]
) -> ProductWriter:
    """The class level, by the CLIP that the user says it was."""
    from hdovd.pipelines.teachers.openclip import load_clip

    assert config.clip is not None
    clip = load_clip(
        config.clip, config.pretrained, device=config.device, precision=config.precision, activation=config.activation
    )
    for note in clip.notes:
        log(note)
    if clip.dim != dim:
        raise HdovdError(
            f"--clip {config.clip} embeds in {clip.dim} values, {config.folder} holds {dim}: it is not the CLIP that "
            f"was used"
        )
    inputs: KeyInputs = {
        "schema_version": SCHEMA_VERSION,
        "clip": {"origin": UNKNOWN_ORIGIN, "format": str(config.format)},
        "text_clip": clip.identity,
        "templates": list(config.templates),
        "names": list(names),
        "tokens": clip.hash_prompts(names, config.templates),
    }
    writer = ProductWriter.begin(
        catalog.folder,
        Level.CLASS,
        inputs,
        rows=len(names),
        part_rows=CHUNK_ROWS,
        dim=dim,
        names=names,
        made_with=clip.made_with,
    )
    for part in writer.product.missing():
        start, stop = writer.product.rows_of(part)
        writer.write_part(part, {"embedding": clip.embed_names(names[start:stop], config.templates)})
    return writer
