"""A training run in a process of its own, for tests that kill it.

JOB: data, cache, out, protocol, settings, resume, save_minutes, log_every; `kill_at`: the step after which the process
kills itself (-9), or sends itself, or with `group` all its workers too, `signal`; `kill_in_validation`: of this number;
`kill_in_catch_up`: at the end of the epoch that this step ends; `validate`: whether to validate at all; `track`:
names of trackers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from hdovd.config.recipe import load_recipe
from hdovd.core import Stopped
from hdovd.data import DataPaths
from hdovd.pipelines.training import hooks as run_hooks, loop as fit, train
from hdovd.pipelines.training.loop import Loop


def main(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    fit.LOG_EVERY = job.get("log_every", 3)
    told = run_hooks.RunHooks.step

    def step(self: run_hooks.RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == job.get("kill_at"):
            if job.get("group"):
                os.killpg(os.getpgid(0), job["signal"])
            else:
                os.kill(os.getpid(), job.get("signal", 9))
        told(self, loop)

    def validate(self: run_hooks.RunHooks, loop: Loop[Any], epoch: int) -> None:
        if epoch == job.get("kill_in_validation"):
            os.kill(os.getpid(), 9)
        validated(self, loop, epoch)

    def catch_up(self: run_hooks.RunHooks, loop: Loop[Any]) -> None:
        if loop.step_number == job.get("kill_in_catch_up"):
            os.kill(os.getpid(), 9)
        caught_up(self, loop)

    caught_up = run_hooks.RunHooks.catch_up
    validated = run_hooks.RunHooks._validate
    if job.get("group"):
        os.setpgid(0, 0)  # or the signal would reach the tests
    run_hooks.RunHooks.catch_up = catch_up  # type: ignore[method-assign]
    run_hooks.RunHooks.step = step  # type: ignore[method-assign]
    run_hooks.RunHooks._validate = validate  # type: ignore[method-assign]
    recipe = load_recipe("demo", job["settings"])
    data = DataPaths(Path(job["data"])) if job["data"] else DataPaths()
    try:
        train.train(
            train.TrainConfig(
                data=data,
                cache=job["cache"],
                out=Path(job["out"]),
                recipe=recipe,
                protocol=job["protocol"],
                device="cpu",
                resume=job.get("resume", False),
                save_minutes=job.get("save_minutes", 0.0),
                validation=data if job.get("validate") else None,
                track=tuple(job.get("track", ())),
            )
        )
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    return 0
