"""`hdovd bench`: what the project says of its speed and memory, measured on your machine."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure the cache and the extraction on this machine, on made-up data.")

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
    from hdovd.pipelines.bench_cache import bench_cache
    from hdovd.pipelines.bench_layouts import CacheBench

    with _workplace(folder, keep=keep) as place:
        bench_cache(CacheBench(place, images, rows, dim, rounds, reads, workers, memory_limit and memory_limit * 10**6), typer.echo)


@app.command()
def extract(
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
    from hdovd.pipelines.bench_extract import ExtractBench, bench_extract

    with _workplace(folder, keep=keep) as place:
        for line in bench_extract(ExtractBench(place, images, boxes, dim, side, workers), typer.echo).lines():
            typer.echo(line)


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
