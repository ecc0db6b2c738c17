"""An extraction by workers elsewhere: tasks of a Ray cluster (`hdovd extract-clip --executor ray`), or jobs of SLURM or
processes here (`--executor submitit`). No other module imports Ray or submitit.

Every worker does one `--shard I/N`, as an extraction of its own, and the cache tells what is done. Ray has several
shards for each GPU of the cluster, or without GPUs for every `1 + --workers` CPUs: so nodes that join get some, and
whoever dies costs the part that it was at. A job that is preempted, or whose time is over, is queued again by submitit
and goes on where it was; what jobs that died have left is shared out again, as long as a round finishes something.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hdovd.core import HdovdError, counted, lines_to, log, shorten, user_cache_folder
from hdovd.core.text_files import read_toml
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import workers_a_gpu
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, Share
from hdovd.pipelines.extraction.engine import Extraction, new_rows

Run = Callable[[ExtractConfig], object]
LOOK_EVERY_S = 2.0  # at what is done
SHARDS = 4  # for each worker that the Ray cluster has room for
DEATHS = 3  # of Ray's workers at one shard: then it is no accident
DEFAULTS = {"jobs": 1, "name": "hdovd", "timeout_min": 240}


def extract_shard(run: Run, config: ExtractConfig) -> None:
    """What a worker does."""
    os.environ.pop("TORCHELASTIC_RUN_ID", None)  # of whoever started Ray: nobody's rank
    with lines_to(print):
        run(config)


def do_with_ray(extraction: Extraction, config: ExtractConfig, run: Run) -> None:
    """Do all that is left of an extraction that has begun. Uses the cluster that Ray is connected to, that RAY_ADDRESS
    names or that runs on this machine; else starts one here. `run`: what does a shard. Raises HdovdError for a worker's
    own error, or if workers keep dying.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    left, connected = extraction.left(), ray.is_initialized()
    if not left:
        return
    if not connected:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # in a cluster started here: no reports to anybody
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise HdovdError(
                f"no Ray cluster can be reached or started: {error}\nRAY_ADDRESS names one, `ray start --head` starts "
                "one; does it ask for a token (RAY_AUTH_TOKEN)? `ray status` tries the connection"
            ) from error
    at_work: list[Any] = []
    try:
        gpus, cpus, room, config = _of_a_worker(config)
        log(f"ray: room for {counted(room, 'worker')}, each with " + ("a GPU" if gpus else f"{cpus} CPU"))
        task, count = ray.remote(extract_shard), min(len(left), SHARDS * room)
        task = task.options(num_gpus=gpus, num_cpus=cpus, max_retries=DEATHS - 1)
        at_work = [task.remote(run, replace(config, share=Share(index, count))) for index in range(count)]
        with progress(None, "CLIP", "row", total=new_rows(extraction, left)) as bar:
            while at_work:
                done, at_work = ray.wait(at_work, timeout=LOOK_EVERY_S)
                bar.update(bar.total - new_rows(extraction, extraction.left()) - bar.n)
                ray.get(done)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise HdovdError(
            f"{DEATHS} Ray workers died at one shard of the work: {shorten(str(error).split(), 20)}\nOut of memory? "
            "See the logs of Ray on that node; fewer --workers or a smaller --batch-size need less. What is finished "
            "is kept"
        ) from error
    finally:
        for task_left in at_work if connected else ():
            ray.cancel(task_left, force=True)
        if not connected:
            ray.shutdown()


def _of_a_worker(config: ExtractConfig) -> tuple[int, int, int, ExtractConfig]:
    """GPUs and CPUs that a worker takes of a node, how many have room, and what it is asked to do. All are of one kind,
    so that all rows are computed alike.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(has.get("GPU", 0)), int(has.get("CPU", 0))) for has in alive]
    with_gpu = [node for node in nodes if node[0]] if config.device != "cpu" else []
    if not with_gpu and config.device not in ("auto", "cpu"):
        raise HdovdError(
            f"--device {config.device}: the Ray cluster has no GPU (`ray status`); use --device cpu, or wait for its "
            f"nodes"
        )
    workers = config.workers or 0
    if with_gpu and config.workers is None:  # it may see all cores of its node, and nothing of the others there
        workers = min(workers_a_gpu(cores, gpus) for gpus, cores in with_gpu)
    cpus = 1 if with_gpu else max(1, min(1 + workers, max(cores for _, cores in nodes)))
    asked = ExtractConfig.from_dict(  # with absolute paths: workers have another working directory
        config.to_dict(),
        config.cache if "://" in str(config.cache) else Path(config.cache).absolute(),
        device="cuda" if with_gpu else "cpu",
        batch_size=config.batch_size,
        part_rows=config.part_rows,
        workers=workers,
        retry_failed=config.retry_failed,
    )
    room = sum(gpus for gpus, _ in with_gpu) if with_gpu else sum(cores // cpus for _, cores in nodes)
    return int(bool(with_gpu)), cpus, max(1, room), asked


class Job:
    """What submitit runs."""

    def __call__(self, run: Run, config: ExtractConfig) -> None:
        extract_shard(run, config)

    def checkpoint(self, *args: Any) -> Any:
        """What is queued again for a job that is preempted, or whose time is over."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


def do_with_submitit(extraction: Extraction, config: ExtractConfig, run: Run) -> None:
    """Do all that is left of an extraction that has begun. `run`: what does a shard. Raises HdovdError for settings
    that submitit refuses, or if all jobs of a round end before they finish anything.
    """
    import submitit

    given = {} if config.submitit is None else read_toml(config.submitit, "settings of submitit")
    settings: dict[str, Any] = DEFAULTS | {"folder": str(user_cache_folder() / "jobs")} | given
    count, folder, cluster = (settings.pop(name, None) for name in ("jobs", "folder", "cluster"))
    try:
        shares = [Share(index, count) for index in range(count)]
        executor = submitit.AutoExecutor(folder, cluster)
        executor.update_parameters(**settings)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise HdovdError(f"--submitit {config.submitit}: {error}") from error
    config = replace(config, executor=Executor.LOCAL, submitit=None)
    with progress(None, "CLIP", "row", total=new_rows(extraction, extraction.left())) as bar:
        while left := extraction.left():
            with executor.batch():  # as one array
                jobs = [executor.submit(Job(), run, replace(config, share=share)) for share in shares]
            named = f"{executor.cluster} jobs {', '.join(job.job_id for job in jobs)}"
            log(f"{counted(len(left), 'part')} to do, by {named}, which log to {executor.folder}")
            try:
                while not all(job.done() for job in jobs):
                    time.sleep(LOOK_EVERY_S)
                    bar.update(bar.total - new_rows(extraction, extraction.left()) - bar.n)
            finally:
                for job in jobs:
                    job.cancel(check=False)
            if len(extraction.left()) == len(left):
                said = [line for job in jobs for line in (job.stderr() or "").splitlines()[-1:]]
                raise HdovdError(f"all jobs ended, and none finished anything; they say: {shorten(said)}")
