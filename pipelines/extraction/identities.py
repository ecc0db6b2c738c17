"""What determines each level of a cache, computed alike by extraction and by training: all images and boxes as one
table, what stands for each picture in it, what the rows of texts are made from, and what made the levels.

The table is the row order of every level that has a row a box or an image. N images, M boxes: image by image in file
order, base boxes before proposals, proposals best first.

What stands for a picture (`image_hash`) tells two pictures of one name apart: a hash of file name and size, and of the
content where the cache has another picture of that name. Files of the place, size and time that the cache knows are not
read; others are hashed.

Rows of the class and noun levels (K names, D embedding size) are made from names, several names of one class, or a file
of class embeddings. The text embedding of the word "object", by which AdaMixer knows objects, is kept in the set's own
file: as a level of the cache, or a row among the classes, one row would give every cache that is there other keys.

`data_inputs` holds what the training set decides; training asks the cache for exactly that.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdovd.cache import SCHEMA_VERSION, TABLE_ARRAYS, FeatureSet, KeyInputs, Level, Product, Source, hash_tables, key_of
from hdovd.cache.identity import table_inputs
from hdovd.cache.picture_files import FILE, PictureFile, known_files, place_of
from hdovd.cache.reader import FeatureCache
from hdovd.core import HdovdError, Unfit, counted, log, require_readable, shorten
from hdovd.core.text_files import checked_name, read_toml, shown
from hdovd.data import Exif, ImageBoxes, Split
from hdovd.modeling.base import Detector
from hdovd.pipelines.common.tensors import floats, load_pth, load_tensors
from hdovd.pipelines.embedding.embedders import Embedder
from hdovd.pipelines.extraction.config import ONE_NOUN, LabelRule
from hdovd.pipelines.nouns.allowed import Nouns
from hdovd.pipelines.proposal_files.file import NO_PROPOSALS, Proposals
from hdovd.pipelines.teachers.base import Name, Teacher, said

READERS = 8  # threads that hash


@dataclass(frozen=True, slots=True)
class BoxTable:
    """image_id (N,) i64, image_hash (N,) u64 (see `picture_hashes`), image_size (N, 2) i32, offset (N+1,) i64; box (M,
    4) f32 xyxy pixels, source (M,) u8, score (M,) f32, annotation_id (M,) i64.
    """

    image_id: np.ndarray
    image_hash: np.ndarray
    image_size: np.ndarray
    offset: np.ndarray
    box: np.ndarray
    source: np.ndarray
    score: np.ndarray
    annotation_id: np.ndarray

    def tables(self, level: Level) -> dict[str, np.ndarray]:
        """The tables that a level's product holds."""
        return {name: getattr(self, name) for name in TABLE_ARRAYS[level]}

    def inputs(self) -> KeyInputs:
        """What the identities of a cache's levels say of `images`, `boxes`, `base_boxes` and `proposals`."""
        return table_inputs(Level.BOXES, self.tables(Level.BOXES))

    def images_of(self, start: int, stop: int) -> range:
        """The images that have rows between `start` and `stop`."""
        if stop <= start:
            return range(0)
        first = int(np.searchsorted(self.offset, start, "right")) - 1
        return range(first, int(np.searchsorted(self.offset, stop, "left")))


def box_table(
    images: Sequence[ImageBoxes], proposals: dict[int, Proposals], hashes: np.ndarray | None = None
) -> BoxTable:
    """The table of all base boxes and proposals. hashes: None for those of images that no cache has another picture
    of."""
    found = [proposals.get(i.id, NO_PROPOSALS) for i in images]
    counts = np.array([(len(i.boxes), len(p.boxes)) for i, p in zip(images, found, strict=True)], np.int64).reshape(
        -1, 2
    )
    source = np.repeat(np.tile(np.array([Source.BASE_BOX, Source.PROPOSAL], np.uint8), len(images)), counts.reshape(-1))
    base, extra = source == Source.BASE_BOX, source == Source.PROPOSAL
    box, score, annotation_id = (
        np.zeros((len(source), 4), np.float32),
        np.ones(len(source), np.float32),
        np.full(len(source), -1, np.int64),
    )
    if len(images):
        box[base], box[extra] = np.concatenate([i.boxes for i in images]), np.concatenate([p.boxes for p in found])
        score[extra] = np.concatenate([p.scores for p in found])
        annotation_id[base] = np.concatenate([i.annotation_ids for i in images])
    return BoxTable(
        image_id=np.array([i.id for i in images], np.int64),
        image_hash=np.array([image_hash(i) for i in images], np.uint64) if hashes is None else hashes,
        image_size=np.array([(i.width, i.height) for i in images], np.int32).reshape(-1, 2),
        offset=np.concatenate([[0], np.cumsum(counts.sum(axis=1))]).astype(np.int64),
        box=box,
        source=source,
        score=score,
        annotation_id=annotation_id,
    )


