"""`hdovd cache`: what lies in a feature cache, whether it is sound, and what of it nothing needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hdovd.cli import cache_view, export_cache, import_cache, options
from hdovd.cli.lazy import new_app
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.teachers.activation import Activation

app = new_app(
    no_args_is_help=True,
    help="""A cache holds products of one level each (boxes, instance, image, class, noun, pseudo_label),
    named by a key that follows from all that made them. A set names products that belong together;
    hdovd train reads one.
    """,
)

Cache = Annotated[str, typer.Argument(help="The cache: a folder, or s3://, gs://.")]


@app.command()
def ls(cache: Cache) -> None:
    """List all products: size, rows, model, age, and which sets and runs use them."""
    from hdovd.cache.catalog import Catalog

    catalog = Catalog(cache)
    from hdovd.pipelines.cache_tools.listing import product_lines

    _print(product_lines(catalog))


@app.command()
def info(
    cache: Cache,
    name: Annotated[str | None, typer.Argument(metavar="[KEY]", help="A product by the first characters of its key (4 at least), or a "
                                               "set by its name. Default: the set default.")] = None,
) -> None:
    """Tell all of a set or a product: what made it, images that could not be read, what was skipped, runs."""
    from hdovd.cache.catalog import Catalog

    catalog = Catalog(cache)
    from hdovd.pipelines.cache_tools.listing import info_lines

    _print(info_lines(catalog, name))


@app.command()
def diff(
    cache: Cache,
    a: Annotated[str, typer.Argument(metavar="A", help="A set, or a product by the first characters of its key.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What to compare it with.")],
    other: Annotated[str | None, typer.Option("--other", help="Look for B in this cache.")] = None,
) -> None:
    """Say which inputs differ between two products, or level by level between two sets."""
    from hdovd.cache.catalog import Catalog

    first, second = Catalog(cache), Catalog(other or cache)
    from hdovd.pipelines.cache_tools.listing import difference_lines

    _print(difference_lines(first, a, second, b))


@app.command()
def gc(
    cache: Cache,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it. Without, it is only listed.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Delete unfinished products too.")] = False,
    drop_set: Annotated[
        str | None, typer.Option("--drop-set", metavar="NAME", help="Delete this set first: what it alone uses goes too.")
    ] = None,
) -> None:
    """List what no set and no run uses, and what dead processes left behind; --yes deletes it.

    A run counts while its folder is there, as seen from this machine.
    """
    from hdovd.cache.catalog import Catalog

    catalog = Catalog(cache)
    from hdovd.cache.inventory import delete_garbage, find_garbage
    from hdovd.pipelines.cache_tools.listing import garbage_lines
    from hdovd.pipelines.common.format import size

    garbage = find_garbage(catalog, drop_set)
    _print(garbage_lines(garbage))
    if not garbage.everything and drop_set is None:
        typer.echo("everything is in use: there is nothing to delete")
    elif yes:
        deleted, left = delete_garbage(catalog, garbage, unfinished=unfinished, without_set=drop_set)
        for entry in left:
            typer.echo(f"left alone, an extraction is running that needs it: {entry.level} {entry.key[:12]}")
        typer.echo(f"deleted {size(deleted)}")
    else:
        typer.echo(f"nothing was deleted; with --yes it would be {size(garbage.bytes(unfinished=unfinished))}"
                   + (" (and the unfinished ones with --unfinished)" if garbage.unfinished and not unfinished else ""))


@app.command()
def verify(
    cache: Cache,
    features: Annotated[str | None, typer.Option("--features", help="Check one set alone. Default: all products.")] = None,
    sample: Annotated[int, typer.Option("--sample", min=0, metavar="N", help="Encode N rows of images and boxes again.")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Which rows --sample takes.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Mark what is damaged as missing: extract-clip makes it again.")] = False,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    clip: Annotated[str | None, typer.Option("--clip", help="The CLIP that the cache was made with, if it is elsewhere now.")] = None,
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with a model name.")] = None,
    proposals: Annotated[Path | None, typer.Option("--proposals", help="Where the proposals are now.")] = None,
    vocabulary: Annotated[Path | None, typer.Option("--vocabulary", help="Where the vocabulary is now.")] = None,
    captions: Annotated[Path | None, typer.Option("--captions", help="Where the captions are now.")] = None,
    nouns: Annotated[Path | None, typer.Option("--nouns", help="Where the file of nouns is now.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="ov-coco, or where the protocol's TOML file is now.")] = None,
    templates: Annotated[str | None, typer.Option("--templates", help="The prompts: photo, vild, clip80, or a file, one a line.")] = None,
    synonyms: Annotated[Path | None, typer.Option("--synonyms", help="Where the synonyms are now.")] = None,
    class_embeddings: Annotated[Path | None, typer.Option("--class-embeddings", help="Where the class embeddings are now.")] = None,
    precision: options.Compute = Precision.AUTO,
    activation: Annotated[Activation | None, typer.Option(help="The activation that the weights were trained with.")] = None,
    device: options.Device = "auto",
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Crops a CLIP batch, where --repair has lost that.")] = None,
    workers: options.Workers = "auto",
) -> None:
    """Check every checksum, table and row, of tar shards too; name what is damaged; exit with 1 if anything is.

    --sample needs the pictures and the CLIP; with --data, pictures that have changed are found too. A set knows
    what it was made from; the options from --data on say where that is now.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.cache_tools.check_config import CheckConfig
    from hdovd.pipelines.teachers.prompts import read_templates

    prompts = None if templates is None else read_templates(templates)
    changes: dict[str, Any] = {"data": DataPaths(data, images, annotations) if data or images or annotations else None, "clip": clip,
                               "pretrained": pretrained, "proposals": proposals, "vocabulary": vocabulary, "captions": captions,
                               "nouns": nouns, "protocol": protocol, "templates": prompts, "synonyms": synonyms,
                               "class_embeddings": class_embeddings, "precision": precision, "activation": activation, "device": device,
                               "batch_size": batch_size, "workers": options.workers(workers)}
    changes = {name: value for name, value in changes.items() if value not in (None, Precision.AUTO)}
    config = CheckConfig(cache, features, sample, seed, repair, changes)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.cache_tools.verify import check_cache

    if check_cache(config, typer.echo).findings:
        raise typer.Exit(1)


app.command("export")(export_cache.export)
app.command("import")(import_cache.import_)
app.command("view")(cache_view.view)


def _print(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)
