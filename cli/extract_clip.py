"""`hdovd extract-clip`."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET, PART_ROWS
from hdovd.cli import options
from hdovd.data.coco import Exif
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, InstanceTeacher, Share, Store
from hdovd.pipelines.extraction.label_rule import TEMPERATURE, LabelRule
from hdovd.pipelines.teachers.activation import Activation


def extract_clip(
    cache: Annotated[str, typer.Option("--cache", help="The cache to write or add to: a folder, or s3://, gs://.")],
    clip: Annotated[str, typer.Option("--clip", help="open_clip model name, local-dir:PATH or hf-hub:NAME.")],
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with a model name.")] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    proposals: Annotated[
        Path | None, typer.Option("--proposals", help="COCO results JSON, hdovd's .npz, or a .pkl of mmdetection or Detectron2.")
    ] = None,
    vocabulary: Annotated[Path | None, typer.Option("--vocabulary", help="Nouns for pseudo boxes, one name a line, or general: the object "
                                                        "list that ships.")] = None,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="COCO captions JSON: an image offers only its own captions' words, in singular "
                                     "or plural, as hdovd nouns --parser match finds them.")
    ] = None,
    nouns: Annotated[
        Path | None, typer.Option("--nouns", help="A file of hdovd nouns, instead of --vocabulary and --captions.")
    ] = None,
    label_top_k: Annotated[
        int, typer.Option("--label-top-k", min=1, help="Nouns that a pseudo box's text embedding is the weighted mean of: the best K.")
    ] = 1,
    label_temperature: Annotated[
        float, typer.Option("--label-temperature", help="With K over 1: their weights are softmax(cosine / T).")
    ] = TEMPERATURE,
    protocol: options.Protocol = "ov-coco",
    templates: options.Templates = "photo",
    synonyms: options.Synonyms = None,
    class_embeddings: options.ClassEmbeddings = None,
    instance_teacher: Annotated[
        InstanceTeacher, typer.Option("--instance-teacher", help="crop: CLIP sees each box alone. dense: once the whole image, of which "
                                      "boxes take their part: cheaper, and less sharp.")
    ] = InstanceTeacher.CROP,
    dense_side: Annotated[
        int | None, typer.Option("--dense-side", min=1, help="dense: the image becomes N x N pixels. Default: about 3 times the crop.")
    ] = None,
    crop: Annotated[Shape, typer.Option(help="The pixels that a box stands for: see docs/CACHE.md.")] = Shape.BOX,
    crop_scales: Annotated[str, typer.Option("--crop-scales", help="Mean over crops of these sizes of the box: 1,1.5 as in ViLD.")] = "1",
    exif: Annotated[Exif, typer.Option(help="Pictures with an EXIF orientation whose annotated size fits them turned and as stored: apply "
                                            "turns them. The annotated size decides of all others.")] = Exif.APPLY,
    device: options.Device = "auto",
    precision: options.Compute = Precision.AUTO,
    activation: Annotated[Activation, typer.Option(help="The activation that the weights were trained with.")] = Activation.AUTO,
    batch: options.Batch = "auto",
    workers: options.Workers = "auto",
    features: options.Features = DEFAULT_SET,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try images again that could not be read.")] = False,
    shard: Annotated[
        str | None, typer.Option("--shard", help="I/N: every N-th part, from the I-th (0 to N-1): one task of an array of N.")
    ] = None,
    executor: Annotated[
        Executor, typer.Option(help="local: this process (or torchrun's). ray: the actors of a Ray cluster.")
    ] = Executor.LOCAL,
    store: Annotated[
        Store, typer.Option("--store", help="webdataset: tar shards with pictures, boxes and embeddings, to train from as a stream.")
    ] = Store.ZARR,
    part_rows: Annotated[int, typer.Option("--part-rows", min=1, help="Rows of a part: the most that a killed process loses.")] = PART_ROWS,
) -> None:
    """Prints first, level by level, whether the cache has it (hit), some of it (extend) or nothing (extract), and what that
    costs. Killed? The same command goes on where it was. Needs no GPU, but wants one. Next: hdovd train --cache CACHE.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.teachers.prompts import read_templates

    recipe = options.recipe(instance_teacher, dense_side, CropRecipe.parse(crop, crop_scales))
    config = ExtractConfig(
        DataPaths(data, images, annotations), cache, clip, pretrained, proposals, vocabulary, captions, protocol, read_templates(templates),
        recipe, precision, activation, features, device, options.batch_size(batch), part_rows,
        options.workers(workers), dry_run, retry_failed, None if shard is None else Share.parse(shard), executor, store, synonyms,
        class_embeddings, nouns, labels=LabelRule(label_top_k, label_temperature), exif=exif)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.extraction.extract_clip import extract_clip as run
    from hdovd.pipelines.extraction.sharing import this_share

    report = run(config)
    if report.whole and not dry_run and this_share(None).speaks:
        named = "" if features == DEFAULT_SET else f" --features {features}"
        typer.echo(f"next: hdovd train --cache {quote(str(cache))}{named} --out RUN ...")
