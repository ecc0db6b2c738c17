"""Export of a run's detector as one file for other programs, with classes as an input: how each form is written, run
and checked.

The file is run before it gets its name: what does not find the model's detections is no export of it. A picture is as
good a test as its detections, and a trained model may find none in made-up ones. So it is also asked for made-up
classes, which are the model's own features of some of its regions: what they name is there.

Boxes are compared at the scale that the network sees, in percent of the long side of its input: what float32 leaves
open grows with that. A ResNet-50 at 1,333 pixels is up to 0.006 pixels from itself where torch takes other kernels,
5e-4 percent.

Every form carries the same text beside the weights, strings by name; `CARRIED` says what they are. It is in ONNX's
metadata_props, in TorchScript's extra file `hdovd.json`, and in the header of safetensors.
"""

import base64
import importlib
import json
import math
import tomllib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision  # noqa: F401  TorchScript files call its operators
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdovd.config.recipe import InferenceConfig, InputConfig, build_recipe
from hdovd.core import HdovdError, __version__, log
from hdovd.modeling.base import Detector as Model, build_detector
from hdovd.modeling.batching import input_size
from hdovd.modeling.boxes import Detections, detect
from hdovd.modeling.export.detectors import ExportableDetector, traceable
from hdovd.pipelines.common.atomic_write import replace_file
from hdovd.pipelines.common.images import decode, pixels_of
from hdovd.pipelines.detection.detector import Detector
from hdovd.pipelines.export.config import ExportModelConfig, ModelForm
from hdovd.pipelines.runs import RunFolder, Weights

_SIZES = ((150, 110), (96, 170))  # width, height: neither has the shape of what is traced
_LARGER = (1.75, 1.25)  # width and height of another one in short sides of the input: it is made smaller, as photos are
_MADE_UP_CLASSES = 7


@dataclass(frozen=True, slots=True)
class Checked:
    """`difference`: the largest of `detections` in `pictures`, of boxes in percent of the input's long side and of
    scores; inf if one is not finite.
    """

    pictures: int
    detections: int
    difference: float


def check(
    run: "Run", model: Model, texts: Tensor, is_novel: Tensor, pictures: Sequence[Tensor], batch: bool = False
) -> Checked:
    """Set a file's detections against those of `Detector.predict` and `detect`.

    Args:
        run: the file. model: that it was made of. pictures: (3, h, w) uint8 each. batch: whether the file takes several
        at once: each with its mirror image.
        texts: (C, D) the run's classes. is_novel: (C,) bool.
    """
    config, detector, worst, count = model.recipe.inference, traceable(model.eval()), 0.0, 0
    with torch.inference_mode():
        for number, picture in enumerate(pictures):
            classes = _made_up_classes(detector, picture, texts)
            novel = torch.arange(len(classes)) % 2 == 1
            if number % 2 == 0:  # with the run's own, and without: the number of classes is the user's choice
                classes, novel = torch.cat([texts, classes]), torch.cat([is_novel, novel])
            given = (picture, picture.flip(2)) if batch else (picture,)
            found = run(torch.stack(given) if batch else picture, classes, novel)
            for image, rows in zip(given, zip(*found, strict=True) if batch else [found], strict=True):
                expected = detect(model.predict([image], classes)[0], novel, config)
                kept = rows[1] != 0  # a batch has zeros, so that its pictures have as many each
                there = Detections(*(part[kept] for part in rows))
                one, other = (in_percent(d, picture, model.recipe.input) for d in (expected, there))
                worst, count = max(worst, largest_difference(one, other, config)), count + len(expected.scores)
    return Checked(len(pictures), count, worst)


def in_percent(found: Detections, picture: Tensor, config: InputConfig) -> Detections:
    """Detections with boxes in percent of the long side of the detector's input in place of pixels of the picture (3,
    h, w).
    """
    height, width = picture.shape[1:]
    high, wide = input_size(height, width, config.short_side, config.long_side)
    return replace(found, boxes=found.boxes * torch.tensor([wide / width, high / height] * 2) * 100 / config.long_side)


