"""`hdovd serve`."""

from hdovd.cli.command import command
from hdovd.pipelines.serve.config import ServeConfig


@command
def serve(config: ServeConfig) -> None:
    """With --run: drop pictures, type names or show examples, see boxes. With --cache: search it by words, or by a box
    drawn on a picture. The page asks for nothing elsewhere. Without a password: keep to 127.0.0.1, or know who reaches
    --host. Needs pip install "hdovd[serve]". See docs/SERVE.md.
    """
    from hdovd.pipelines.serve.serve import serve as run

    run(config)
