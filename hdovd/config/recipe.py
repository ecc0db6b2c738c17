"""The recipe: every value of a training run, validated, in one tree. Defaults live in the recipe files alone.

`load_recipe` is the one way in, for the command line and for Python. A recipe is a TOML file; the resolved
tree of a run is written back as TOML and can itself be given as a recipe.
"""

import difflib
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, Field, ValidationError

from hdovd.config.detector import (
    AUTO,
    BACKBONES,
    DETECTORS,
    FORMS,
    LIBRARIES,
    PRESETS as PRESETS,
    Auto,
    Count,
    DetectorConfig,
    FasterRCNNConfig,
    Finite,
    NonNegative,
    OpenSection,
    Positive,
    Section,
    Share,
)
from hdovd.core import HdovdError
from hdovd.core.text_files import cut, parse_toml, read_shipped, shipped, shown

_MOST_ERRORS = 20  # said of one recipe


class InputConfig(Section):
    short_side: Count
    train_short_sides: list[Count] = Field(
        default_factory=list
    )  # one is drawn for each image of a step; empty, or not there: short_side
    long_side: Count
    flip: Share
    exif: Literal["apply", "ignore"] = (
        "apply"  # for pictures whose annotated size fits both turned as EXIF says and as stored
    )
    mean: Annotated[list[Finite], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]


class PseudoBoxConfig(Section):
    max_per_image: Count
    min_side: NonNegative  # both sides must be longer, pixels at the detector's input scale
    reliability_centre: Finite | Auto  # "auto": the values of METHOD section 2, for the models that it knows
    reliability_width: Positive | Auto
    reliability_scale: Positive | Auto
    from_epoch: Count = 1  # the first epoch that uses them; recipes of before there was a choice mean all

    @property
    def reliability(self) -> tuple[float, float, float]:
        """Centre, width and scale. Raises HdovdError if one is still "auto": `Recipe.with_reliability` says what it
        is."""
        centre, width, scale = self.reliability_centre, self.reliability_width, self.reliability_scale
        if isinstance(centre, str) or isinstance(width, str) or isinstance(scale, str):
            raise HdovdError(
                f"pseudo_boxes.reliability_... = {centre}, {width}, {scale}: training needs numbers, as hdovd "
                f"calibrate finds"
            )
        return centre, width, scale


class InstanceLossConfig(Section):
    enabled: bool
    alignment_weight: NonNegative
    relation_weight: NonNegative
    tau: Positive
    relation_tau: Positive
    relation_temperature: Positive
    queue: Annotated[int, Field(ge=0)]


class ClassLossConfig(Section):
    enabled: bool
    weight: NonNegative  # factor on the weights w_j of pseudo boxes
    backgrounds: bool = False  # whether texts of nouns that are backgrounds are negatives beside the learned one
    federated: bool = False  # whether classes that nobody looked for in an image are no negatives there (LVIS)


class ImageLossConfig(Section):
    enabled: bool
    weight: NonNegative
    tau: Positive
    queue: Annotated[int, Field(ge=0)]


class ExtraLossConfig(OpenSection):
    """A loss of the user's own (`extra_losses`)."""

    use: str  # module:Class
    weight: NonNegative


class LossConfig(Section):
    instance: InstanceLossConfig
    class_: ClassLossConfig = Field(alias="class")
    image: ImageLossConfig
    extra: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], ExtraLossConfig] = Field(
        default_factory=dict
    )

    @property
    def uses_pseudo_boxes(self) -> bool:
        return self.instance.enabled or self.class_.enabled

    @property
    def uses_cache(self) -> bool:
        return self.uses_pseudo_boxes or self.image.enabled


class InferenceConfig(Section):
    alpha: Share
    beta: Share
    distillation_scale: Positive
    score_threshold: Share
    nms: Share
    detections_per_image: Count


class ProposalsConfig(Section):
    """The networks of `hdovd propose` (`modeling.proposals`). With defaults, unlike the rest: recipes kept before it
    was there still load.

    The defaults are those of the authors' configuration of OLN (oln_box.py), but `roi_iou`, which is the paper's.
    """

    score_iou: Share = (
        0.3  # anchors of at least this IoU with a base box learn centerness (arXiv 2108.06753, section 3)
    )
    box_iou: Share = 0.7  # anchors of at least this IoU learn the box; so does the best one for a box
    roi_iou: Share = 0.3  # RoIs of at least this IoU learn box and IoU (arXiv 2108.06753, section 3)
    rois: Count = 2000  # that the box head scores, and as many a level of the pyramid at most
    rpn_nms: Share = 1.0  # of RoIs, by centerness; 1 is none
    nms: Share = 0.7  # of proposals, by their score
    centerness_weight: NonNegative = 1.0
    rpn_box_weight: NonNegative = 10.0
    iou_weight: NonNegative = 1.0
    box_weight: NonNegative = 1.0
    epochs: Annotated[int, Field(ge=0)] = 0  # of these networks; 0: train.epochs