def _made_up_classes(detector: nn.Module | None, picture: Tensor, texts: Tensor) -> Tensor:
    """(n, D): features of some regions, where the detector tells them; else its classes in mixtures."""
    if isinstance(detector, ExportableDetector):
        features = detector.rois(picture).c
        return features[:: -(-max(len(features), 1) // _MADE_UP_CLASSES)]
    return texts + texts.roll(1, 0)


def largest_difference(one: Detections, other: Detections, config: InferenceConfig) -> float:
    """The largest difference of a coordinate or a score between detections and their nearest of the same class on the
    other side.

    One without such a partner counts by how far its score is above what the other side cut off: the threshold, or its
    last detection if it has as many as are allowed.
    """
    if not (one.boxes.isfinite().all() and other.boxes.isfinite().all() and other.scores.isfinite().all()):
        return math.inf
    return max(_from(one, other, config), _from(other, one, config))


def _from(one: Detections, other: Detections, config: InferenceConfig) -> float:
    if not len(one.scores):
        return 0.0
    full = len(other.scores) >= config.detections_per_image
    cut = other.scores.min().item() if full else config.score_threshold
    nearest = (one.scores - cut).clamp(min=0)
    if len(other.scores):
        rows, others = (torch.cat([d.boxes, d.scores[:, None]], dim=1) for d in (one, other))
        apart = (rows[:, None] - others).abs().amax(dim=2)
        nearest = torch.minimum(nearest, apart.where(one.labels[:, None] == other.labels, math.inf).amin(dim=1))
    return float(nearest.max())


def made_up_pictures(config: InputConfig) -> list[Tensor]:
    """(3, h, w) uint8: coloured shapes on noise, the same every time; small ones, and one that is larger than the
    input.
    """
    drawn, larger = [], tuple(round(part * config.short_side) for part in _LARGER)
    for seed, (width, height) in enumerate((*_SIZES, larger)):
        rng = np.random.default_rng(seed)
        picture = Image.fromarray(rng.integers(60, 196, (height // 6, width // 6, 3), np.uint8)).resize((width, height))
        draw = ImageDraw.Draw(picture)
        for number in range(9):
            x, y, side = (
                rng.integers(0, width - 20),
                rng.integers(0, height - 20),
                rng.integers(15, min(width, height) // 2),
            )
            box = [(int(x), int(y)), (int(x + side), int(y + side * rng.uniform(0.6, 1.4)))]
            (draw.ellipse if number % 2 else draw.rectangle)(
                box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)), outline="black"
            )
        drawn.append(pixels_of(picture))
    return drawn


CARRIED = {
    "hdovd": "version of hdovd that wrote the file",
    "about": "inputs and outputs",
    "class_names": "JSON list: the run's classes, base before novel, and those of examples",
    "is_novel": "JSON list of booleans, one a class",
    "class_embeddings": "their text embeddings: base64 of little-endian float32, a row of embedding_size numbers a "
    "class",
    "embedding_size": "D",
    "clip": "JSON: which CLIP the embeddings must be of",
    "templates": "JSON list: the prompts of the run's own embeddings",
    "protocol": "name of the base/novel split",
    "weights": "last or best epoch",
    "recipe": "the run's recipe, TOML",
}
INPUTS, OUTPUTS = ("image", "texts", "is_novel"), ("boxes", "scores", "labels")
_OPSET = 17

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def require(form: ModelForm) -> None:
    """Raises HdovdError, with what to install, if a package that the form needs cannot be imported."""
    for package in ("onnx", "onnxruntime") if form is ModelForm.ONNX else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise HdovdError(
                f"--format onnx needs the packages onnx and onnxruntime: pip install 'hdovd[export]' ({error})"
            ) from error


def write(
    form: ModelForm, model: Model, example: tuple[Tensor, Tensor, Tensor], carried: dict[str, str], file: Path
) -> None:
    """Write a file of a form. `example`: inputs to trace with; the file takes others of any size."""
    with warnings.catch_warnings(), torch.no_grad():
        # That a size could be taken for a constant, and that torch would like another exporter. What came of it is
        # checked afterwards.
        warnings.simplefilter("ignore")
        {
            ModelForm.ONNX: _write_onnx,
            ModelForm.TORCHSCRIPT: _write_torchscript,
            ModelForm.SAFETENSORS: _write_safetensors,
        }[form](model, example, carried, file)


def open_model(form: ModelForm, file: Path) -> tuple[Run, dict[str, str]]:
    """Open a file that `write` wrote, as its user would: a function of (image, texts, is_novel), and what the file
    carries.

    A safetensors file names the backbone, which may be code (docs/EXTENDING.md).
    """
    return {
        ModelForm.ONNX: _open_onnx,
        ModelForm.TORCHSCRIPT: _open_torchscript,
        ModelForm.SAFETENSORS: _open_safetensors,
    }[form](file)


def _write_onnx(model: Model, example: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    import onnx

    sizes = {"image": {1: "height", 2: "width"}, "texts": {0: "classes"}, "is_novel": {0: "classes"}}
    found = {name: {0: "detections"} for name in OUTPUTS}
    if example[0].dim() == 4:
        sizes["image"] = {0: "pictures", 2: "height", 3: "width"}
        found = {name: {0: "pictures", 1: "detections"} for name in OUTPUTS}
    # The exporter that follows torch.export keeps no NMS whose result has a length of its own; this one is in torch 2.6
    # to 2.15 at least.
    torch.onnx.export(
        cast(nn.Module, traceable(model)),
        example,
        str(file),
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        dynamic_axes=sizes | found,
        opset_version=_OPSET,
        dynamo=False,
    )
    written = onnx.load(str(file))
    if "is_novel" not in {
        given.name for given in written.graph.input
    }:  # a run with one score alone asks for none of it
        written.graph.input.append(onnx.helper.make_tensor_value_info("is_novel", onnx.TensorProto.BOOL, ["classes"]))
    written.doc_string = carried["about"]
    onnx.helper.set_model_props(written, carried)
    onnx.save(written, str(file))


def _open_onnx(file: Path) -> tuple[Run, dict[str, str]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)}
        boxes, scores, labels = map(torch.from_numpy, session.run(list(OUTPUTS), given))
        return boxes, scores, labels

    return run, dict(session.get_modelmeta().custom_metadata_map)


def _write_torchscript(model: Model, example: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    save_traced(
        torch.jit.trace(traceable(model), example, check_trace=False), file, {"hdovd.json": json.dumps(carried)}
    )


def save_traced(traced: Any, file: Path, texts: dict[str, str]) -> None:
    """Write a TorchScript file: by way of memory, since torch itself ends the process where a disk is full."""
    file.write_bytes(traced.save_to_buffer(_extra_files=texts))


def _open_torchscript(file: Path) -> tuple[Run, dict[str, str]]:
    extra: dict[str, Any] = {"hdovd.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of TorchScript deprecated
        return torch.jit.load(str(file), map_location="cpu", _extra_files=extra), json.loads(extra["hdovd.json"])


def _write_safetensors(model: Model, _: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    save_file(
        {
            name: value.contiguous()
            for name, value in model.state_dict().items()
            if not name.startswith(model.training_parts)
        },
        file,
        carried,
    )


def _open_safetensors(file: Path) -> tuple[Run, dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        carried = dict(opened.metadata())
    model = build_detector(
        build_recipe(tomllib.loads(carried["recipe"]), str(file)), int(carried["embedding_size"]), initialise=False
    )
    fit = model.eval().load_state_dict(load_file(file), strict=False)
    missing = [name for name in fit.missing_keys if not name.startswith(model.training_parts)]
    if fit.unexpected_keys or missing:
        raise HdovdError(
            f"{file} does not hold the detector of its recipe: unknown {fit.unexpected_keys}, missing {missing}"
        )

    def run(image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = detect(model.predict([image], texts)[0], is_novel, model.recipe.inference)
        return found.boxes, found.scores, found.labels

    return run, carried


TOLERANCE = 1e-3  # of boxes in percent of the input's long side, and of scores


def export_model(job: ExportModelConfig) -> Checked:
    """Write the detector of a run to one file. Raises HdovdError for bad input, and if the file does not find what the
    model finds.
    """
    require(job.form)
    job.check()
    run = RunFolder(job.run, job.trust)
    recipe, (names, texts, is_novel) = run.recipe(), _classes(job, run)
    pictures = made_up_pictures(recipe.input) + [decode(path).pixels for path in job.check_images]
    model = build_detector(recipe, texts.shape[1], initialise=False)
    traced = traceable(model)
    if job.form is not ModelForm.SAFETENSORS and traced is None:
        raise HdovdError(
            f"--format {job.form.value}: a run of detector {recipe.detector.name} can be exported as safetensors alone "
            f"(--format safetensors), which hdovd opens; there is no form of it that other programs run"
        )
    if job.batch and not getattr(traced, "batches", False):
        raise HdovdError(
            f"--batch: detector {recipe.detector.name} with [inference] nms = {recipe.inference.nms:g} takes one "
            f"picture at a time; batches are for a detector without NMS (rtdetr with nms = 1)"
        )
    run.load_model(model, job.weights.file)
    log(f"{job.run}: {job.weights.value} weights, {len(texts)} classes, embeddings of {texts.shape[1]} numbers")
    smaller = pictures[0][:, :90, :120].contiguous()  # and of another shape than what is checked
    if job.batch:
        smaller = smaller.repeat(3, 1, 1, 1)  # and of another number
    about, checked = carried(run, job.weights, names, texts, is_novel, job.batch), list[Checked]()

    def write_checked(partial: Path) -> None:
        try:
            write(job.form, model, (smaller, texts, is_novel), about, partial)
        except (torch.onnx.OnnxExporterError, RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"torch {torch.__version__} cannot export a detector with backbone {recipe.detector.backbone.name}: "
                f"{error}"
            ) from error
        checked.append(check(open_model(job.form, partial)[0], model, texts, is_novel, pictures, job.batch))
        if not checked[0].difference <= TOLERANCE:
            raise HdovdError(
                f"{job.out} was not written: run as {job.form.value}, the detector with backbone "
                f"{recipe.detector.backbone.name} differs from the model by {checked[0].difference:.2g} (score, or "
                f"percent of its input's long side), more than {TOLERANCE:g}; try --format safetensors"
            )

    replace_file(job.out, write_checked)
    found = checked[0]
    log(
        f"checked: {found.detections} detections in {found.pictures} pictures; largest difference from the model "
        f"{found.difference:.1e} (scores; boxes in percent of the input's long side)",
        f"wrote {job.out} ({job.form.value}, {job.out.stat().st_size / 1e6:.1f} MB)",
    )
    return found


def _classes(job: ExportModelConfig, run: RunFolder) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Names of C classes, their rows (C, D) and which are novel (C,) bool: those of the run's protocol, and of examples
    that are none of them after those.
    """
    protocol = run.protocol()
    if job.examples is None:
        return protocol.names, run.class_embeddings().float(), torch.arange(len(protocol.names)) >= len(protocol.base)
    detector = Detector.from_run(
        job.run, weights=job.weights, device="cpu", clip=job.clip, pretrained=job.pretrained, trust=job.trust
    )
    detector.set_examples(job.examples, images=job.example_images, names=protocol.names, mix=job.mix)
    place = {name: number for number, name in enumerate(protocol.names)}
    order = sorted(range(len(detector.names)), key=lambda row: place.get(detector.names[row], len(place)))
    return tuple(detector.names[row] for row in order), detector.class_embeddings[order], detector.is_novel[order]


def carried(
    run: RunFolder, weights: Weights, names: Sequence[str], texts: Tensor, is_novel: Tensor, batch: bool = False
) -> dict[str, str]:
    """The text of `CARRIED` for a run and classes with rows (C, D)."""
    protocol = run.protocol()
    made = dict(run.record()["cache"]["levels"].get("class", {}).get("inputs", {}))  # what made the class embeddings
    about = (
        f"image: (3, height, width) uint8 RGB, as decoded, any size; resizing and normalisation are inside. texts: "
        f"(classes, "
        f"{texts.shape[1]}) float32, CLIP text embeddings of any class names. is_novel: (classes,) bool, true for "
        f"classes that had no "
        "boxes in training. boxes: (detections, 4) x0, y0, x1, y1 pixels of the image. scores: (detections,) best "
        "first. labels: "
        "(detections,) int64, rows of texts. Threshold, NMS within each class and cap are inside, as in recipe "
        "[inference]."
    )
    of_batch = (
        " A batch: image is (pictures, 3, height, width); boxes, scores and labels have a row a picture, as many "
        "detections of each; a score that is not over the threshold is 0."
    )
    values = {
        "hdovd": __version__,
        "about": about + of_batch if batch else about,
        "class_names": json.dumps(names),
        "is_novel": json.dumps(is_novel.tolist()),
        "class_embeddings": base64.b64encode(texts.numpy().astype("<f4").tobytes()).decode(),
        "embedding_size": str(texts.shape[1]),
        "clip": json.dumps(made.get("clip")),
        "templates": json.dumps(made.get("templates")),
        "protocol": protocol.name,
        "weights": weights.value,
        "recipe": run.recipe().to_toml(),
    }
    assert values.keys() == CARRIED.keys()
    return values
