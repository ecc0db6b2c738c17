"""`hdovd eval`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.evaluation.config import ZERO_SHOT, EvalConfig


@command
def eval(config: EvalConfig) -> None:
    """Writes metrics.json and detections.json (COCO results form) into RUN; with --examples into RUN/examples, see
    docs/DETECT.md; with --before retention.json.
    """
    from hdovd.pipelines.detection.detector import evaluate_examples
    from hdovd.pipelines.evaluation.evaluate import class_table, error_table, evaluate, result_table
    from hdovd.pipelines.transfer.transfer import zero_shot

    if config.before is not None:
        from hdovd.pipelines.adaptation.adapt import compare

        typer.echo(compare(config))
        return
    if config.examples is not None:
        result = evaluate_examples(config, config.examples)
    else:
        result = zero_shot(config) if config.protocol == ZERO_SHOT else evaluate(config)
    typer.echo(result_table(result))
    if config.per_class:
        typer.echo(class_table(result))
    if config.errors:
        typer.echo(error_table(result.errors))
    typer.echo("\n".join(f"wrote {file}" for file in result.files))
