"""Options of commands, as the fields of their configs declare them: the one definition of each, for Python and the
command line.

Plain values without a command-line library, and without torch. `hdovd.cli.command` makes Typer's signature of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from hdovd.cache import DEFAULT_SET
from hdovd.config.detector import PRESETS
from hdovd.core import HdovdError, shorten
from hdovd.data import DataPaths
from hdovd.data.forms.base import AUTO, FORMS

if TYPE_CHECKING:
    import torch

Preset = StrEnum("Preset", {name.replace("-", "_").upper(): name for name in PRESETS})  # type: ignore[misc]
MISSING = Parameter.empty  # the default of an option that has to be given
DEFAULT_RECIPE = "ov-coco-faster-rcnn-r50"
PROPOSAL_FILES = (".json", ".npz")  # that we write


@dataclass(frozen=True, slots=True)
class Option:
    """A field as one option. `flags`: default --NAME. `parse`: text -> the field's value; `text`: the default as text.

    `argument`: given by place. `min`, `max`: limits of a number.
    """

    help: str = ""
    flags: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    text: str | None = None
    argument: bool = False
    metavar: str | None = None
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A field that several options make together. `options`: type, default and `Option` by name.

    `build`: the field's value, from the values of all options of the command by name.
    """

    options: dict[str, tuple[Any, Any, Option]]
    build: Callable[[dict[str, Any]], Any]


class Precision(StrEnum):
    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def dtype(self) -> "torch.dtype":
        """Raises KeyError for auto, which is none."""
        import torch

        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[self]

    @classmethod
    def of(cls, dtype_name: str | None) -> "Precision | None":
        """By the name of torch's type, as identities hold it; None for any other."""
        return {"float32": cls.FP32, "bfloat16": cls.BF16, "float16": cls.FP16}.get(str(dtype_name))


