"""`hdovd audit`."""

from pathlib import Path
from typing import Annotated

import typer

from hdovd.cache.schema import DEFAULT_SET
from hdovd.cli import options


def audit(
    cache: Annotated[str, typer.Option("--cache", help="The cache to audit: a folder, or s3://, gs://.")],
    data: options.Data = None,
    images: options.Images = None,
    annotations: options.Annotations = None,
    protocol: options.Protocol = "ov-coco",
    features: options.Features = DEFAULT_SET,
    run: Annotated[Path | None, typer.Option("--run", help="A run folder: its cache, protocol and calibration are checked too.")] = None,
    proposals: Annotated[
        Path | None, typer.Option("--proposals", help="The proposal file, where the cache does not say what made its proposals.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", metavar="OUT", help="Write the report as JSON too.")] = None,
) -> None:
    """Compares the cache, and a run, with the raw annotation files. Each check ends as ok, LEAK, or unknown (it could not be
    made); report lines are disclosures, such as which novel names the nouns hold, and no leaks. See docs/AUDIT.md.
    """
    from hdovd.data.coco import DataPaths
    from hdovd.pipelines.audit.config import AuditConfig

    config = AuditConfig(DataPaths(data, images, annotations), cache, protocol, features, run, proposals, json_)
    config.check()  # before torch: a mistake shows at once
    from hdovd.pipelines.audit.audit import audit as run_audit

    if run_audit(config, typer.echo).leaks:
        raise typer.Exit(1)
