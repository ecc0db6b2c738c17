"""`hdovd export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.pipelines.export.config import ModelForm
from hdovd.pipelines.runs.weights import Weights


def export(
    run: Annotated[Path, typer.Argument(help="The run folder that hdovd train wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    form: Annotated[ModelForm | None, typer.Option("--format", help="onnx: for onnxruntime, written with hdovd's extra export; "
                                                   "torchscript: for torch.jit.load, with torchvision; safetensors: the weights. Default: "
                                                   "what the name of --out ends in, .onnx, .pt or .safetensors.")] = None,
    weights: Annotated[Weights, typer.Option(help="Of the last epoch, or of the one with the best validation AP50 of base classes.")
                       ] = Weights.LAST,
    check_image: Annotated[list[Path] | None, typer.Option("--check-image", help="A picture to check the file on, besides those that "
                                                           "are made up. Repeatable.")] = None,
    trust: options.Trust = False,
) -> None:
    """The file holds the run's class names and embeddings too. It is run before it gets its name, and refused if it does not find what
    the model finds: scores to 1e-3, boxes to 1e-3 percent of the long side of the detector's input, to which any picture is resized.
    """
    from hdovd.pipelines.export.config import ExportModelConfig

    form = ModelForm.of(out, form)
    job = ExportModelConfig(run, form, out, weights, tuple(check_image or ()), trust)
    job.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.export.model import export_model

    done = export_model(job, typer.echo)
    typer.echo(f"checked: {done.checked.detections} detections in {done.checked.pictures} pictures; largest difference from the model "
               f"{done.checked.difference:.1e} (scores; boxes in percent of the input's long side)")
    typer.echo(f"wrote {done.file} ({form.value}, {done.bytes / 1e6:.1f} MB)")
