"""What an extraction, and `hdovd bench extract`, are asked to do. Imports neither CLIP nor torch: the command line
names it at no cost.
"""

import os
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from hdovd.cache import CHUNK_ROWS, PART_ROWS, SET_NAME_TOLD, Catalog, KeyInputs, is_set_name
from hdovd.core import HdovdError, is_file, require_files
from hdovd.data import DataPaths, Exif, load_protocol
from hdovd.data.forms.base import AUTO
from hdovd.pipelines.common.name_list import is_shipped, read_vocabulary
from hdovd.pipelines.common.options import (
    CacheWritten,
    Device,
    FeaturesOptions,
    Group,
    Option,
    Precision,
    Pretrained,
    number_or_auto,
    workers_option,
)
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, DenseRecipe, Shape
from hdovd.pipelines.teachers.base import OPEN_CLIP, TEACHERS, Activation, Templates, check_templates

TEMPERATURE = 0.01  # of CLIP itself: its logits are 100 times the cosine, the most that its training allows


class LabelChoice(StrEnum):
    LIKELY = "likely"
    MENTIONED = "mentioned"


@dataclass(frozen=True, slots=True)
class LabelRule:
    """A label is made of the `top` nouns that rank highest, weighed by softmax(rank / temperature). Raises HdovdError.

    mentioned: the rank is the cosine, of the nouns that the image offers (METHOD section 2). likely: of all nouns, but
    those in `barred`, rows of base classes' names, whose objects are annotated already; nouns that the image offers
    have `mention` more, or if that is None are the only ones. `backgrounds`: rows of nouns that name no object; a crop
    that is most like one of them gets no label. These three follow from base boxes and the nouns
    (`pseudo_labels.settled`). `judged`: where annotations are federated, a hash of the rows that are barred in each
    image: names of the base classes that it is judged by.
    """

    top: int = 1
    temperature: float = TEMPERATURE
    choice: LabelChoice = LabelChoice.MENTIONED
    barred: tuple[int, ...] = ()
    mention: float | None = None
    backgrounds: tuple[int, ...] = ()
    judged: str | None = None

    def __post_init__(self) -> None:
        if self.top < 1:
            raise HdovdError(f"--label-top-k {self.top}: expected 1 or more")
        if not 0 < self.temperature < float("inf"):
            raise HdovdError(f"--label-temperature {self.temperature}: expected a number above 0")

    def inputs(self) -> KeyInputs:
        """What the rule adds to the identity of labels: no temperature for one noun, whose weight is 1 at any."""
        return {
            **({} if self.top == 1 else {"top_k": self.top, "temperature": self.temperature}),
            **({} if self.choice is LabelChoice.MENTIONED else {"choice": str(self.choice)}),
            **({"barred": list(self.barred), "mention": self.mention} if self.barred or self.mention else {}),
            **({"backgrounds": list(self.backgrounds)} if self.backgrounds else {}),
            **({} if self.judged is None else {"judged": self.judged}),
        }

    @classmethod
    def of(cls, inputs: KeyInputs) -> "LabelRule":
        """The rule of a pseudo_label product, by its key inputs."""
        top = (int(inputs["top_k"]), float(inputs["temperature"])) if "top_k" in inputs else (1, TEMPERATURE)
        return cls(
            *top,
            LabelChoice(inputs.get("choice", LabelChoice.MENTIONED)),
            tuple(inputs.get("barred", ())),
            inputs.get("mention"),
            tuple(inputs.get("backgrounds", ())),
            inputs.get("judged"),
        )


ONE_NOUN, LIKELY_NOUN = LabelRule(), LabelRule(choice=LabelChoice.LIKELY)


DEFAULT_TEMPLATES = ("a photo of a {}",)
_FILES = ("proposals", "vocabulary", "captions")
_MADE_FROM = ("data", *_FILES, "templates", "precision", "activation", "features")
_LATER_FILES = (
    "synonyms",
    "class_embeddings",
    "nouns",
    "verdicts",
)  # not in `to_dict` without a value: sets that are older than these stay the same


