"""What `meta.safetensors` holds: all that a folder of tar shards knows of its cache but the rows and pictures of single
images.

Written by `hdovd cache export` and `hdovd extract-clip --store webdataset`; see `tar_shards` for the folder that it
stands in.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from hdovd.cache.catalog import SET_NAME_TOLD, Catalog, FeatureSet, is_set_name
from hdovd.cache.identity import KeyInputs, hash_tables, hash_texts, key_of, require_seal, sealed
from hdovd.cache.product import Product, parse_record, require_sizes
from hdovd.cache.reader import require_unit
from hdovd.cache.schema import SCHEMA_VERSION, TABLE_ARRAYS, Level
from hdovd.cache.store import naming_damage
from hdovd.core.errors import HdovdError

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
    products: dict[Level, dict[str, Any]]
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
        tensors = {table: found[Level.BOXES].table(table) for table in TABLES_HERE}
        tensors |= {str(level): found[level].table("embedding") for level in TEXTS if level in found}
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
            version = tree["schema_version"]
            if version != SCHEMA_VERSION:
                raise HdovdError(
                    f"{where} has cache schema {version}, this hdovd reads {SCHEMA_VERSION}: export the cache again"
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
        expected = {name: TABLE_ARRAYS[Level.BOXES][name] for name in TABLES_HERE}
        expected |= {str(level): "float16" for level in TEXTS if level in self.products}
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
        found: dict[str, Any] = self.products[level]["attributes"]
        return found

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
