"""`hdovd export`."""

from hdovd.cli.command import command
from hdovd.pipelines.export.config import ExportModelConfig


@command
def export(config: ExportModelConfig) -> None:
    """The file holds the run's class names and embeddings too. It is run before it gets its name, and refused if it
    does not find what the model finds: scores to 1e-3, boxes to 1e-3 percent of the long side of the detector's input,
    to which any picture is resized.
    """
    from hdovd.pipelines.export.model import export_model

    export_model(config)