class Store(StrEnum):
    ZARR = "zarr"
    WEBDATASET = "webdataset"


class InstanceTeacher(StrEnum):
    CROP = "crop"
    DENSE = "dense"


class Executor(StrEnum):
    LOCAL = "local"
    RAY = "ray"
    SUBMITIT = "submitit"


@dataclass(frozen=True, slots=True)
class Share:
    """The part of the work that this process does: worker `index` of `count`, index from 0; shared again among
    torchrun's `world` processes, of which this is the one of `rank`.
    """

    index: int = 0
    count: int = 1
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise HdovdError(f"--shard {self.index}/{self.count}: expected I/N with I from 0 to N-1")

    @classmethod
    def parse(cls, text: str) -> "Share":
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit()):
            raise HdovdError(f"--shard {text}: expected I/N, such as 0/8")
        return cls(int(index), int(count))

    @property
    def processes(self) -> int:
        """How many there are for all of the work."""
        return self.count * self.world

    @property
    def speaks(self) -> bool:
        """Whether this process prints: one of torchrun's does."""
        return self.rank == 0


def this_share(asked: Share | None) -> Share:
    """`asked` (None: all), shared again among the processes of torchrun if it started this one."""
    command = asked or Share()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return command
    return replace(command, rank=int(os.environ["RANK"]), world=int(os.environ["WORLD_SIZE"]))


def _recipe(given: dict[str, Any]) -> CropRecipe | DenseRecipe:
    """What becomes of a box. Raises HdovdError for options that are of no use with the teacher."""
    crop, side = CropRecipe.parse(given["crop"], given["crop_scales"]), given["dense_side"]
    if given["instance_teacher"] is InstanceTeacher.DENSE:
        if crop != PLAIN_BOX:
            raise HdovdError("--crop and --crop-scales are of crops: they have no use with --instance-teacher dense")
        return DenseRecipe(side)
    if side is not None:
        raise HdovdError("--dense-side needs --instance-teacher dense")
    return crop