def match_rows(wanted: Sequence[np.ndarray], have: Sequence[np.ndarray]) -> np.ndarray:
    """For every row of the columns `wanted` the row of the columns `have` with the same bytes, or -1: (rows,) int64."""
    if not len(wanted[0]) or not len(have[0]):
        return np.full(len(wanted[0]), -1, np.int64)
    a, b = _row_bytes(wanted), _row_bytes(have)
    order = np.argsort(b, kind="stable")
    found = order[np.minimum(np.searchsorted(b[order], a), len(b) - 1)]
    return np.where(b[found] == a, found, -1)


def _row_bytes(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Columns (n, ...) of 4 or 8 bytes a value as (n,) bytes."""
    rows = np.concatenate([np.ascontiguousarray(c).view(np.uint32).reshape(len(c), -1) for c in columns], axis=1)
    return rows.view(f"V{4 * rows.shape[1]}")[:, 0]


@dataclass(frozen=True, slots=True)
class PictureHashes:
    """Of the N images of a split: `values` (N,) uint64; `files` (N,) of `FILE`, as the cache knows them (`size` -1
    where it does not).

    `changed`: ids of images whose file is not the one that the cache saw. `later`: whether files were found again in
    another place, or of another time.
    """

    values: np.ndarray
    files: np.ndarray
    changed: list[int]
    later: bool

    def require_unchanged(self, where: str) -> None:
        """Raises HdovdError if a picture has changed since it was embedded."""
        if self.changed:
            raise HdovdError(
                f"{counted(len(self.changed), 'picture is', 'pictures are')} not what {where} was made from (images "
                f"{shorten([*self.changed])}): another content has the same id and size. The same hdovd extract-clip "
                f"command embeds what changed, and keeps the rest"
            )


def image_hash(image: ImageBoxes, content: bytes = b"") -> int:
    """Of name and size, and `content` if that is given: 64 bits."""
    text = f"{image.file_name}\0{image.width}x{image.height}".encode()
    return int.from_bytes(hashlib.sha256(text + (b"\0" + content if content else b"")).digest()[:8], "little")


def picture_hashes(split: Split, products: Iterable[Product]) -> PictureHashes:
    """What stands for the pictures of a split, by what `products` know of them."""
    with_pictures = (product for product in products if product.level in (Level.IMAGE, Level.INSTANCE))
    known = np.concatenate([np.zeros(0, FILE), *map(known_files, with_pictures)])
    known = known[np.argsort(known["image_id"], kind="stable")]
    files = np.zeros(len(split.images), FILE)
    files["image_id"], files["size"] = [image.id for image in split.images], -1
    files["label"] = np.array([image_hash(image) for image in split.images], np.uint64)
    files["annotated"] = np.array([(image.width, image.height) for image in split.images], np.int32).reshape(-1, 2)
    first, last = (np.searchsorted(known["image_id"], files["image_id"], side) for side in ("left", "right"))

    def settle(n: int) -> str:
        """Enter what is known of an image's file: it is the same; or found again later, in another place or of another
        time; or changed, if the cache has other pictures of that id and size and not this one.
        """
        image, mine = split.images[n], known[first[n] : last[n]]
        mine = mine[(mine["annotated"] == files[n]["annotated"]).all(axis=1)]
        path = split.path(image)
        try:
            stat = path.stat()
            same = mine[
                (mine["size"] == stat.st_size)
                & (mine["modified"] == stat.st_mtime_ns)
                & (mine["place"] == place_of(path))
            ]
            if len(same):
                files[n] = same[0]
            if len(same) or not len(mine) or not path.is_file():  # a pipe would be waited for
                return "same"
            file = PictureFile.of(path, stat, path.read_bytes())
        except OSError:  # as of what is no file: who needs its pixels says so
            return "same"
        label = int(files[n]["label"])
        again = mine[mine["content"] == file.content]
        if len(again):
            best = again[int(np.argmax(again["label"] == label))]
            files[n] = (image.id, best["annotated"], best["label"], *file[:-1], best["either"])
            return "later"
        if (mine["label"] == label).any():
            files[n]["label"] = image_hash(image, file.content)
        return "changed"

    numbers = np.flatnonzero(first < last).tolist()
    with ThreadPoolExecutor(READERS) as pool:
        found = dict(zip(numbers, pool.map(settle, numbers), strict=True))
    return PictureHashes(
        files["label"].copy(),
        files,
        changed=[split.images[n].id for n, what in found.items() if what == "changed"],
        later="later" in found.values(),
    )


def files_of(read: dict[int, PictureFile], known: np.ndarray, numbers: Iterable[int]) -> np.ndarray:
    """(n,) of `FILE`: of some images of a split what was read now, else what is known; those of which nothing is are
    left out.
    """
    files = known[[*numbers]]
    for n, row in enumerate(files):
        if (file := read.get(int(row["image_id"]))) is not None:
            files[n] = (row["image_id"], row["annotated"], row["label"], *file)
    return files[files["size"] >= 0]


# --- texts ---


@dataclass(frozen=True, slots=True, eq=False)
class TextRows:
    """Names in row order. `synonyms`: all the names of a row, its own among them or not, where it has others than its
    own.

    `embeddings`: (K, D) float32 as a file has them, instead of CLIP's text embeddings of the names.
    """

    names: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    embeddings: np.ndarray | None = None

    @property
    def texts(self) -> list[Name]:
        """What goes into each row, (K)."""
        return [said(self.synonyms.get(name, name)) for name in self.names]

    def inputs(self, clip: Teacher, templates: Sequence[str]) -> KeyInputs:
        """What determines the rows. Rows of a file are taken to be of the CLIP that they are used with: no file says
        it.
        """
        if self.embeddings is not None:
            return {
                "clip": clip.identity,
                "names": list(self.names),
                "class_embeddings": hash_tables([self.embeddings]),
            }
        return {
            "clip": clip.identity,
            "templates": list(templates),
            "names": list(self.names),
            "tokens": clip.hash_prompts(self.texts, templates),
            **({"synonyms": {name: list(names) for name, names in self.synonyms.items()}} if self.synonyms else {}),
        }

    def embed(self, clip: Teacher, templates: Sequence[str], start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of K: (n, D) float32, L2-normalised."""
        if self.embeddings is None:
            return clip.embed_names(self.texts[start:stop], templates)
        rows = self.embeddings[start:stop].astype(np.float64)  # the norms of float32 numbers do not overflow there
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def read_synonyms(file: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """All names of the classes that `file` lists: TOML, as protocols are, since JSON takes a class that is listed twice
    without a word.

        couch = ["couch", "sofa"]
        "hot dog" = ["hot dog", "sausage in a bun"]

    A class that has its own name alone is left out. Raises HdovdError.
    """
    where, example = f"--synonyms {file}", 'couch = ["couch", "sofa"], one class a line, quoted where it has spaces'
    tree = read_toml(file, "--synonyms", f"TOML such as {example}")
    if unknown := [name for name in tree if name not in names]:
        near = {name: get_close_matches(name, names, 1, cutoff=0.3) for name in unknown}
        raise HdovdError(
            f"{where}: no classes of the protocol: "
            + shorten([repr(name) + (f" (the nearest is {n[0]!r})" if n else "") for name, n in near.items()])
            + f". Each key is a class, its value all names of it: {example}"
        )
    for name, found in tree.items():
        if not isinstance(found, list) or not found:
            raise HdovdError(f"{where}: {name} must be a list of names, not {shown(found)}")
        for other in found:
            checked_name(other, f"{where}: {name} must be a list of names: one")
        if twice := sorted({n for n in found if found.count(n) > 1}):
            raise HdovdError(f"{where}: {name} lists {shorten(list(twice))} twice")
    return {name: tuple(tree[name]) for name in names if name in tree and tree[name] != [name]}


def read_class_embeddings(
    file: Path, names: Sequence[str], *, each: str = "class of the protocol, base then novel"
) -> np.ndarray:
    """(K, D) float32, the rows of a .npy, .safetensors, .pt or .pth file in the order of `names`, as they are. `each`:
    what has a row.

    Raises HdovdError if they do not fit, or cannot be normalised.
    """
    where = f"--class-embeddings {file}"
    try:
        require_readable(file)
        rows = read_rows(file)
    except HdovdError as error:
        raise HdovdError(f"--class-embeddings: {error}") from error
    if rows.ndim != 2 or len(rows) != len(names) or not rows.shape[1]:
        raise HdovdError(
            f"{where} has shape {rows.shape}, expected ({len(names)}, D): a row for each {each}, "
            f"{names[0]} first and {names[-1]} last"
        )
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if bad := np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist():
        raise HdovdError(
            f"{where}: {len(bad)} of {len(rows)} rows cannot be normalised, they are zero or not finite: "
            + shorten([f"{row} ({names[row]})" for row in bad])
        )
    return rows


def read_rows(file: Path) -> np.ndarray:
    """The one array of floating-point numbers that a file holds, as float32. Raises Unfit."""
    if file.suffix == ".npy":
        try:
            array = np.load(
                file, mmap_mode="r", allow_pickle=False
            )  # mapped: a file too short for its shape is an error
            found: Any = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except (ValueError, OSError, EOFError, TypeError) as error:
            raise Unfit(f"{file} is no .npy file of numbers, or damaged ({error})") from error
    elif file.suffix == ".safetensors":
        found = load_tensors(file)
    elif file.suffix in (".pt", ".pth"):
        found = load_pth(file)
    else:
        raise Unfit(f"{file}: expected .npy, .safetensors, .pt or .pth, not {file.suffix or 'a name without ending'}")
    if isinstance(found, dict):
        if len(found) != 1:
            raise Unfit(
                f"{file} holds {shorten([_described(name, value) for name, value in found.items()]) or 'nothing'}: "
                "expected one tensor, save the one that is meant alone"
            )
        (found,) = found.values()
    return floats(found, str(file))


def _described(name: Any, value: Any) -> str:
    return f"{name} {tuple(value.shape)}" if hasattr(value, "shape") else f"{name} (a {type(value).__name__})"


WORD = "object"


def object_text_entry(clip: Teacher, templates: Sequence[str], sets: Iterable[FeatureSet]) -> dict[str, Any]:
    """What a set keeps: the key of what made the row, and the row as float16 values; that of a set of the cache which
    has it.
    """
    rows = TextRows((WORD,))
    key = key_of(rows.inputs(clip, templates))
    for features in sets:
        if features.object_text.get("key") == key and _row_of(features, clip.dim) is not None:
            return dict(features.object_text)
    return {"key": key, "embedding": rows.embed(clip, templates, 0, 1)[0].astype(np.float16).tolist()}


def _row_of(features: FeatureSet, dim: int) -> Tensor | None:
    """(D,) float32 as a set holds it; None if that is no embedding."""
    try:
        row = torch.tensor(features.object_text["embedding"], dtype=torch.float32)
    except (KeyError, TypeError, ValueError):
        return None
    return row if row.shape == (dim,) and row.isfinite().all() and row.any() else None


def object_text_of(features: FeatureSet, dim: int, where: str) -> Tensor | None:
    """(D,) float32, normalised; None if the set has none. Raises HdovdError, naming `where`, if it is damaged."""
    row = _row_of(features, dim)
    if row is None and features.object_text:
        raise HdovdError(
            f'{where}: the text embedding of "{WORD}" is damaged (expected {dim} finite values): delete object_text from '  # noqa: E501
            f"the set's file and run its extract-clip again"
        )
    return None if row is None else F.normalize(row, dim=0)


def give_object_text(model: Detector, row: Tensor | None, where: str) -> dict[str, str]:
    """Tell a detector what an object is, unless it knows or has no use for it; returns what the run's record says of
    it.
    """
    if model.knows_objects:
        return {}
    if row is None:
        log(
            f'{where} has no text embedding of "{WORD}": the hdovd extract-clip command that made a Zarr cache adds it, and extracts '  # noqa: E501
            "nothing else again; tar shards get it by hdovd cache export of that cache"
        )
        return {"object_text": "mean of the base classes"}
    model.set_object_text(row)
    log(f'the text embedding of "{WORD}" is that of {where}')
    return {"object_text": "cache"}


# --- levels ---


def data_inputs(images: Sequence[ImageBoxes], hashes: np.ndarray | None = None) -> dict[Level, KeyInputs]:
    """The part of the identities that follows from the training images and base boxes. hashes: as `box_table`
    takes them.
    """
    found = box_table(images, {}, hashes).inputs()
    listed = {"images": found["images"]}
    return {Level.IMAGE: listed, Level.INSTANCE: listed, Level.BOXES: listed | {"base_boxes": found["base_boxes"]}}


def inputs_of(split: Split, cache: FeatureCache) -> dict[Level, KeyInputs]:
    """`data_inputs` of a split, by what a set knows of its pictures. Raises HdovdError if one has changed since."""
    hashes = picture_hashes(split, cache.products())
    hashes.require_unchanged(cache.url)
    return data_inputs(split.images, hashes.values)


def exif_of(inputs: Mapping[Level, KeyInputs]) -> Exif | None:
    """How the pictures of a set were read, by what made its levels; None for sets that do not say it: as stored,
    whatever EXIF says.
    """
    found = {inputs[level].get("exif") for level in (Level.IMAGE, Level.INSTANCE) if level in inputs}
    return next((exif for exif in Exif if exif in found), None)


def require_exif(inputs: Mapping[Level, KeyInputs], wanted: str, where: str) -> None:
    """Raises HdovdError if the pictures of a set were read in another way."""
    exif = exif_of(inputs)
    if exif not in (None, wanted):
        raise HdovdError(
            f'{where} was made with --exif {exif}, and input.exif is "{wanted}": boxes and embeddings would be of pictures '  # noqa: E501
            f"that are turned in different ways. Train with --set input.exif={exif}, or extract with --exif {wanted}"
        )


def offered_input(nouns: Nouns, image_ids: Sequence[int]) -> str:
    """What the identity of labels says of the nouns that images offer."""
    if nouns.by_image is None:
        return "all"
    return hash_tables(np.array(nouns.offered(image_id), np.int64) for image_id in image_ids)


def level_inputs(
    clip: Teacher,
    table: BoxTable,
    nouns: Nouns | None,
    classes: TextRows,
    templates: Sequence[str],
    embedders: Mapping[Level, Embedder],
    rule: LabelRule = ONE_NOUN,
    verdicts: KeyInputs | None = None,
) -> dict[Level, KeyInputs]:
    """All inputs of every level that an extraction writes: what determines its bytes, and nothing else. verdicts: what
    the identity of labels says of them.
    """
    schema: KeyInputs = {"schema_version": SCHEMA_VERSION}
    given, exif = table.inputs(), str(embedders[Level.IMAGE].pictures.exif)
    pictures = {**schema, "clip": clip.identity, "images": given["images"], "exif": exif}
    inputs: dict[Level, KeyInputs] = {
        Level.BOXES: {**schema, **given},
        Level.CLASS: {**schema, **classes.inputs(clip, templates)},
        Level.IMAGE: {**pictures, **embedders[Level.IMAGE].inputs()},
        Level.INSTANCE: {**pictures, **embedders[Level.INSTANCE].inputs(), "boxes": given["boxes"]},
    }
    if nouns is not None:
        inputs[Level.NOUN] = {**schema, **TextRows(nouns.vocabulary).inputs(clip, templates)}
        inputs[Level.PSEUDO_LABEL] = {
            **schema,
            "instance": key_of(inputs[Level.INSTANCE]),
            "noun": key_of(inputs[Level.NOUN]),
            "offered": offered_input(nouns, table.image_id.tolist()),
            "sources": hash_tables([table.source]),
            **rule.inputs(),
            **({} if verdicts is None else {"verdicts": verdicts}),
        }
    return inputs
