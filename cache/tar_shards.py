"""The tar form of a set of features: shards of whole samples, which a trainer streams from first to last.

A folder, or a prefix of an object store:

    meta.safetensors   what is no single image's: see `TarMeta`
    000000.tar, ...    samples, one an image, in the order of the cache
    000000.json, ...   size and sha256 of the shard of that number, and crc32 of the files of each sample one after
                       another; written after it: what has one is whole

A sample's key is its image id in 12 digits. n rows of boxes (base boxes before proposals, proposals best first), D
embedding size:

    KEY.jpg (or what else the picture is)   the file as it was; none if it could not be read when the cache was made
    KEY.json                                id, file_name, width, height, picture (its extension), annotations, failed
                                            (why, if so)
    KEY.boxes.npy (n, 4) f32 xyxy pixels    KEY.source.npy (n,) u8            KEY.score.npy (n,) f32
    KEY.annotation_id.npy (n,) i64          KEY.instance.npy (n, D) f16       KEY.image.npy (D,) f16
    KEY.noun.npy (n,) i32                   KEY.noun_cosine.npy (n,) f32

Written by `hdovd cache export` and `hdovd extract-clip --store webdataset`.

The `webdataset` package reads it on its own:

    import webdataset

    shards = webdataset.WebDataset("shards/{000000..000002}.tar", shardshuffle=False).decode("pil")
    for sample in shards:
        print(sample["json"]["file_name"], sample["jpg"].size, sample["boxes.npy"].shape, sample["instance.npy"].shape)
"""

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from safetensors.numpy import load, save

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, FeatureSet, is_set_name
from hdovd.cache.identity import KeyInputs, differences, hash_tables, hash_texts, key_of, require_seal, sealed
from hdovd.cache.product import Product, parse_record, require_sizes
from hdovd.cache.reader import require_unit
from hdovd.cache.schema import ROW_ARRAYS, SCHEMA_VERSION, TABLE_ARRAYS, TAR_META, TOP_ARRAYS, Level
from hdovd.cache.store import Folder, naming_damage, open_folder
from hdovd.core import HdovdError, shorten

TEXTS = (Level.CLASS, Level.NOUN)  # levels whose rows are no image's: they stand here, whole
TABLES_HERE = ("image_id", "image_hash", "image_size", "offset")  # of the boxes level


