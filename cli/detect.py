"""`hdovd detect`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.detection.config import DetectConfig


@command
def detect(config: DetectConfig) -> None:
    """Names that are no classes of the run are embedded by the text tower of its CLIP, once: they are kept in
    ~/.cache/hdovd. What cannot be read is skipped and listed; the exit code is 1 if nothing could be read. See
    docs/DETECT.md.
    """
    from hdovd.pipelines.detection.detect import detect as run
    from hdovd.pipelines.detection.detect import detect_lines

    result = run(config)
    for line in [*detect_lines(result), *(f"wrote {file}" for file in result.files)]:
        typer.echo(line)
    if not result.images:
        raise typer.Exit(1)
