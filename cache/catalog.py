"""All that a cache holds: products, the named sets that belong together, and the training runs that used them."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hdovd.cache.identity import KeyInputs, differences, require_seal, sealed
from hdovd.cache.product import Product
from hdovd.cache.schema import SCHEMA_VERSION, TAR_META, Level
from hdovd.cache.store import Folder, naming_damage, open_folder
from hdovd.core import HdovdError

NAMED = "named"  # a folder of an object for each set, by its name: a set that is lost is missed
# What a set keeps of the weight of its labels.
LABEL_WEIGHTS = {
    "centre",
    "width",
    "scale",
    "auc",
    "boxes",
    "classes",
    "failed",
    "named_rightly",
    "on_object",
    "weight_of_right",
    "weight_of_wrong",
}
SET_NAME_TOLD = "letters, digits, and . _ -, no dot in front, 100 at most"


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """Products that belong together.

    `skipped`: ids by reason of what the input files hold and the cache does not. `made_from`: the extraction's
    settings, so that a damaged part can be made again; empty for an import. `proposals`: `file`, `identity` and
    `made_by` (None if that is not known) of the proposals; empty if that was not recorded. No key depends on it.
    `object_text`: `key` and `embedding` (D float16 values) of the text of the word "object". `label_weights`: `centre`,
    `width` and `scale` of the weight of pseudo labels, and what they were fitted to. Both are empty in older sets and
    imports.
    """

    levels: dict[Level, str]
    skipped: dict[str, list[int | str]] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)
    proposals: dict[str, Any] = field(default_factory=dict)
    object_text: dict[str, Any] = field(default_factory=dict)
    label_weights: dict[str, Any] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """As JSON values; what older sets do not have is left out where it is empty, so that they stay the same."""
        old = ("levels", "skipped", "made_from")
        return {name: value for name, value in asdict(self).items() if value or name in old}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "FeatureSet":
        """Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
        return cls(
            _levels(tree),
            dict(tree["skipped"]),
            dict(tree["made_from"]),
            dict(tree.get("proposals", {})),
            dict(tree.get("object_text", {})),
            _label_weights(tree),
        )


