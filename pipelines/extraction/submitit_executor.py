"""An extraction in jobs of SLURM, or in processes here: `hdovd extract-clip --executor submitit`. No other module
imports submitit.

Every job is one `--shard I/N`. One that is preempted, or whose time is over, is queued again by submitit and goes on
where it was. What jobs that died have left is shared out again, as long as a round finishes something. What a job hands
back is never read: the cache tells what is done.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hdovd.core import user_cache_folder
from hdovd.core.errors import HdovdError, counted, shorten
from hdovd.core.log import lines_to, log
from hdovd.core.text_files import read_toml
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.extraction.config import Executor, ExtractConfig, Share
from hdovd.pipelines.extraction.engine import Extraction, new_rows

try:
    import submitit
except ImportError as error:
    raise HdovdError("--executor submitit needs submitit: pip install 'hdovd[submitit]'") from error

LOOK_EVERY_S = 2.0  # at what is done
DEFAULTS = {"jobs": 1, "name": "hdovd", "timeout_min": 240}
Run = Callable[[ExtractConfig], object]


class Job(submitit.helpers.Checkpointable):
    """What a job runs: the extraction of a shard."""

    def __call__(self, run: Run, config: ExtractConfig) -> None:
        with lines_to(print):
            run(config)


def do_with_submitit(extraction: Extraction, config: ExtractConfig, run: Run) -> None:
    """Do all that is left of an extraction that has begun. `run`: what does a shard. Raises HdovdError for settings
    that submitit refuses, or if all jobs of a round end before they finish anything.
    """
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
