"""`hdovd cache`: what lies in a feature cache, whether it is sound, and what of it nothing needs."""

from shlex import quote
from typing import Annotated

import typer

from hdovd.cache import Catalog
from hdovd.cli.command import command
from hdovd.cli.main import new_app
from hdovd.pipelines.cache_tools.config import CheckConfig, ForeignFormat, ImportConfig, ViewConfig
from hdovd.pipelines.extraction.source import CacheSet, ExportConfig, ExportForm

app = new_app(
    no_args_is_help=True,
    help="""A cache holds products of one level each (boxes, instance, image, class, noun, pseudo_label),
    named by a key that follows from all that made them. A set names products that belong together;
    hdovd train reads one.
    """,
)

Cache = Annotated[str, typer.Argument(help="The cache: a folder, or hf://USER/NAME, s3://, gs://.")]


@app.command()
def ls(cache: Cache) -> None:
    """List all products: size, rows, model, age, and which sets and runs use them."""
    catalog = Catalog(cache)
    from hdovd.pipelines.cache_tools.listing import product_lines

    typer.echo("\n".join(product_lines(catalog)))


@app.command()
def info(
    cache: Cache,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[KEY]",
            help="A product by the first characters of its key (4 at least), or a "
            "set by its name. Default: the set default.",
        ),
    ] = None,
) -> None:
    """Tell all of a set or a product: what made it, images that could not be read, what was skipped, runs."""
    catalog = Catalog(cache)
    from hdovd.pipelines.cache_tools.listing import info_lines

    typer.echo("\n".join(info_lines(catalog, name)))


@app.command()
def diff(
    cache: Cache,
    a: Annotated[str, typer.Argument(metavar="A", help="A set, or a product by the first characters of its key.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    other: Annotated[str | None, typer.Option("--other", help="Look for B in this cache.")] = None,
) -> None:
    """Say which inputs differ between two products, or level by level between two sets."""
    first, second = Catalog(cache), Catalog(other or cache)
    from hdovd.pipelines.cache_tools.listing import difference_lines

    typer.echo("\n".join(difference_lines(first, a, second, b)))


@app.command()
def gc(
    cache: Cache,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it. Without, it is only listed.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Delete unfinished products too.")] = False,
    drop_set: Annotated[
        str | None,
        typer.Option("--drop-set", metavar="NAME", help="Delete this set first: what it alone uses goes too."),
    ] = None,
) -> None:
    """List what no set and no run uses, and what dead processes left behind; --yes deletes it.

    A run counts while its folder is there, as seen from this machine.
    """
    catalog = Catalog(cache)
    from hdovd.pipelines.cache_tools.listing import Garbage, delete_garbage, find_garbage, garbage_lines
    from hdovd.pipelines.common.console import size

    garbage = find_garbage(catalog, drop_set)
    for line in garbage_lines(garbage):
        typer.echo(line)
    if garbage == Garbage() and drop_set is None:
        typer.echo("everything is in use: there is nothing to delete")
    elif yes:
        deleted, left = delete_garbage(catalog, garbage, unfinished=unfinished, without_set=drop_set)
        for entry in left:
            typer.echo(f"left alone, an extraction is running that needs it: {entry.level} {entry.key[:12]}")
        typer.echo(f"deleted {size(deleted)}")
    else:
        typer.echo(
            f"nothing was deleted; with --yes it would be {size(garbage.bytes(unfinished=unfinished))}"
            + (" (and the unfinished ones with --unfinished)" if garbage.unfinished and not unfinished else "")
        )


@app.command()
@command
def verify(config: CheckConfig) -> None:
    """Check every checksum, table and row, of tar shards too; name what is damaged; exit with 1 if anything is.

    --sample needs the pictures and the CLIP; with --data, pictures that have changed are found too. A set knows
    what it was made from; the options from --data on say where that is now.
    """
    from hdovd.pipelines.cache_tools.verify import check_cache

    if check_cache(config).findings:
        raise typer.Exit(1)


@app.command()
@command
def index(config: CacheSet) -> None:
    """Build an index of a set's boxes, for hdovd search --index, unless it is there; say how many of the best it finds
    and how fast.

    Needs pip install "hdovd[index]". It lies beside the rows in the cache, and goes with them. See docs/SEARCH.md.
    """
    from hdovd.pipelines.search.nearest import index_rows

    index_rows(config)


@app.command()
@command
def export(config: ExportConfig) -> None:
    """Write a set of features in a form that other programs read.

    webdataset: pictures, base annotations, boxes and embeddings of each image together, in tar shards to train from as
    a stream. Killed? The same command goes on where it was. Next: hdovd train --cache OUT, which needs no other data.

    parquet: a row a box, with its image, class or noun, and embedding, for DuckDB, pandas and others that read tables.
    Needs pip install 'hdovd[parquet]'.

    lance: the same as the table boxes of a LanceDB database, a folder, in place of one of that name. Needs pip install
    'hdovd[lance]'.

    crops: a folder of the proposals' crops, crops/ROW.jpg, and questions.jsonl, a line for each with the noun that it
    has: for another model to answer in that form, and extract-clip --verdicts to read (docs/LABELS.md).

    The data are those of the extraction unless they are given.
    """
    from hdovd.pipelines.extraction.export import export as run

    run(config)
    if config.to is ExportForm.WEBDATASET:
        typer.echo(f"next: hdovd train --cache {quote(str(config.out))} --out RUN ...")


@app.command("import")
@command
def import_(config: ImportConfig) -> None:
    """Turn embeddings that others published into a cache. Its identity says "imported, origin unknown".

    Files are read without running code in them: .pth as weights only, .pkl as arrays and lists alone.
    --format webdataset: tar shards become the cache again that they were exported from; no other option is read.
    """
    if config.format is ForeignFormat.WEBDATASET:
        from hdovd.pipelines.extraction.export import import_tars

        import_tars(config.source, config.cache)
    else:
        from hdovd.pipelines.cache_tools.importing import import_features

        import_features(config)
    typer.echo(f"next: hdovd cache info {quote(str(config.cache))}")


@app.command()
@command
def view(config: ViewConfig) -> None:
    """Show what the cache knows of an image: a picture of its boxes with a legend beside them, and the same as a table.

    Of each box: its class or noun, the cosine, the weight of its label in training, and the class names that it is most
    like. Weights are those of --calibration or --recipe, or as training has them by itself. CLIP is not needed. The
    cache knows where its data are; --data and --protocol say it anew.
    """
    from hdovd.pipelines.cache_tools.view import view_images

    view_images(config)
