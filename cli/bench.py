"""`hdovd bench`: what the project says of its speed and memory, measured on your machine."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from hdovd.cli import options
from hdovd.cli.lazy import new_app
from hdovd.core.errors import HdovdError
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.common.precision import Precision
from hdovd.pipelines.embedding.crop_recipe import CropRecipe, Shape

app = new_app(no_args_is_help=True)

Folder = Annotated[Path | None, typer.Option("--folder", help="Where to work: a new folder in this one. Default: the system's for "
                                             "temporary files.")]
Keep = Annotated[bool, typer.Option("--keep", help="Leave what was made.")]


@app.command()
def cache(
    images: Annotated[int, typer.Option(min=1, help="Images.")] = 20_000,
    rows: Annotated[int, typer.Option(min=1, help="Rows an image.")] = 40,
    dim: Annotated[int, typer.Option(min=1, help="Embedding size.")] = 512,
    workers: Annotated[int, typer.Option(min=0, help="Measure a DataLoader with so many processes too.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all layouts; medians are printed.")] = 15,
    reads: Annotated[int, typer.Option(min=1, help="Images read in a round; fewer where it is slow.")] = 4_000,
    memory_limit: Annotated[int | None, typer.Option("--memory-limit", min=300, help="Read with so many MB of memory and page cache "
                                                     "(cgroup version 1, as root), cold.")] = None,
    folder: Folder = None,
    keep: Keep = False,
) -> None:
    """Read random features from the cache and from other layouts: memory-mapped .npy, a .pth an image, safetensors.

    The defaults make 3.3 GB in temporary files.
    """
    from hdovd.pipelines.bench.bench_cache import bench_cache
    from hdovd.pipelines.bench.bench_layouts import CacheBenchConfig

    with _workplace(folder, keep=keep) as place:
        bench_cache(CacheBenchConfig(place, images, rows, dim, rounds, reads, workers, memory_limit and memory_limit * 10**6), typer.echo)


@app.command()
def extract(
    clip: Annotated[str, typer.Option("--clip", help="open_clip model name, local-dir:PATH or hf-hub:NAME.")] = "ViT-B-32",
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file. Default: random weights.")] = None,
    precision: options.Compute = Precision.AUTO,
    device: options.Device = "auto",
    workers: options.Workers = "auto",
    batch: options.Batch = "auto",
    crop: Annotated[Shape, typer.Option(help="The pixels that a box stands for.")] = Shape.BOX,
    crop_scales: Annotated[str, typer.Option("--crop-scales", help="As for extract-clip.")] = "1",
    images: Annotated[int | None, typer.Option(min=1, help="Images a round. Default: what the model does in ten seconds.")] = None,
    boxes: Annotated[int, typer.Option(min=2, help="Boxes an image.")] = 30,
    picture: Annotated[str, typer.Option("--picture", help="Size of the JPEG files, WIDTHxHEIGHT.")] = "640x480",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the bare model and of all; medians are printed.")] = 3,
    forecast: Annotated[str, typer.Option("--forecast", help="IMAGES,BOXES of the data set to forecast. Default: COCO, 30 proposals an "
                                          "image.")] = "118287,4400000",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
    folder: Folder = None,
    keep: Keep = False,
) -> None:
    """Measure the extraction beside the bare model, stage by stage, and beside other ways to do it; forecast a data set's cost."""
    (width, height), (pictures, rows) = _two(picture, "x", "--picture"), _two(forecast, ",", "--forecast")
    recipe = CropRecipe.parse(crop, crop_scales)
    from hdovd.pipelines.bench.bench_extract import SpeedBenchConfig, bench_speed

    with _workplace(folder, keep=keep) as place:
        speed = bench_speed(
            SpeedBenchConfig(
                place,
                clip,
                pretrained,
                precision,
                device,
                options.workers(workers),
                options.batch_size(batch),
                images,
                boxes,
                width,
                height,
                rounds,
                recipe,
                pictures,
                rows,
            ),
            typer.echo,
        )
        for line in speed.lines():
            typer.echo(line)
        if json_file is not None:
            write_text(json_file, json.dumps(speed.tree(), indent=1))


