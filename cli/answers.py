"""Commands that print what their stage found, or end with a code that says it. `hdovd.cli.commands` names them."""

import json
from contextlib import suppress
from dataclasses import asdict

import typer

from hdovd.cli.main import run_command
from hdovd.pipelines.ablation.config import AblateConfig
from hdovd.pipelines.audit.config import AuditConfig
from hdovd.pipelines.common.process import exit_code
from hdovd.pipelines.demo.config import DemoConfig
from hdovd.pipelines.detection.config import DetectConfig
from hdovd.pipelines.evaluation.config import ZERO_SHOT, EvalConfig
from hdovd.pipelines.proposals.config import ProposeConfig
from hdovd.pipelines.search.config import BoxSource, SearchConfig


def demo(config: DemoConfig) -> None:
    from hdovd.pipelines.demo.run import demo as run

    def call(words: list[str]) -> None:
        with suppress(typer.Exit):
            run_command(words)

    run(config, call)


def propose(config: ProposeConfig) -> None:
    from hdovd.pipelines.proposals import propose as stage

    if config.report:
        stage.recall_report(config)
    else:
        stage.propose(config)


def eval(config: EvalConfig) -> None:
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


def search(config: SearchConfig) -> None:
    from hdovd.pipelines.search.search import search as run, search_lines

    hits = run(config)
    if any(hit.source == BoxSource.BASE and not hit.name for hit in hits):
        typer.echo("note: base boxes are without names, which the annotations alone have: --data reads them", err=True)
    typer.echo(
        json.dumps([asdict(hit) for hit in hits], indent=1) if config.json_ else "\n".join(search_lines(hits, config))
    )


def detect(config: DetectConfig) -> None:
    from hdovd.pipelines.detection.detect import detect as run, detect_lines

    result = run(config)
    typer.echo("\n".join([*detect_lines(result), *(f"wrote {file}" for file in result.files)]))
    if result.stopped:
        raise typer.Exit(exit_code(result.stopped))
    if not result.images and not result.videos:
        raise typer.Exit(1)


def ablate(config: AblateConfig) -> None:
    from hdovd.pipelines.ablation.ablate import ablate as run
    from hdovd.pipelines.ablation.grid import markdown

    result = run(config)
    if config.dry_run:
        plans = [f"{planned.state:16s}{planned.path}" for planned in result.runs]
        typer.echo("\n".join([*plans, f"{len(plans) - result.left} of {len(plans)} runs done"]))
        return
    typer.echo("\n".join([f"\n{markdown(result.table)}", *(f"wrote {file}" for file in result.files)]))
    failed = [planned.name for planned in result.runs if planned.failed]
    if failed:
        typer.secho(f"{len(failed)} failed: {', '.join(failed)}; the same command tries them again", fg="red", err=True)
    if result.stopped:
        typer.echo(f"stopped, {result.left} of {len(result.runs)} runs are left: the same command goes on", err=True)
        raise typer.Exit(exit_code(result.stopped))
    if failed:
        raise typer.Exit(1)


def audit(config: AuditConfig) -> None:
    from hdovd.pipelines.audit.audit import audit as run

    if run(config).leaks:
        raise typer.Exit(1)
