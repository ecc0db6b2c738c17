"""`hdovd proposals`: what a proposal file holds, and other forms of it."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli.main import new_app
from hdovd.pipelines.common.options import ListOrder

app = new_app(
    no_args_is_help=True,
    help="""Read are COCO results JSON, hdovd's .npz, and the .pkl of mmdetection and Detectron2 (without running what is in it).
    A proposal file has an identity: a hash of boxes and scores by image id, whatever its form and order.
    """,  # noqa: E501
)

Source = Annotated[Path, typer.Argument(metavar="FILE", help="The proposal file: .json, .npz or .pkl.")]
Annotations = Annotated[
    Path | None,
    typer.Option(
        "--annotations", help="The annotation file whose images a .pkl list goes through; other forms need none."
    ),
]
Order = Annotated[
    ListOrder,
    typer.Option("--order", help="How a .pkl list goes through them: as the file lists them, or by image id."),
]


@app.command()
def convert(
    source: Source,
    out: Annotated[Path, typer.Option("--out", help="What to write: .npz, or .json for COCO results.")],
    annotations: Annotations = None,
    order: Order = ListOrder.FILE,
) -> None:
    """Write the proposals in another form: the same boxes, scores and identity, and what made them if that is known."""
    from hdovd.pipelines.proposal_files.file import convert_proposals

    convert_proposals(source, out, annotations, order)


@app.command()
def info(source: Source, annotations: Annotations = None, order: Order = ListOrder.FILE) -> None:
    """Tell how many proposals a file holds, their identity, and what made them."""
    from hdovd.pipelines.proposal_files.file import info_lines

    typer.echo("\n".join(info_lines(source, annotations, order)))