@app.command()
def dense(
    clip: Annotated[str, typer.Option("--clip", help="open_clip model name, local-dir:PATH or hf-hub:NAME.")],
    pretrained: Annotated[str | None, typer.Option("--pretrained", help="Tag or checkpoint file, with a model name.")] = None,
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: options.Protocol = "ov-coco",
    templates: options.Templates = "photo",
    side: Annotated[list[int] | None, typer.Option("--side", min=1, help="As --dense-side of extract-clip. Repeatable.")] = None,
    precision: options.Compute = Precision.AUTO,
    device: options.Device = "auto",
    count: Annotated[int, typer.Option(min=1, help="Validation images.")] = 200,
    boxes: Annotated[int, typer.Option(min=1, help="Boxes an image, at least: filled up with shifted copies, for the rates.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over all ways; medians are printed.")] = 3,
) -> None:
    """Compare CLIP's embeddings of crops with those of one pass an image and RoIAlign: rate, cosine, zero-shot accuracy.

    On the annotated boxes of your validation images: what extract-clip --instance-teacher dense would give you to train from.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.data.protocol import load_protocol
    from hdovd.pipelines.teachers.prompts import read_templates

    paths, prompts = DataPaths(data, images, annotations), read_templates(templates)
    load_protocol(protocol)
    paths.locate("val2017")  # before torch: a mistake shows at once
    from hdovd.pipelines.bench.bench_dense import DenseBenchConfig, bench_dense

    bench_dense(DenseBenchConfig(paths, clip, tuple(side or (None,)), pretrained, protocol, prompts, precision, device=device, images=count,
                           boxes=boxes, rounds=rounds), typer.echo)


@app.command()
def scale(
    images: Annotated[int, typer.Option(min=1, help="Images; COCO train2017 has 118287.")] = 118_287,
    boxes: Annotated[int, typer.Option(min=1, help="Proposals an image; 4 annotated boxes come on top.")] = 30,
    dim: Annotated[int, typer.Option(min=1, help="Embedding size.")] = 512,
    side: Annotated[int, typer.Option(min=1, help="Side of the model's input, in pixels.")] = 8,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read and cut pictures.")] = 0,
    folder: Folder = None,
    keep: Keep = False,
) -> None:
    """Run the extraction at full scale with a cheap stub in place of CLIP: rows a second and peak host memory.

    The defaults make 4 million rows, 5 GB on disk.
    """
    from hdovd.pipelines.bench.bench_scale import ScaleBenchConfig, bench_scale

    with _workplace(folder, keep=keep) as place:
        for line in bench_scale(ScaleBenchConfig(place, images, boxes, dim, side, workers), typer.echo).lines():
            typer.echo(line)


@app.command("eval")
def ap_engines(
    images: Annotated[int, typer.Option(min=1, help="Images; the default is COCO val2017 under the ov-coco protocol.")] = 4_836,
    objects: Annotated[int, typer.Option(min=1, help="Annotated objects, of 65 classes, in all.")] = 36_000,
    detections: Annotated[int, typer.Option(min=1, help="Detections an image.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds over both engines; medians are printed.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the made-up objects and detections.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
    folder: Folder = None,
    keep: Keep = False,
) -> None:
    """Time AP with both engines of hdovd eval on the same made-up detections, and compare what they find."""
    from hdovd.pipelines.bench.bench_eval import EvalBenchConfig, bench_eval

    with _workplace(folder, keep=keep) as place:
        times = bench_eval(EvalBenchConfig(place, images, objects, detections, rounds, seed), typer.echo)
        for line in times.lines():
            typer.echo(line)
        if json_file is not None:
            write_text(json_file, json.dumps(times.tree(), indent=1))


def _two(text: str, mark: str, option: str) -> tuple[int, int]:
    """Two whole numbers with a mark between them. Raises HdovdError for anything else."""
    first, _, second = text.partition(mark)
    if not (first.isdigit() and second.isdigit() and int(first) and int(second)):
        raise HdovdError(f"{option} {text}: expected two whole numbers above 0 with {mark!r} between them")
    return int(first), int(second)


@contextmanager
def _workplace(folder: Path | None, *, keep: bool) -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="hdovd-bench-", dir=folder))
    try:
        yield place
    finally:
        if keep:
            typer.echo(f"kept {place}")
        else:
            shutil.rmtree(place)


@app.command("train")
def training(
    recipe: options.RecipeName = "demo",
    set_: options.Set = None,
    clip: Annotated[str, typer.Option("--clip", help="Model of the cache and of the steps with CLIP; a model name has random weights.")
                    ] = "ViT-B-32",
    device: options.Device = "auto",
    images: Annotated[int, typer.Option(min=1, help="Pictures; at least a batch.")] = 96,
    picture: Annotated[str, typer.Option("--picture", help="Size of the JPEG files, WIDTHxHEIGHT.")] = "640x480",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every variant; medians are printed.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps a turn.")] = 5,
    online: Annotated[bool, typer.Option("--online/--no-online", help="Measure steps in which CLIP runs too.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
    folder: Folder = None,
    keep: Keep = False,
) -> None:
    """Time a training step: the detector alone, with three levels from the cache, with CLIP in every step, and torchvision's.

    torchvision's fasterrcnn_resnet50_fpn is measured with recipes of a resnet50. On made-up pictures, with random weights.
    """
    from hdovd.config.recipe import load_recipe

    width, height = _two(picture, "x", "--picture")
    load_recipe(recipe, set_ or [])  # before torch: a mistake shows at once
    from hdovd.pipelines.bench.bench_train import TrainBenchConfig, bench_train

    with _workplace(folder, keep=keep) as place:
        times = bench_train(TrainBenchConfig(place, recipe, tuple(set_ or ()), clip, device, images, width, height, rounds, steps, online),
                            typer.echo)
        for line in times.lines():
            typer.echo(line)
        if json_file is not None:
            write_text(json_file, json.dumps(times.tree(), indent=1))