@dataclass(frozen=True, slots=True)
class TarMeta:
    """N images, D embedding size.

    `name` and `features`: the set as the cache has it. `samples`: of a full shard. `products`: of every level
    "attributes" and "records" (of its parts, by number), as the cache has them. `about`: what the exporter adds, JSON
    values. `tensors`: TABLES_HERE, and the embeddings (K, D) f16 of the levels in TEXTS by level.
    """

    name: str
    features: FeatureSet
    samples: int
    products: dict[Level, dict[str, dict[str, Any]]]
    about: dict[str, Any]
    tensors: dict[str, np.ndarray]

    @classmethod
    def of(cls, catalog: Catalog, name: str, samples: int, about: dict[str, Any]) -> "TarMeta":
        """The description of a set whose products are whole."""
        features = catalog.sets()[name]
        found = {level: Product(catalog.folder, level, key) for level, key in features.levels.items()}
        products = {
            level: {
                "attributes": product.attributes,
                "records": {str(part): r for part, r in product.records().items()},
            }
            for level, product in found.items()
        }
        tensors = {
            **{table: found[Level.BOXES].table(table) for table in TABLES_HERE},
            **{str(level): found[level].table("embedding") for level in TEXTS if level in found},
        }
        return cls(name, features, samples, products, about, tensors)

    def to_bytes(self) -> bytes:
        tree = sealed(
            {
                "schema_version": SCHEMA_VERSION,
                **self.identity(),
                "name": self.name,
                "set": self.features.to_tree(),
                "tensors": _hash(self.tensors),
            }
        )  # in one text: safetensors writes several in any order
        return save({name: np.ascontiguousarray(t) for name, t in self.tensors.items()}, {"hdovd": json.dumps(tree)})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "TarMeta":
        """Raises HdovdError, naming `where`, if it is damaged or of another schema."""
        with naming_damage(where, "export the cache again"):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            tree, tensors = json.loads(header["__metadata__"]["hdovd"]), load(data)
            require_seal(tree)
            if tree.get("tensors", found := _hash(tensors)) != found:  # older versions have no checksums
                raise ValueError("its tensors have another checksum")
            if tree["schema_version"] != SCHEMA_VERSION:
                raise HdovdError(
                    f"{where} has cache schema {tree['schema_version']}, this hdovd reads {SCHEMA_VERSION}: export the "
                    f"cache again"
                )
            products = {Level(level): product for level, product in tree["products"].items()}
            meta = cls(
                tree["name"], FeatureSet.from_tree(tree["set"]), tree["samples"], products, tree["about"], tensors
            )
            meta._check()
        return meta

    def _check(self) -> None:
        """Raises ValueError, KeyError, TypeError or AttributeError for what cannot be, or does not go together."""
        known = is_set_name(self.name) and type(self.samples) is int and self.samples >= 1
        if not known or self.products.keys() != self.features.levels.keys():
            raise ValueError(
                f"set {str(self.name)[:80]!r} of {repr(self.samples)[:40]} images a shard, levels "
                f"{', '.join(self.products)}; "
                f"expected a name of {SET_NAME_TOLD}; one image at least; levels {', '.join(self.features.levels)}"
            )
        for level, product in self.products.items():
            require_sizes(product["attributes"])
            for record in product["records"].values():
                parse_record(json.dumps(record).encode())
            if key_of(product["attributes"]["key_inputs"]) != self.features.levels[level]:
                raise ValueError(f"the key of {level} does not follow from its key_inputs")
        expected = {
            **{name: TABLE_ARRAYS[Level.BOXES][name] for name in TABLES_HERE},
            **{str(level): "float16" for level in TEXTS if level in self.products},
        }
        found = {name: str(tensor.dtype) for name, tensor in self.tensors.items()}
        images, offset = len(self.tensors["image_id"]), self.tensors["offset"]
        if found != expected or offset.shape != (images + 1,) or offset[0] != 0 or (np.diff(offset) < 0).any():
            raise ValueError(f"tensors {found}, expected {expected} that fit together")
        wanted = {
            level: len(self.tensors[level]) if level in TEXTS else images if level is Level.IMAGE else int(offset[-1])
            for level in self.products
        }
        if wrong := [
            f"{level} {self.attributes(level)['rows']}, expected {rows}"
            for level, rows in wanted.items()
            if self.attributes(level)["rows"] != rows
        ]:
            raise ValueError(f"rows of {', '.join(wrong)}")

    def check_rows(self, where: str) -> None:
        """Raises HdovdError if the embeddings that stand here are not finite, or not of norm one."""
        for level in TEXTS:
            if level in self.products:
                require_unit(self.tensors[level], f"{where}: {level}")

    def identity(self) -> dict[str, Any]:
        """What decides on the bytes of the shards."""
        return {
            "samples": self.samples,
            "products": {str(level): product for level, product in self.products.items()},
            "about": self.about,
        }

    @property
    def images(self) -> int:
        return len(self.tensors["image_id"])

    @property
    def shards(self) -> int:
        return -(-self.images // self.samples)

    def places_of(self, shard: int) -> range:
        """The images of a shard, by their place in the list of all."""
        return range(shard * self.samples, min((shard + 1) * self.samples, self.images))

    def attributes(self, level: Level) -> dict[str, Any]:
        return self.products[level]["attributes"]

    def key_inputs(self) -> dict[Level, KeyInputs]:
        return {level: self.attributes(level)["key_inputs"] for level in self.products}

    @property
    def dim(self) -> int:
        """D, the size of every embedding."""
        return max(int(self.attributes(level)["dim"]) for level in self.products if level is not Level.PSEUDO_LABEL)

    @property
    def top(self) -> int:
        """How many nouns a pseudo label is made of; 0 for one, or no labels."""
        return int(self.attributes(Level.PSEUDO_LABEL)["dim"]) if Level.PSEUDO_LABEL in self.products else 0

    def failed_parts(self, level: Level) -> dict[int, dict[int, str]]:
        """Of every part of a level, why images could not be read, by image id."""
        return {
            int(part): {int(image): reason for image, reason in record["failed"].items()}
            for part, record in self.products[level]["records"].items()
            if part.isdigit()
        }

    def failed(self) -> dict[int, str]:
        """Images that lack embeddings at the image or the instance level, with the reason."""
        return {
            image: reason
            for level in (Level.IMAGE, Level.INSTANCE)
            if level in self.products
            for failed in self.failed_parts(level).values()
            for image, reason in failed.items()
        }


def _hash(tensors: dict[str, np.ndarray]) -> str:
    return hash_texts([*sorted(tensors), hash_tables(tensors[name] for name in sorted(tensors))])


MEMBERS = {
    "boxes": (Level.BOXES, "box"),
    "source": (Level.BOXES, "source"),
    "score": (Level.BOXES, "score"),
    "annotation_id": (Level.BOXES, "annotation_id"),
    "instance": (Level.INSTANCE, "embedding"),
    "image": (Level.IMAGE, "embedding"),
    "noun": (Level.PSEUDO_LABEL, "noun"),
    "noun_cosine": (Level.PSEUDO_LABEL, "noun_cosine"),
    "top_noun": (Level.PSEUDO_LABEL, "top_noun"),
    "top_weight": (Level.PSEUDO_LABEL, "top_weight"),
}
DTYPES = {
    name: np.dtype(
        (TABLE_ARRAYS[level] | {a: dtype for a, (dtype, _) in (ROW_ARRAYS[level] | TOP_ARRAYS).items()})[array]
    )
    for name, (level, array) in MEMBERS.items()
}
RawSample = dict[str, Any]  # a sample as webdataset groups it: bytes by extension, and "__key__"


@dataclass(frozen=True, slots=True)
class TarSample:
    """`about`: its .json. `picture`: its file as it was, or None. `arrays`: by name in MEMBERS, of the levels that
    there are.
    """

    image_id: int
    about: dict[str, Any]
    picture: bytes | None
    arrays: dict[str, np.ndarray]

    def files(self) -> dict[str, bytes]:
        """Its files by extension, in their order."""
        files = {} if self.picture is None else {_extension(self.about["file_name"]): self.picture}
        files["json"] = json.dumps({**self.about, "picture": next(iter(files), None)}).encode()
        for name in MEMBERS:
            if name in self.arrays:
                file, array = io.BytesIO(), np.ascontiguousarray(self.arrays[name], DTYPES[name])
                np.lib.format.write_array(file, array, (1, 0), allow_pickle=False)
                files[f"{name}.npy"] = file.getvalue()
        return files


def _extension(file_name: str) -> str:
    """In lower case, as webdataset would have it."""
    extension = Path(file_name).suffix[1:].lower()
    return "picture" if not extension or extension in ("json", "npy") else extension


def _array(data: bytes, name: str, rows: int, dim: int, top: int) -> np.ndarray:
    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    wide = {
        "boxes": (rows, 4),
        "instance": (rows, dim),
        "image": (dim,),
        "top_noun": (rows, top),
        "top_weight": (rows, top),
    }
    expected = wide.get(name, (rows,))
    if array.shape != expected or array.dtype != DTYPES[name]:
        raise ValueError(f"{name}.npy is {array.dtype} {array.shape}, expected {DTYPES[name]} {expected}")
    return array


STREAM_BLOCK = 4 * 2**20  # bytes asked of an object store at a time


class TarShards:
    """Some or all shards of a folder, to read. Safe in DataLoader workers: every stream is opened where it is read."""

    def __init__(self, url: str | Path, *, whole: bool = True) -> None:
        """`url`: the folder, or shards in it: DIR/000003.tar, DIR/{000000..000009}.tar. `whole`: ask whether they are
        all there.

        Raises HdovdError if there are none, or some of those asked for are not whole.
        """
        root, names = _split(str(url))
        self.url, self._folder = root, open_folder(root)
        try:
            self.meta = TarMeta.from_bytes(self._folder.read(TAR_META), f"{root}/{TAR_META}")
        except FileNotFoundError:
            raise HdovdError(
                f"{root} holds no {TAR_META}: expected a folder that hdovd cache export --to webdataset wrote"
            ) from None
        everything = {_name(number, "tar"): number for number in range(self.meta.shards)}
        if unknown := [name for name in names or () if name not in everything]:
            raise HdovdError(
                f"{root} has {self.meta.shards} shards, {_name(0, 'tar')} and on; asked for {shorten([*unknown])}"
            )
        self.numbers = (
            list(everything.values()) if names is None else [everything[name] for name in dict.fromkeys(names)]
        )
        if whole and (missing := [_name(number, "tar") for number in unfinished_shards(self._folder, self.numbers)]):
            raise HdovdError(
                f"{root}: not there, or not as long as written: {len(missing)} of {len(self.numbers)} shards "
                f"({shorten([*missing])}). Run the export again, it goes on where it was; or copy them again"
            )

    @property
    def images(self) -> int:
        """How many images the shards hold, with those that have no picture."""
        return sum(len(self.meta.places_of(number)) for number in self.numbers)

    def failed(self) -> dict[int, str]:
        """Images of these shards that have no picture, since they lack embeddings, with the reason."""
        ids = self.meta.tensors["image_id"]
        here = {int(image) for number in self.numbers for image in ids[self.meta.places_of(number)]}
        return {image: reason for image, reason in self.meta.failed().items() if image in here}

    def raw(self, number: int, *, verify: bool = False) -> Iterator[tuple[int, RawSample]]:
        """The samples of a shard, in order, each with its place in the list of all images; `decode` makes sense of one.

        Raises HdovdError, naming the shard, if it cannot be read, is cut short, holds other images, or a sample is not
        what was written; with `verify`, or if the shard is of an older version, which has no checksums of samples, at
        its end, if it is not the very file that was written.
        """
        from webdataset.tariterators import group_by_keys, tar_file_expander  # type: ignore[import-untyped]

        url, places = self._url(number), self.meta.places_of(number)
        ids, place = self.meta.tensors["image_id"], places.start
        with _reading(url), _open(self._folder, _name(number, "tar")) as stream:
            record = _parse(self._folder.read(_name(number, "json")))
            sums = record.get("crc32")
            if not isinstance(sums, list) or len(sums) != len(places):
                sums, verify = None, True
            measured = _Measured(stream) if verify else stream
            for sample in group_by_keys(tar_file_expander([{"url": url, "stream": measured}])):
                expected = f"{int(ids[place]):012d}" if place < places.stop else "no more"
                if sample["__key__"] != expected:
                    raise HdovdError(
                        f"{url} holds sample {sample['__key__']} where {expected} is expected: is it another export's?"
                    )
                content = b"".join(data for name, data in sample.items() if not name.startswith("__"))
                if sums is not None and zlib.crc32(content) != sums[place - places.start]:
                    raise HdovdError(
                        f"{url}: sample {expected} is damaged, by its checksum; export or copy the shard again"
                    )
                yield place, sample
                place += 1
            if place < places.stop:
                raise HdovdError(
                    f"{url} is cut short: {place - places.start} of {len(places)} samples; export or copy it again"
                )
            if isinstance(measured, _Measured) and measured.at_end() != (record.get("bytes"), record.get("sha256")):
                raise HdovdError(
                    f"{url} is damaged: size or sha256 are not those of its record; export or copy it again"
                )

    def decode(self, place: int, raw: RawSample) -> TarSample:
        """Raises HdovdError, naming the shard and the sample, if a file is missing or does not fit."""
        where = f"{self._url(place // self.meta.samples)}: sample {raw['__key__']}"
        offset, image_id = self.meta.tensors["offset"], int(self.meta.tensors["image_id"][place])
        rows = int(offset[place + 1] - offset[place])
        names = [
            name
            for name, (level, array) in MEMBERS.items()
            if level in self.meta.products and (self.meta.top or array not in TOP_ARRAYS)
        ]
        with naming_damage(where, "export or copy the shard again"):
            about, dim, top = json.loads(raw["json"]), self.meta.dim, self.meta.top
            arrays = {name: _array(raw[f"{name}.npy"], name, rows, dim, top) for name in names}
            return TarSample(image_id, about, None if about["picture"] is None else raw[about["picture"]], arrays)

    def verify(self, number: int) -> None:
        """Read a shard whole. Raises HdovdError, naming it, if it is not the very file that was written, or holds
        embeddings that are no embeddings.
        """
        for place, raw in self.raw(number, verify=True):
            sample = self.decode(place, raw)
            for name, rows in sample.arrays.items():
                if MEMBERS[name][1] == "embedding" and "failed" not in sample.about:
                    require_unit(np.atleast_2d(rows), f"{self._url(number)}: sample {raw['__key__']}, {name}")

    def _url(self, number: int) -> str:
        return f"{self.url}/{_name(number, 'tar')}"


class _Measured:
    """A stream that is measured while it is read."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._digest, self._bytes = stream, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._digest.update(data)
        self._bytes += len(data)
        return data

    def at_end(self) -> tuple[int, str]:
        """Bytes and sha256 of the whole stream."""
        while self.read(STREAM_BLOCK):
            pass
        return self._bytes, self._digest.hexdigest()


class TarWriter:
    """Writes the shards of one set, each whole or not at all, in any order, by any number of processes: always the same
    bytes.
    """

    def __init__(self, url: str | Path, meta: TarMeta) -> None:
        """Begin, or go on with what is there. Raises HdovdError if `url` holds anything else."""
        self.folder = open_folder(url)
        self.meta = meta
        there = [name for name in self.folder.sizes("") if not name.startswith(".")]
        if TAR_META in there:
            found = TarMeta.from_bytes(self.folder.read(TAR_META), f"{url}/{TAR_META}")
            if lines := differences(meta.identity(), found.identity()):
                raise HdovdError(
                    f"{url} holds the shards of something else; give another folder:\n  " + "\n  ".join(lines[:20])
                )
            features = replace(  # the cache may have learned these since
                found.features,
                object_text=found.features.object_text or meta.features.object_text,
                label_weights=meta.features.label_weights or found.features.label_weights,
            )
            self.meta = replace(found, features=features)
            if features != found.features:
                self.folder.write(TAR_META, self.meta.to_bytes())
        elif there:
            raise HdovdError(f"{url} is not empty and holds no shards ({there[0]}): give another folder")
        else:
            self.folder.write(TAR_META, meta.to_bytes())

    def write(self, number: int, samples: Iterable[TarSample]) -> int:
        """Write a shard: the samples of `meta.places_of(number)`. It is held in memory. Returns its bytes."""
        buffer, sums = io.BytesIO(), []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in samples:
                files = sample.files()
                for extension, data in files.items():  # of no time and no owner: the same bytes whenever they are made
                    member = tarfile.TarInfo(f"{sample.image_id:012d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                sums.append(zlib.crc32(b"".join(files.values())))
        data = buffer.getvalue()
        self.folder.write(_name(number, "tar"), data)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "crc32": sums}
        self.folder.write(_name(number, "json"), json.dumps(record).encode())
        return len(data)


def unfinished_shards(folder: Folder, numbers: Sequence[int]) -> list[int]:
    """Shards that have no record, or another size than it says."""
    sizes = folder.sizes("")
    recorded = [number for number in numbers if _name(number, "json") in sizes]
    records = [_parse(text) for text in folder.read_many([_name(number, "json") for number in recorded])]
    whole = {
        number
        for number, record in zip(recorded, records, strict=True)
        if sizes.get(_name(number, "tar")) == record.get("bytes")
    }
    return [number for number in numbers if number not in whole]


def forget_shard(folder: Folder, number: int) -> None:
    """Count a shard as not written."""
    folder.delete(_name(number, "json"))


def _split(url: str) -> tuple[str, list[str] | None]:
    """The folder, and the names of the shards in it if some are named."""
    if not url.endswith(".tar"):
        return url.rstrip("/"), None
    from braceexpand import braceexpand

    try:
        found = [one.rpartition("/") for one in braceexpand(url)]
    except ValueError as error:
        raise HdovdError(f"{url}: {error}; expected a pattern such as DIR/{{000000..000009}}.tar") from error
    roots = {root for root, _, _ in found}
    if len(roots) > 1:
        raise HdovdError(f"{url} names shards of {len(roots)} folders: give those of one")
    return roots.pop() or ".", [name for _, _, name in found]


def _name(number: int, ending: str) -> str:
    """The object of a shard (tar), or of its record (json)."""
    return f"{number:06d}.{ending}"


def _parse(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:  # a damaged record records nothing
        record = None
    return record if isinstance(record, dict) else {}


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Raises HdovdError naming the shard if reading it fails."""
    try:
        yield
    except HdovdError:
        raise
    except Exception as error:  # tarfile's, the system's, and those of every store's client
        said = getattr(error, "strerror", None) or str(error.args[0] if error.args else error).partition(" @ ")[0]
        raise HdovdError(
            f"{url} cannot be read to its end ({type(error).__name__}: {said}): export or copy it again"
        ) from error


def _open(folder: Folder, name: str) -> IO[bytes]:
    """An object as a stream."""
    if path := folder.path(name):
        return path.open("rb")
    from fsspec.core import url_to_fs

    system, where = url_to_fs(f"{folder.url}/{name}", use_listings_cache=False)
    return cast(IO[bytes], system.open(where, "rb", block_size=STREAM_BLOCK))