class ScheduleConfig(Section):
    epochs: Count
    batch_size: Count  # images a step, of all processes together
    optimizer: Literal["sgd", "adamw"]
    lr: Positive
    momentum: Share  # sgd
    weight_decay: NonNegative
    warmup_iterations: Annotated[int, Field(ge=0)]
    schedule: Literal["step", "cosine"]
    step_epochs: list[Count]  # step
    clip_norm: NonNegative  # 0 is off
    precision: Literal[
        "auto", "fp32", "bf16"
    ]  # auto: bf16 on a device that has it, else fp32; what is recorded is what it came to
    workers: Annotated[int, Field(ge=0)] | Literal["auto"]  # processes that prepare batches
    seed: Annotated[int, Field(ge=0)]
    # With defaults: recipes of before there was a choice mean these.
    accumulate: Count = 1  # micro-batches that the images of a step are split into, one after the other: less memory
    ema: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # decay of the moving average of weights that is validated and kept; 0: none
    )
    compile: bool = False  # the backbone by torch.compile
    # Share of the images below which a class is rare: images of rare classes come sqrt(threshold / share) times as
    # often (arXiv 1908.03195, appendix B); 0: every image once an epoch.
    repeat_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Recipe(Section):
    detector: DetectorConfig
    input: InputConfig
    pseudo_boxes: PseudoBoxConfig
    loss: LossConfig
    inference: InferenceConfig
    train: ScheduleConfig
    proposals: ProposalsConfig = ProposalsConfig()

    def with_reliability(self, centre: float, width: float, scale: float) -> "Recipe":
        """The recipe with these values of the reliability weight."""
        values = {"reliability_centre": centre, "reliability_width": width, "reliability_scale": scale}
        return self.model_copy(update={"pseudo_boxes": self.pseudo_boxes.model_copy(update=values)})

    def with_precision(self, precision: str) -> "Recipe":
        """The recipe trained in this precision, where its own is auto."""
        if self.train.precision != AUTO:
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"precision": precision})})

    @property
    def faster_rcnn(self) -> FasterRCNNConfig:
        """The detector's section, for what is built of Faster R-CNN's parts. Raises HdovdError if it is another
        detector's.
        """
        if not isinstance(self.detector, FasterRCNNConfig):
            raise HdovdError(
                f"detector.name = {self.detector.name!r}: this needs a recipe with detector.name = 'faster_rcnn'"
            )
        return self.detector

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(by_alias=True))


def load_recipe(name_or_file: str, sets: list[str] | tuple[str, ...] = ()) -> Recipe:
    """A shipped recipe or a TOML file, with `key.path=value` settings laid over it. A file with `extends = "NAME"` is
    laid over the shipped recipe NAME.

    Raises HdovdError naming the key and the nearest valid one, or the wrong value.
    """
    tree = _extended(read_shipped(name_or_file, "recipe"), name_or_file)
    for setting in sets:
        _apply(tree, setting)
    return build_recipe(tree, name_or_file)


def _extended(tree: dict[str, Any], origin: str) -> dict[str, Any]:
    """The values of a file over those of the shipped recipe that it extends, if it does. Raises HdovdError."""
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if parent not in shipped("recipes"):
        raise HdovdError(
            f"recipe {origin}: extends is {shown(parent)}, expected a shipped recipe: {', '.join(shipped('recipes'))}"
        )
    return _laid_over(_extended(read_shipped(parent, "recipe"), parent), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections key by key."""
    both = {k for k in below.keys() & above.keys() if isinstance(below[k], dict) and isinstance(above[k], dict)}
    return below | above | {key: _laid_over(below[key], above[key]) for key in both}


def build_recipe(tree: dict[str, Any], origin: str) -> Recipe:
    """Validate a tree of plain values. Raises HdovdError."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [f"  {_explain(dict(e))}" for e in error.errors()[:_MOST_ERRORS]]
        more = error.error_count() - len(lines)
        raise HdovdError(f"recipe {origin}:\n" + "\n".join(lines) + (f"\n  and {more} more" if more else "")) from error


def outside_code(recipe: Recipe) -> dict[str, str]:
    """What a recipe names that is not part of hdovd and runs when its detector is built: values by dotted key.

    Importing a module runs it, so a recipe is to be trusted like code.
    """
    detector, body = recipe.detector.name, recipe.detector.backbone.name
    named = {} if detector in DETECTORS else {"detector.name": detector}
    library, _, model = body.partition(":")
    if body not in BACKBONES and (library not in LIBRARIES or ":" in model):  # timm:hf-hub:... is fetched
        named["detector.backbone.name"] = body
    return named | {f"loss.extra.{name}.use": extra.use for name, extra in recipe.loss.extra.items()}


def _apply(tree: dict[str, Any], setting: str) -> None:
    path, equals, value = setting.partition("=")
    if not equals or not path.strip():
        raise HdovdError(f"--set takes key=value, such as loss.image.enabled=false; got {setting!r}")
    *parents, leaf = path.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise HdovdError(f"--set {setting}: {parent!r} is a value, not a section")
    try:
        tree[leaf] = parse_toml(f"v = {value}")["v"]
    except HdovdError:
        tree[leaf] = value


def _explain(error: dict[str, Any]) -> str:
    form, loc = "", list(error["loc"])
    if loc[0] == "detector" and len(loc) > 1:  # the second is pydantic's name for the form that the section has
        form = str(loc.pop(1))
    path = ".".join(str(p) for p in loc)
    if error["type"] == "extra_forbidden":
        while isinstance(error["input"], dict) and error["input"]:  # an unknown section: name the key that was set
            leaf, error["input"] = next(iter(error["input"].items()))
            path += f".{leaf}"
        near = difflib.get_close_matches(
            path, _keys(Recipe) + (_keys(FORMS[form], "detector.") if form else []), 1, cutoff=0.3
        )
        return f"unknown key {cut(path)}" + (f"; the nearest valid one is {near[0]}" if near else "")
    if error["type"] == "missing":
        return f"missing key {path}"
    given = (
        "" if isinstance(error["input"], dict) else f" = {cut(repr(error['input']))}"
    )  # of a section the message says it
    return f"{cut(path)}{given}: {cut(error['msg'])}"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """The keys of a section; those of the detector's forms are asked for by form."""
    keys = []
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        kind = field.annotation
        keys += _keys(kind, key + ".") if isinstance(kind, type) and issubclass(kind, BaseModel) else [key]
    return keys
