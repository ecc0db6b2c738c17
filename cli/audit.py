"""`hdovd audit`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.audit.config import AuditConfig


@command
def audit(config: AuditConfig) -> None:
    """Compares the cache, and a run, with the raw annotation files. Each check ends as ok, LEAK, or unknown (it could
    not be made); report lines are disclosures, such as which novel names the nouns hold, and no leaks. See
    docs/AUDIT.md.
    """
    from hdovd.pipelines.audit.audit import audit as run

    if run(config).leaks:
        raise typer.Exit(1)