def _label_weights(tree: dict[str, Any]) -> dict[str, Any]:
    """Those of a set; empty if it has none. Raises ValueError if they are not numbers."""
    found = dict(tree.get("label_weights", {}))
    numbers = [value for name, value in found.items() if name != "on_object" or value is not None]
    if found and not (
        found.keys() >= LABEL_WEIGHTS
        and all(type(value) in (int, float) and abs(value) < float("inf") for value in numbers)
        and min(found["width"], found["scale"], found["boxes"]) > 0
    ):
        raise ValueError(f"label_weights are {found}, expected numbers: {', '.join(sorted(LABEL_WEIGHTS))}")
    return found


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A training run and the products that it read."""

    path: str
    levels: dict[Level, str]

    @property
    def is_there(self) -> bool:
        return (Path(self.path) / "run.json").is_file()

    @property
    def file(self) -> str:
        """Where the cache keeps it."""
        return f"runs/{hashlib.sha256(self.path.encode()).hexdigest()[:16]}.json"


class Catalog:
    """A cache folder. Raises HdovdError if it is none, or of a schema that this version does not read."""

    def __init__(self, url: str | Path) -> None:
        self.folder = open_folder(url)
        try:
            with naming_damage(
                f"{url}/zarr.json", f"{url} is no feature cache, or hdovd cache verify --repair mends it"
            ):
                version = json.loads(self.folder.read("zarr.json"))["attributes"]["schema_version"]
                if type(version) is not int:
                    raise ValueError("it does not say which cache schema it has")
        except FileNotFoundError:
            raise HdovdError(f"no feature cache at {url}: make one with hdovd extract-clip --cache {url}") from None
        if version != SCHEMA_VERSION:
            raise HdovdError(
                f"{url} has cache schema {version}, this hdovd reads {SCHEMA_VERSION}: "
                + (
                    "it was made by a newer hdovd: update this one"
                    if version > SCHEMA_VERSION
                    else "give another --cache and extract it again, there is no older reader"
                )
            )

    @classmethod
    def find_at(cls, url: str | Path) -> "Catalog | None":
        """The cache at `url`, None if there is nothing. Raises HdovdError if something else is in the way."""
        folder = open_folder(url)
        if not folder.exists("zarr.json"):
            there = [name for name in folder.sizes("") if not name.startswith(".") and name not in group_objects()]
            if there and not folder.exists("zarr.json"):  # another process may make the cache at the same time
                raise HdovdError(f"{url} is not empty and is no feature cache ({there[0]}): give another --cache")
            return None
        return cls(url)

    @classmethod
    def create(cls, url: str | Path) -> "Catalog":
        """The cache at `url`, made if there is nothing. Raises HdovdError if something else is in the way."""
        if cls.find_at(url) is None:
            folder, objects = open_folder(url), group_objects()
            for name in sorted(objects):  # the root's, named zarr.json, last: a cache is one when it is there
                folder.write(name, objects[name])
        return cls(url)

    def products(self, level: Level | None = None) -> list[Product]:
        """All products, finished or not."""
        names = [
            name.split("/") for name in self.folder.sizes(str(level) if level else "") if name.endswith("/zarr.json")
        ]
        return [
            Product(self.folder, Level(name[0]), name[1]) for name in names if len(name) == 3 and name[0] in set(Level)
        ]

    def find(self, level: Level, key: str) -> Product | None:
        """The product of a level and a key, or None."""
        return Product(self.folder, level, key) if self.folder.exists(f"{level}/{key}/zarr.json") else None

    def nearest(self, level: Level, inputs: KeyInputs) -> tuple[Product | None, list[str]]:
        """The product of a level whose inputs differ least from `inputs`, and the differences in words."""
        found = [(product, differences(inputs, product.attributes["key_inputs"])) for product in self.products(level)]
        return min(found, key=lambda entry: len(entry[1]), default=(None, []))

    def sets(self) -> dict[str, FeatureSet]:
        """All sets by name. Raises HdovdError if one is damaged."""
        return {
            name.removeprefix("sets/").removesuffix(".json"): read_set(self.folder, name)
            for name in self.folder.sizes("sets")
        }

    def write_set(self, name: str, features: FeatureSet) -> None:
        """Raises HdovdError for a name that is none."""
        if not is_set_name(name):
            raise HdovdError(f"a set of features cannot be named {name[:100]!r}: expected {SET_NAME_TOLD}")
        self.folder.write(f"sets/{name}.json", json.dumps(sealed(features.to_tree())).encode())
        self.folder.write(f"{NAMED}/{name}", name.encode())

    def delete_set(self, name: str) -> None:
        """Forget a set; its products stay."""
        self.folder.delete(f"{NAMED}/{name}")
        self.folder.delete(f"sets/{name}.json")

    def runs(self) -> list[RunRecord]:
        """Records of the runs that were trained from this cache."""
        names = list(self.folder.sizes("runs"))
        return [
            read_run(self.folder.url, name, text)
            for name, text in zip(names, self.folder.read_many(names), strict=True)
        ]

    def record_run(self, run: RunRecord) -> None:
        """Keep that a run uses its products."""
        self.folder.write(run.file, json.dumps(sealed({"path": run.path, "levels": run.levels}), indent=1).encode())

    def users(self) -> dict[tuple[Level, str], list[str]]:
        """Who needs which product: sets by name, and runs whose folder is still there by path."""
        users: dict[tuple[Level, str], list[str]] = {}
        for user, levels in (
            *((f"set {name}", features.levels) for name, features in self.sets().items()),
            *((run.path, run.levels) for run in self.runs() if run.is_there),
        ):
            for level, key in levels.items():
                users.setdefault((level, key), []).append(user)
        return users


def group_objects() -> dict[str, bytes]:
    """The metadata of the root and of every level, by name: all that an empty cache consists of."""
    attributes = {"zarr.json": {"schema_version": SCHEMA_VERSION}, **{f"{level}/zarr.json": {} for level in Level}}
    return {
        name: json.dumps({"attributes": found, "zarr_format": 3, "node_type": "group"}, indent=2).encode()
        for name, found in attributes.items()
    }


def read_run(url: str, name: str, text: bytes) -> RunRecord:
    """The run of the object `name`, with text `text`. Raises HdovdError if it is damaged."""
    with naming_damage(f"{url}/{name}", "delete it; the cache then knows nothing of that run"):
        tree = json.loads(text)
        require_seal(tree)
        run = RunRecord(str(tree["path"]), _levels(tree))
        if run.file != name:
            raise ValueError(f"it is the record of {run.path}, whose name is {run.file}")
    return run


def _levels(tree: dict[str, Any]) -> dict[Level, str]:
    """The products that a set or a run names. Raises ValueError for keys that are none: they become names of
    folders."""
    levels = {Level(level): str(key) for level, key in tree["levels"].items()}
    if wrong := [key for key in levels.values() if not re.fullmatch(r"[\w-]{1,64}", key)]:
        raise ValueError(f"{wrong[0][:80]!r} is no key")
    return levels


def is_set_name(name: object) -> bool:
    """Whether a set may have this name, which becomes that of a file."""
    return isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]{,99}", name) is not None


def read_set(folder: Folder, name: str) -> FeatureSet:
    """The set of the file `name`. Raises HdovdError if it is damaged."""
    with naming_damage(
        f"{folder.url}/{name}", "hdovd cache verify --repair, then its hdovd extract-clip command, write it again"
    ):
        tree = json.loads(folder.read(name))
        require_seal(tree)
        return FeatureSet.from_tree(tree)


def is_tar_form(url: str | Path) -> bool:
    """Whether `url` names shards, or a folder of them."""
    return str(url).endswith(".tar") or open_folder(url).exists(TAR_META)
