"""`hdovd report`."""

from hdovd.cli.command import command
from hdovd.pipelines.report.config import ReportConfig


@command
def report(config: ReportConfig) -> None:
    """AP by run and class, precision and recall, errors by kind, confusion, reliability of scores, losses by level,
    validation images with truth and detections, pseudo boxes with their nouns and weights, relations of teacher and
    student, time and identity.

    The pictures are taken from --data; --images and --annotations name other validation images. Without any, from where
    the runs' cache was made.
    """
    from hdovd.pipelines.report.report import report as run

    run(config)
