"""Options of commands without a config of their own."""

from typing import Annotated

import typer

from hdovd.pipelines.common.precision import Precision

Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Batch = Annotated[
    str,
    typer.Option(
        "--batch",
        "--batch-size",
        help="Crops that CLIP embeds at a time (or the pixels of so many), or auto: found by trying.",
    ),
]
Workers = Annotated[
    str, typer.Option("--workers", help="Processes that decode and crop, or auto: none on a CPU, up to 16 for a GPU.")
]
Compute = Annotated[
    Precision,
    typer.Option("--precision", help="What CLIP computes in; auto: what suits the device (docs/MACHINES.md)."),
]
