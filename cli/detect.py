"""`hdovd detect`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.common.process import exit_code
from hdovd.pipelines.detection.config import DetectConfig


@command
def detect(config: DetectConfig) -> None:
    """Names that are no classes of the run are embedded by the text tower of its CLIP, once: they are kept in
    ~/.cache/hdovd. What cannot be read is skipped and listed; the exit code is 1 if nothing could be read. Ctrl-C ends
    a stream, and what was seen of it is whole. Videos need pip install "hdovd[video]". See docs/DETECT.md.
    """
    from hdovd.pipelines.detection.detect import detect as run, detect_lines

    result = run(config)
    typer.echo("\n".join([*detect_lines(result), *(f"wrote {file}" for file in result.files)]))
    if result.stopped:
        raise typer.Exit(exit_code(result.stopped))
    if not result.images and not result.videos:
        raise typer.Exit(1)
