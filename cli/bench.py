"""`hdovd bench`: what an extraction will cost on your machine."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from hdovd.cli.command import command
from hdovd.cli.main import new_app
from hdovd.pipelines.common.atomic_write import write_text
from hdovd.pipelines.extraction.forecast_config import ForecastConfig

app = new_app(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure on this machine, on made-up data."""


@app.command()
@command
def extract(config: ForecastConfig) -> None:
    """Measure the extraction beside the bare model, stage by stage, and forecast what a data set costs."""
    from hdovd.pipelines.extraction.forecast import forecast, forecast_lines

    with TemporaryDirectory(prefix="hdovd-bench-", dir=config.folder) as place:
        found = forecast(config, Path(place))
    typer.echo("\n".join(forecast_lines(found)))
    if config.json_file is not None:
        write_text(config.json_file, json.dumps(found, indent=1))
