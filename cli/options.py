"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import PLAIN_BOX, CropRecipe, DenseRecipe
from hdovd.pipelines.extraction.config import InstanceTeacher

Data = Annotated[Path | None, typer.Option("--data", help="COCO folder: train2017/, val2017/, annotations/instances_*.json.")]
Images = Annotated[Path | None, typer.Option("--images", help="Image folder, instead of the one under --data.")]
Annotations = Annotated[Path | None, typer.Option("--annotations", help="instances JSON, instead of the one under --data.")]
Protocol = Annotated[str, typer.Option("--protocol", help="The base/novel split: ov-coco, or a TOML file with name, base and novel.")]
Templates = Annotated[
    str, typer.Option("--templates", help="Prompts: photo, vild, clip80, or a file, one a line: {} is the name, {article} its a or an.")
]
Synonyms = Annotated[Path | None, typer.Option("--synonyms", help='TOML: couch = ["couch", "sofa"]: all names of some classes.')]
ClassEmbeddings = Annotated[
    Path | None, typer.Option("--class-embeddings", help="A row for each class, base then novel, instead of its name's embedding: "
                              "learned prompts. One array in .npy, .safetensors, .pt.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Batch = Annotated[str, typer.Option("--batch", "--batch-size", help="Crops that CLIP embeds at a time (or the pixels of so many), or "
                                    "auto: found by trying.")]
Workers = Annotated[
    str, typer.Option("--workers", help="Processes that decode and crop, or auto: none on a CPU, up to 16 for a GPU.")
]
Compute = Annotated[
    Precision, typer.Option("--precision", help="What CLIP computes in; auto: what the cache was begun in, else what suits the device "
                            "(docs/MACHINES.md). Embeddings are stored as float16.")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A shipped recipe or a TOML file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a value of the recipe: loss.image.enabled=false. Repeatable.")]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="What hdovd calibrate wrote: how far to trust pseudo labels, over the recipe's values.")
]
Init = Annotated[
    Path | None, typer.Option("--init", help="A run whose weights training begins with, such as import-checkpoint wrote: losses' memories, "
                              "optimizer and schedule begin anew.")
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import code and ask addresses that RUN names, and take it as it was changed, though it was not "
                       "trained here by you.")
]
Features = Annotated[str, typer.Option("--features", help="The name of a set of features: products of one cache that belong together.")]


def batch_size(text: str) -> int | None:
    """What --batch says; None for auto. Raises HdovdError for anything else."""
    return _number_or_auto("--batch", text, 1)


def workers(text: str) -> int | None:
    """What --workers says; None for auto. Raises HdovdError for anything else."""
    return _number_or_auto("--workers", text, 0)


def _number_or_auto(option: str, text: str, least: int) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < least:
        raise HdovdError(f"{option} {text}: expected auto, or a whole number from {least} on")
    return int(text)


def recipe(teacher: InstanceTeacher, side: int | None, crop: CropRecipe) -> CropRecipe | DenseRecipe:
    """What becomes of a box. Raises HdovdError for options that are of no use with the teacher."""
    if teacher is InstanceTeacher.DENSE:
        if crop != PLAIN_BOX:
            raise HdovdError("--crop and --crop-scales are of crops: they have no use with --instance-teacher dense")
        return DenseRecipe(side)
    if side is not None:
        raise HdovdError("--dense-side needs --instance-teacher dense")
    return crop