RECIPE_OF_BOX = Group(
    {
        "instance_teacher": (
            InstanceTeacher,
            InstanceTeacher.CROP,
            Option(
                "crop: CLIP sees each box alone. dense: once the whole image, of "
                "which boxes take their part: cheaper, and less sharp."
            ),
        ),
        "dense_side": (
            int | None,
            None,
            Option("dense: the image becomes N x N pixels. Default: about 3 times the crop.", min=1),
        ),
        "crop": (Shape, Shape.BOX, Option("The pixels that a box stands for: see docs/CACHE.md.")),
        "crop_scales": (str, "1", Option("Mean over crops of these sizes of the box: 1,1.5 as in ViLD.")),
    },
    _recipe,
)
LABELS = Group(
    {
        "label_top_k": (
            int,
            1,
            Option("Nouns that a pseudo box's text embedding is the weighted mean of: the best K.", min=1),
        ),
        "label_temperature": (float, TEMPERATURE, Option("With K over 1: their weights are softmax(cosine / T).")),
        "label_choice": (
            LabelChoice,
            LabelChoice.LIKELY,
            Option(
                "likely: the noun that crop and captions together make the most likely, never a base class's name, "
                "whose objects are annotated; none for what is most like a background. mentioned: of the captions' "
                "nouns the one most like it (the paper's)."
            ),
        ),
    },
    lambda given: LabelRule(given["label_top_k"], given["label_temperature"], given["label_choice"]),
)
Workers = Annotated[
    int | None, workers_option("Processes that decode and crop, or auto: none on a CPU, up to 16 for a GPU.")
]
Compute = Annotated[
    Precision,
    Option(
        "What CLIP computes in; auto: what the cache was begun in, else what suits the device "
        "(docs/MACHINES.md). Embeddings are stored as float16."
    ),
]
Batch = Annotated[
    int | None,
    Option(
        "Crops that CLIP embeds at a time (or the pixels of so many), or auto: found by trying.",
        flags=("--batch", "--batch-size"),
        parse=partial(number_or_auto, "--batch", 1),
        text="auto",
    ),
]
ActivationOption = Annotated[Activation, Option("The activation that the weights were trained with.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig(FeaturesOptions):
    """An extraction. `features` names the set that the products make up. `batch_size`: None for the teacher's best.
    `workers`: None for what suits the device. `share`: None for torchrun's own, or all of the work.
    """

    cache: CacheWritten
    clip: Annotated[str, Option("open_clip model name, local-dir:PATH or hf-hub:NAME.")]
    pretrained: Pretrained = None
    teacher: Annotated[
        str,
        Option(
            "What reads --clip: open_clip, or my_module:load, a function that returns a model of your own "
            "(docs/EXTENDING.md)."
        ),
    ] = OPEN_CLIP
    proposals: Annotated[
        Path | None, Option("COCO results JSON, hdovd's .npz, or a .pkl of mmdetection or Detectron2.")
    ] = None
    vocabulary: Annotated[
        Path | None, Option("Nouns for pseudo boxes, one name a line, or general: the object list that ships.")
    ] = None
    captions: Annotated[
        Path | None,
        Option(
            "COCO captions JSON: an image offers its own captions' words, in singular or plural, as hdovd nouns "
            "--parser match finds them."
        ),
    ] = None
    templates: Templates = DEFAULT_TEMPLATES
    recipe: Annotated[CropRecipe | DenseRecipe, RECIPE_OF_BOX] = PLAIN_BOX
    precision: Compute = Precision.AUTO
    activation: ActivationOption = Activation.AUTO
    batch_size: Batch = None
    part_rows: Annotated[int, Option("Rows of a part: the most that a killed process loses.", min=1)] = PART_ROWS
    workers: Workers = None
    dry_run: Annotated[bool, Option("Print the plan and stop.")] = False
    retry_failed: Annotated[bool, Option("Try images again that could not be read.")] = False
    share: Annotated[
        Share | None,
        Option(
            "I/N: every N-th part, from the I-th (0 to N-1): one task of an array of N.",
            flags=("--shard",),
            parse=Share.parse,
        ),
    ] = None
    executor: Annotated[
        Executor, Option("local: this process (or torchrun's). ray: workers of a Ray cluster. submitit: jobs of SLURM.")
    ] = Executor.LOCAL
    submitit: Annotated[
        Path | None,
        Option("TOML for --executor submitit: jobs = 8, timeout_min, slurm_partition, ... (docs/CLUSTERS.md)."),
    ] = None
    store: Annotated[
        Store, Option("webdataset: tar shards with pictures, boxes and embeddings, to train from as a stream.")
    ] = Store.ZARR
    synonyms: Annotated[Path | None, Option('TOML: couch = ["couch", "sofa"]: all names of some classes.')] = None
    class_embeddings: Annotated[
        Path | None,
        Option(
            "A row for each class, base then novel, instead of its name's embedding: learned prompts. "
            "One array in .npy, .safetensors, .pt."
        ),
    ] = None
    nouns: Annotated[Path | None, Option("A file of hdovd nouns, instead of --vocabulary and --captions.")] = None
    labels: Annotated[LabelRule, LABELS] = LIKELY_NOUN
    verdicts: Annotated[
        Path | None,
        Option(
            "What another model calls each proposal, mixed with CLIP's own: JSON lines of image_id, bbox and "
            "names with scores (docs/LABELS.md)."
        ),
    ] = None
    exif: Annotated[
        Exif,
        Option(
            "Pictures with an EXIF orientation whose annotated size fits them turned and as stored: apply turns "
            "them. The annotated size decides of all others."
        ),
    ] = Exif.APPLY

    def __post_init__(self) -> None:
        if self.nouns is not None and (self.vocabulary is not None or self.captions is not None):
            raise HdovdError(
                "--nouns holds a vocabulary and what of it each image offers: leave --vocabulary and --captions out"
            )
        if self.captions is not None and self.vocabulary is None:
            raise HdovdError(
                "--captions needs --vocabulary too: the names, one a line, that are looked for in the captions"
            )
        no_nouns = self.vocabulary is None and self.nouns is None
        if self.proposals is None and not no_nouns:
            raise HdovdError("--vocabulary and --nouns name pseudo boxes, and there are none without --proposals")
        if no_nouns and (self.labels.top > 1 or self.verdicts is not None):
            raise HdovdError(
                "--label-top-k and --verdicts are of pseudo labels, and there are none without --nouns or --vocabulary"
            )
        if self.synonyms is not None and self.class_embeddings is not None:
            raise HdovdError("--synonyms has no use with --class-embeddings, which takes the place of all class names")
        if self.submitit is not None and self.executor is not Executor.SUBMITIT:
            raise HdovdError("--submitit says how --executor submitit starts its jobs: give both")
        if self.retry_failed and self.executor is Executor.SUBMITIT:
            raise HdovdError("--retry-failed has little to do: give it without --executor submitit")
        check_templates(self.templates)
        if self.part_rows < 1 or (self.part_rows > CHUNK_ROWS and self.part_rows % CHUNK_ROWS):
            raise HdovdError(f"--part-rows {self.part_rows}: expected at most {CHUNK_ROWS}, or a multiple of it")
        if not is_set_name(self.features):
            raise HdovdError(f"--features {self.features[:100]!r}: expected {SET_NAME_TOLD}")

    def check(self) -> None:
        """Raises HdovdError for what is wrong with the paths and names alone."""
        if self.store is Store.ZARR:  # else it is a folder of tar shards, which the extraction looks into
            Catalog.find_at(self.cache)
        if self.executor is not Executor.LOCAL and find_spec(self.executor) is None:
            raise HdovdError(f"--executor {self.executor} needs {self.executor}: pip install 'hdovd[{self.executor}]'")
        TEACHERS.require(self.teacher)
        load_protocol(self.protocol)
        self.data.locate("train2017")
        require_files(
            proposals=self.proposals,
            captions=self.captions,
            nouns=self.nouns,
            verdicts=self.verdicts,
            synonyms=self.synonyms,
            class_embeddings=self.class_embeddings,
            submitit=self.submitit,
        )
        if self.vocabulary is not None:
            read_vocabulary(self.vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """What another process needs to make the same products: JSON values, absolute paths."""
        kind = "dense" if isinstance(self.recipe, DenseRecipe) else "crop"
        tree = {
            **{name: _plain(getattr(self, name)) for name in _MADE_FROM},
            "clip": f"local-dir:{_plain(Path(self.clip[10:]))}" if self.clip.startswith("local-dir:") else self.clip,
            "pretrained": _plain(Path(self.pretrained))
            if self.pretrained and is_file(self.pretrained)
            else self.pretrained,
            "protocol": _plain(Path(self.protocol)) if is_file(self.protocol) else self.protocol,
            kind: {"side": self.recipe.side} if isinstance(self.recipe, DenseRecipe) else self.recipe.inputs(),
        }
        later = {
            **{name: _plain(getattr(self, name)) for name in _LATER_FILES},
            "teacher": None if self.teacher == OPEN_CLIP else self.teacher,
            "matching": None if self.captions is None else "lemmas",
            "labels": self.labels.inputs() or None,
            "exif": None if self.exif is Exif.APPLY else str(self.exif),
        }
        return tree | {name: value for name, value in later.items() if value is not None}

    @classmethod
    def from_dict(cls, tree: dict[str, Any], cache: Path | str, **changes: Any) -> "ExtractConfig":
        """The extraction that `to_dict` described, with changes. Sets that do not say how names are found in captions
        are of a version that found them letter by letter: made again, they know plurals.
        """
        given = {
            **{name: value for name, value in tree.items() if name not in ("crop", "dense", "matching")},
            **{name: Path(tree[name]) for name in (*_FILES, *_LATER_FILES) if tree.get(name) is not None},
            "data": DataPaths(
                **{name: Path(value) for name, value in tree["data"].items() if value is not None and name != "form"},
                form=str(tree["data"].get("form", AUTO)),
            ),
            "templates": tuple(tree["templates"]),
            "recipe": recipe_of(tree),
            "labels": LabelRule.of(tree.get("labels", {})),
            "precision": Precision(tree["precision"]),
            "exif": Exif(tree.get("exif", Exif.APPLY)),
            "activation": Activation(tree["activation"]),
        }
        return cls(**(given | {"cache": cache} | changes))


def recipe_of(tree: dict[str, Any]) -> CropRecipe | DenseRecipe:
    """What becomes of a box, by what made a set, or a product's key inputs."""
    if "dense" in tree:
        return DenseRecipe(tree["dense"]["side"])
    return CropRecipe.from_inputs(tree["crop"]) if "crop" in tree else PLAIN_BOX


def _plain(value: Any) -> Any:
    """A field as a JSON value; paths are absolute."""
    if isinstance(value, DataPaths):
        form = {} if value.form == AUTO else {"form": value.form}  # sets of before there was a choice stay the same
        return {name: _plain(getattr(value, name)) for name in ("root", "images", "annotations")} | form
    if isinstance(value, Path):
        return str(value) if is_shipped(value) else str(value.absolute())
    return list(value) if isinstance(value, tuple) else value


# --- hdovd bench extract ---


def _two(mark: str, option: str, text: str) -> tuple[int, int]:
    """Two whole numbers with a mark between them. Raises HdovdError for anything else."""
    first, _, second = text.partition(mark)
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise HdovdError(f"{option} {text}: expected two whole numbers above 0 with {mark!r} between them")
    return int(first), int(second)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastConfig:
    """`pretrained`: None for random weights, which are as fast as any. `data_set`: how many images and boxes the
    forecast is for. `folder`: where to work; an empty one when the stage is called.
    """

    clip: Annotated[str, Option("open_clip model name, local-dir:PATH or hf-hub:NAME.")] = "ViT-B-32"
    pretrained: Annotated[str | None, Option("Tag or checkpoint file. Default: random weights.")] = None
    precision: Annotated[
        Precision, Option("What CLIP computes in; auto: what suits the device (docs/MACHINES.md).")
    ] = Precision.AUTO
    device: Device = "auto"
    workers: Workers = None
    batch_size: Batch = None
    crop: Annotated[
        CropRecipe,
        Group(
            {
                "crop": (Shape, Shape.BOX, Option("The pixels that a box stands for.")),
                "crop_scales": (str, "1", Option("As for extract-clip.")),
            },
            lambda given: CropRecipe.parse(given["crop"], given["crop_scales"]),
        ),
    ] = PLAIN_BOX
    images: Annotated[int | None, Option("Images a round. Default: what the model does in ten seconds.", min=1)] = None
    boxes: Annotated[int, Option("Boxes an image.", min=2)] = 30
    picture: Annotated[
        tuple[int, int],
        Option("Size of the JPEG files, WIDTHxHEIGHT.", parse=partial(_two, "x", "--picture"), text="640x480"),
    ] = (640, 480)
    rounds: Annotated[int, Option("Rounds of the bare model and of all; medians are printed.", min=1)] = 3
    data_set: Annotated[
        tuple[int, int],
        Option(
            "IMAGES,BOXES of the data set to forecast. Default: COCO, 30 proposals an image.",
            flags=("--forecast",),
            parse=partial(_two, ",", "--forecast"),
            text="118287,4400000",
        ),
    ] = (118_287, 4_400_000)
    json_file: Annotated[Path | None, Option("Write the figures there too.", flags=("--json",))] = None
    folder: Annotated[
        Path | None, Option("Where to work: a new folder in this one. Default: the system's for temporary files.")
    ] = None
