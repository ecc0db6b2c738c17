"""How a detector is written in each form of file, and how such a file is run. Called by `export_model`, its check and Python.

Every form carries the same text beside the weights, strings by name; `CARRIED` says what they are. It is in ONNX's metadata_props, in
TorchScript's extra file `hdovd.json`, and in the header of safetensors.
"""

from __future__ import annotations

import importlib
import json
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401  TorchScript files call its operators
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hdovd.config.plugins import resolve
from hdovd.config.recipe import build_recipe
from hdovd.core.errors import HdovdError
from hdovd.modeling.base import Detector, build_detector
from hdovd.modeling.postprocess import detect
from hdovd.pipelines.export.config import ModelForm

CARRIED = {
    "hdovd": "version of hdovd that wrote the file",
    "about": "inputs and outputs",
    "class_names": "JSON list: the run's classes, base before novel",
    "is_novel": "JSON list of booleans, one a class",
    "class_embeddings": "their text embeddings: base64 of little-endian float32, a row of embedding_size numbers a class",
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
            raise HdovdError(f"--format onnx needs the packages onnx and onnxruntime: pip install 'hdovd[export]' ({error})") from error


def require_traceable(form: ModelForm, detector: Detector) -> None:
    """Raises HdovdError, naming the form that works, if the form needs a trace of a detector that has none."""
    if form is not ModelForm.SAFETENSORS and detector.exportable is None:
        raise HdovdError(f"--format {form.value}: a run of detector {detector.recipe.detector.name} can be exported as safetensors alone "
                         "(--format safetensors), which hdovd opens; there is no form of it that other programs run")


def traceable(detector: Detector) -> nn.Module:
    """The detector as a module over (image, texts, is_novel), in eval mode: one that torch can trace, if it has one."""
    if detector.exportable is None:
        return _OnePicture(detector)
    module: nn.Module = resolve(detector.exportable, "the detector's exportable")(detector)
    return module


class _OnePicture(nn.Module):
    """`Detector.predict` and `detect` of one picture."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector.eval()

    def forward(self, image: Tensor, texts: Tensor, is_novel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = detect(self.detector.predict([image], texts)[0], is_novel, self.detector.recipe.inference)
        return found.boxes, found.scores, found.labels


def write(form: ModelForm, model: Detector, example: tuple[Tensor, Tensor, Tensor], carried: dict[str, str],
          file: Path) -> None:
    """Write a file of a form. `example`: inputs to trace with; the file takes others of any size."""
    with warnings.catch_warnings(), torch.no_grad():
        # That a size could be taken for a constant, and that torch would like another exporter. What came of it is checked afterwards.
        warnings.simplefilter("ignore")
        {ModelForm.ONNX: _write_onnx, ModelForm.TORCHSCRIPT: _write_torchscript, ModelForm.SAFETENSORS: _write_safetensors}[form](
            model, example, carried, file)


def open_model(form: ModelForm, file: Path) -> tuple[Run, dict[str, str]]:
    """Open a file that `write` wrote, as its user would: a function of (image, texts, is_novel), and what the file carries.

    The function is that of `traceable`. A safetensors file names the backbone, which may be code (docs/EXTENDING.md).
    """
    return {ModelForm.ONNX: _open_onnx, ModelForm.TORCHSCRIPT: _open_torchscript, ModelForm.SAFETENSORS: _open_safetensors}[form](file)


def _write_onnx(model: Detector, example: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    import onnx

    sizes = {"image": {1: "height", 2: "width"}, "texts": {0: "classes"}, "is_novel": {0: "classes"}}
    found = {name: {0: "detections"} for name in OUTPUTS}
    # The exporter that follows torch.export keeps no NMS whose result has a length of its own; this one is in torch 2.6 to 2.15 at least.
    torch.onnx.export(traceable(model), example, str(file), input_names=list(INPUTS), output_names=list(OUTPUTS),
                      dynamic_axes=sizes | found, opset_version=_OPSET, dynamo=False)
    written = onnx.load(str(file))
    if "is_novel" not in {given.name for given in written.graph.input}:  # a run with one score alone asks for none of it
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


def _write_torchscript(model: Detector, example: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    save_traced(torch.jit.trace(traceable(model), example, check_trace=False), file, {"hdovd.json": json.dumps(carried)})


def save_traced(traced: Any, file: Path, texts: dict[str, str]) -> None:
    """Write a TorchScript file: by way of memory, since torch itself ends the process where a disk is full."""
    file.write_bytes(traced.save_to_buffer(_extra_files=texts))


def _open_torchscript(file: Path) -> tuple[Run, dict[str, str]]:
    extra: dict[str, Any] = {"hdovd.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls all of TorchScript deprecated
        return torch.jit.load(str(file), map_location="cpu", _extra_files=extra), json.loads(extra["hdovd.json"])


def _write_safetensors(model: Detector, _: tuple[Tensor, ...], carried: dict[str, str], file: Path) -> None:
    state = model.state_dict()
    save_file({name: value.contiguous() for name, value in state.items() if not name.startswith(model.training_parts)}, file, carried)


def _open_safetensors(file: Path) -> tuple[Run, dict[str, str]]:
    with safe_open(file, framework="pt") as opened:
        carried = dict(opened.metadata())
    model = build_detector(build_recipe(tomllib.loads(carried["recipe"]), str(file)), int(carried["embedding_size"]), log=None)
    fit = model.load_state_dict(load_file(file), strict=False)
    if fit.unexpected_keys or (missing := [name for name in fit.missing_keys if not name.startswith(model.training_parts)]):
        raise HdovdError(f"{file} does not hold the detector of its recipe: unknown {fit.unexpected_keys}, missing {missing}")
    return traceable(model), carried