def number_or_auto(option: str, least: int, text: str) -> int | None:
    """A whole number of at least `least`; None for auto. Raises HdovdError for anything else."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < least:
        raise HdovdError(f"{option} {text}: expected auto, or a whole number from {least} on")
    return int(text)


def workers_option(what: str) -> Option:
    return Option(what, parse=partial(number_or_auto, "--workers", 0), text="auto")


Device = Annotated[str, Option("auto, cpu or cuda.")]
Protocol = Annotated[str, Option("The base/novel split: ov-coco, ov-lvis, or a TOML file with name, base and novel.")]
OTHER_PROTOCOL = Option("The base/novel split. Default: the one that the cache was made with.")
OtherProtocol = Annotated[str | None, OTHER_PROTOCOL]
Features = Annotated[str, Option("The name of a set of features: products of one cache that belong together.")]
Trust = Annotated[
    bool,
    Option(
        "Import code and ask addresses that RUN names, and take it as it was changed, though it was not trained here "
        "by you."
    ),
]
CacheArgument = Annotated[Path | str, Option("The cache: a folder, or hf://USER/NAME, s3://, gs://.", argument=True)]
CacheWritten = Annotated[Path | str, Option("The cache to write or add to: a folder, or s3://, gs://.")]
Pretrained = Annotated[str | None, Option("Tag or checkpoint file, with a model name.")]
Calibration = Annotated[
    Path | None, Option("What hdovd calibrate wrote: how far to trust pseudo labels, over the recipe's values.")
]


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """How pictures go through a detector."""

    device: Device = "auto"
    batch_size: Annotated[int, Option("Images a batch.", min=1)] = 16
    workers: Annotated[
        int | None, workers_option("Processes that decode images, or auto: none on a CPU, up to 16 for a GPU.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ClipNames:
    """Where the CLIP lies that made the embeddings of a cache. None: where the cache says."""

    clip: Annotated[
        str | None, Option("The CLIP, where it lies elsewhere than the cache says: as for extract-clip.")
    ] = None
    pretrained: Annotated[str | None, Option("Tag or checkpoint file, with --clip and a model name.")] = None

    def __post_init__(self) -> None:
        if self.pretrained is not None and self.clip is None:
            raise HdovdError("--pretrained goes with --clip")


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ClipNames):
    """That CLIP, and where to compute."""

    device: Device = "auto"


SET = Option("Override a value of the recipe: loss.image.enabled=false. Repeatable.", flags=("--set",))
DATA: dict[str, tuple[Any, Any, Option]] = {
    "data": (Path | None, None, Option("Data set: COCO's folder, or one of another --form (docs/DATA.md).")),
    "images": (Path | None, None, Option("Image folder, instead of the one under --data.")),
    "annotations": (Path | None, None, Option("COCO instances JSON, instead of the one under --data.")),
    "form": (
        str,
        AUTO,
        Option(f"What --data is: {', '.join(FORMS)}, or my_module:form (docs/EXTENDING.md). auto: found out."),
    ),
}


def data_of(given: dict[str, Any]) -> DataPaths:
    return DataPaths(given["data"], given["images"], given["annotations"], given["form"])


def data_if_given(given: dict[str, Any]) -> DataPaths | None:
    data = data_of(given)
    return None if data == DataPaths() else data


Data = Annotated[DataPaths, Group(DATA, data_of)]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """A data set and its split."""

    data: Data
    protocol: Protocol = "ov-coco"


@dataclass(frozen=True, kw_only=True)
class FeaturesOptions(DataOptions):
    """A data set, and a set of features of it."""

    features: Features = DEFAULT_SET
    device: Device = "auto"


DataIfGiven = Annotated[DataPaths | None, Group(DATA, data_if_given)]


def named_validation(given: dict[str, Any]) -> DataPaths | None:
    """The validation images that are named; None if there are none."""
    found = DataPaths(given["data"], given["val_images"], given["val_annotations"], given["form"])
    return found if found.images or found.annotations else None


def validation_of(given: dict[str, Any]) -> DataPaths | None:
    """The validation images: those named, or those of the data set if it has any; else None."""
    found = DataPaths(given["data"], form=given["form"])
    there = found.root is not None and found.root.is_dir() and found.has("val2017")
    return named_validation(given) or (found if there else None)


def validation_group(build: Callable[[dict[str, Any]], DataPaths | None]) -> Group:
    """The group of --val-images and --val-annotations."""
    return Group(
        {
            "val_images": (Path | None, None, Option("Validation images, instead of those under --data.")),
            "val_annotations": (
                Path | None,
                None,
                Option("Validation boxes, a COCO instances JSON, instead of those under --data."),
            ),
        },
        build,
    )


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """A network that is trained."""

    save_minutes: Annotated[float, Option("Minutes between two checkpoints within an epoch.", min=0)] = 10.0
    validation: Annotated[DataPaths | None, validation_group(validation_of)] = None


@dataclass(frozen=True, kw_only=True)
class RunsOptions(FeaturesOptions):
    """What runs are trained with."""

    calibration: Calibration = None
    init: Annotated[
        Path | None,
        Option(
            "A run whose weights training begins with, such as import-checkpoint wrote: losses' memories, "
            "optimizer and schedule begin anew."
        ),
    ] = None


def require_own_folder(out: Path, marker: str, what: str) -> bool:
    """Whether there is something in the folder --out. Raises HdovdError if it is a file, or holds other things than
    `what`, which are known by the file `marker`.
    """
    if out.exists() and not out.is_dir():
        raise HdovdError(f"--out {out} is a file: give a folder")
    there = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    if there and not (out / marker).is_file():
        raise HdovdError(
            f"--out {out} holds no {what}, but other things ({shorten(list(there))}): give a folder that is new, "
            f"empty, or of {what}"
        )
    return bool(there)


class ListOrder(StrEnum):
    """Which images a list of proposals goes through."""

    FILE = "file"
    ID = "id"

    @property
    def words(self) -> str:
        return "in the order of its images" if self is ListOrder.FILE else "by ascending image id"


def require_proposal_file(out: Path) -> None:
    """Raises HdovdError for a name under which proposals cannot be written, before any work is done for them."""
    if out.suffix not in PROPOSAL_FILES or out.is_dir():
        raise HdovdError(f"--out {out}: expected a file whose name ends in {' or '.join(PROPOSAL_FILES)}")


def refuse_two_sources(settings: Sequence[str], calibration: Path | None) -> None:
    """Raises HdovdError if `settings`, as of --set and --grid, hold a value that the calibration gives too."""
    if calibration is not None and (
        both := [one for one in settings if one.strip().startswith("pseudo_boxes.reliability_")]
    ):
        raise HdovdError(
            f"{' '.join(both)}: --calibration {calibration} says what the reliability weight is; leave one of them out"
        )


def read_recipe(given: dict[str, Any]) -> Any:
    """The recipe of --recipe, --preset and --set. Raises HdovdError if one of them is wrong."""
    from hdovd.config.recipe import load_recipe

    refuse_two_sources(given["set_"] or (), given.get("calibration"))
    preset = given.get("preset")
    return load_recipe(given["recipe"], [*(PRESETS[preset.value] if preset else ()), *(given["set_"] or ())])


RECIPE_NAME = Option("A shipped recipe or a TOML file.")
RECIPE = Group({"recipe": (str, DEFAULT_RECIPE, RECIPE_NAME), "set_": (list[str] | None, None, SET)}, read_recipe)
PRESET = Option("Settings laid over the recipe, beneath --set; base-only turns all distillation off.")
RECIPE_AND_PRESET = Group(
    {
        "recipe": (str, DEFAULT_RECIPE, RECIPE_NAME),
        "preset": (Preset | None, None, PRESET),
        "set_": (list[str] | None, None, SET),
    },
    read_recipe,
)
