"""`hdovd ablate`."""

import typer

from hdovd.cli.command import command
from hdovd.pipelines.ablation.config import AblateConfig


@command
def ablate(config: AblateConfig) -> None:
    """--grid loss.instance.enabled=true,false loss.class.enabled=true,false are four cells. The same command skips what
    is done and goes on with what was stopped or failed; another config in a run's folder is an error. Ctrl-C, SIGTERM
    and SIGUSR1 let the runs save and end (exit code 130 or 75). Exit code 1 if a run failed. Runs are not validated
    between epochs. --oracle adds the measure: the percentage of the novel gap, from base-only to the oracle, that each
    cell closes. Look on: hdovd runs OUT.
    """
    from hdovd.pipelines.ablation.ablate import ablate as run
    from hdovd.pipelines.ablation.grid import markdown
    from hdovd.pipelines.common.process import exit_code

    result = run(config)
    if config.dry_run:
        plans = [f"{'to do' if planned.left else 'done':16s}{planned.path}" for planned in result.runs]
        typer.echo("\n".join([*plans, f"{len(plans) - result.left} of {len(plans)} runs done"]))
        return
    typer.echo("\n".join([f"\n{markdown(result.table)}", f"wrote {config.out}/table.md, table.csv and table.tex"]))
    failed = [planned.name for planned in result.runs if planned.failed]
    if failed:
        typer.secho(f"{len(failed)} failed: {', '.join(failed)}; the same command tries them again", fg="red", err=True)
    if result.stopped:
        typer.echo(f"stopped, {result.left} of {len(result.runs)} runs are left: the same command goes on", err=True)
        raise typer.Exit(exit_code(result.stopped))
    if failed:
        raise typer.Exit(1)
