"""An extraction on a Ray cluster: `hdovd extract-clip --executor ray`. No other module imports Ray.

Every actor reads the inputs and loads the model once, then does the units that it is given, one at a time. There is one
actor a GPU, or without GPUs one for every `1 + --workers` CPUs. Nodes that join get actors; the part of an actor that
dies goes to another.
"""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hdovd.cache.catalog import Catalog
from hdovd.core.errors import HdovdError
from hdovd.core.log import log
from hdovd.pipelines.common.console import progress
from hdovd.pipelines.common.device import workers_a_gpu
from hdovd.pipelines.extraction.config import Executor, ExtractConfig
from hdovd.pipelines.extraction.engine import Extraction, Unit, new_rows

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise HdovdError("--executor ray needs Ray: pip install 'hdovd[ray]'") from error

Prepare = Callable[[ExtractConfig], Extraction]
LOOK_EVERY_S = 5.0  # how often the nodes of the cluster are counted
DEATHS = 3  # of workers at one part, or in a row while they load the model: then it is no accident


def do_with_ray(extraction: Extraction, config: ExtractConfig, prepare: Prepare) -> None:
    """Do all that is left of an extraction that has begun. Uses the cluster that Ray is connected to, that RAY_ADDRESS
    names or that runs on this machine; else starts one here. `prepare`: how a worker reads the inputs and loads the
    model. Raises HdovdError for a worker's own error, or if workers keep dying.
    """
    left = extraction.left()
    if not left:
        return
    connected = ray.is_initialized()
    if not connected:
        _connect()
    crew = ActorPool(config, len(left), prepare)
    try:
        texts = [unit for unit in left if unit in extraction.units()[0]]
        pictures = left[len(texts) :]
        with progress(None, "CLIP", "row", total=new_rows(extraction, pictures)) as bar:
            for units in (texts, pictures):  # pseudo labels need all nouns
                for done in crew.do(units):
                    extraction.done += done
                    bar.update(new_rows(extraction, [unit for unit in done if unit in pictures]))
    finally:
        crew.dismiss()
        if not connected:
            ray.shutdown()


class Worker:
    """What an actor runs."""

    def load(self, config: ExtractConfig, prepare: Prepare) -> None:
        """Read the inputs and load the model. No constructor: its errors would look like a death."""
        os.environ.pop("TORCHELASTIC_RUN_ID", None)  # of whoever started Ray: an actor is nobody's rank
        self._extraction = prepare(config)
        self._extraction.begin(Catalog(config.cache))

    def do(self, unit: Unit, wait: bool) -> tuple[bool, list[Unit]]:
        """Whether the unit is done, by whomever, and what this worker has written."""
        before = len(self._extraction.done)
        return not self._extraction.do([unit], wait=wait) or wait, self._extraction.done[before:]


class ActorPool:
    """The actors, as many as the cluster has room for and the work needs."""

    def __init__(self, config: ExtractConfig, most: int, prepare: Prepare) -> None:
        self._gpus, self._cpus = _size_of_actor(config)
        self._most, self._prepare = most, prepare
        cache = config.cache if "://" in str(config.cache) else Path(config.cache).absolute()
        self._config = ExtractConfig.from_dict(  # with absolute paths: actors have another working directory
            config.to_dict(),
            cache,
            device="cuda" if self._gpus else "cpu",
            batch_size=config.batch_size,
            part_rows=config.part_rows,
            workers=_workers(config, self._gpus),
            retry_failed=config.retry_failed,
            executor=Executor.RAY,
        )
        self._idle: list[Any] = []
        self._at_work: dict[
            Any, tuple[Any, Unit | None, bool]
        ] = {}  # by future: actor, unit (None: it loads), whether it may wait
        self._deaths: Counter[Unit | None] = Counter()
        self._looked, self._announced = -LOOK_EVERY_S, 0

    def do(self, units: list[Unit]) -> Iterator[list[Unit]]:
        """Do units in any order; what was written for each of them."""
        waiting, to_do = deque((unit, False) for unit in units), len(units)
        while to_do:
            self._hire()
            while self._idle and waiting:
                todo, actor = waiting.popleft(), self._idle.pop()
                self._at_work[actor.do.remote(*todo)] = actor, *todo
            if not self._at_work:  # no node has room
                time.sleep(1)
                continue
            for future in ray.wait(list(self._at_work), timeout=LOOK_EVERY_S)[0]:
                actor, unit, wait = self._at_work.pop(future)
                try:
                    answer = ray.get(future)
                except RayTaskError as error:
                    raise error.cause from error
                except RayError as error:
                    self._bury(actor, unit, error)
                    if unit is not None:
                        waiting.appendleft((unit, wait))
                    continue
                self._idle.append(actor)
                self._deaths[unit] = 0
                if unit is None:
                    continue
                finished, done = answer
                to_do -= finished
                if not finished:  # a process of another command is at it: come back when the rest is done
                    waiting.append((unit, True))
                yield done

    def dismiss(self) -> None:
        for actor in [*self._idle, *(actor for actor, _, _ in self._at_work.values())]:
            ray.kill(actor)

    def _hire(self) -> None:
        """Start actors where there is room."""
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked, kind, each = time.monotonic(), "GPU" if self._gpus else "CPU", 1 if self._gpus else self._cpus
        fits = sum(int(node.get(kind, 0)) // each for node in _nodes())
        if fits != self._announced:
            log(f"ray: room for {fits} workers, each with " + ("a GPU" if self._gpus else f"{self._cpus} CPU"))
            self._announced = fits
        for _ in range(min(fits, self._most) - len(self._idle) - len(self._at_work)):
            actor: Any = ray.remote(Worker).options(num_gpus=self._gpus, num_cpus=self._cpus).remote()
            self._at_work[actor.load.remote(self._config, self._prepare)] = actor, None, False

    def _bury(self, actor: Any, unit: Unit | None, error: RayError) -> None:
        """A worker has died, or cannot be reached: count it. Raises HdovdError if its work is what kills workers."""
        ray.kill(actor)
        self._looked = -LOOK_EVERY_S  # another one now
        self._deaths[unit] += 1
        what = "loading the inputs and the model" if unit is None else f"{unit.level} part {unit.part}"
        if self._deaths[unit] == DEATHS:
            raise HdovdError(
                f"{DEATHS} Ray workers died at {what}; the last: {_first_line(error)}\nOut of memory? See the logs of "
                f"Ray on that node; fewer --workers or a smaller --batch-size need less. What is finished is kept"
            )
        log(f"ray: a worker died at {what} ({_first_line(error)}); another one does it")


def _connect() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # in a cluster started here: no reports to anybody
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise HdovdError(
            f"no Ray cluster can be reached or started: {error}\nRAY_ADDRESS names one, `ray start --head` starts one; "
            "does it ask for a token (RAY_AUTH_TOKEN)? `ray status` tries the connection"
        ) from error


def _nodes() -> list[dict[str, float]]:
    """What the living nodes of the cluster have."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _size_of_actor(config: ExtractConfig) -> tuple[int, int]:
    """GPUs and CPUs that an actor takes of a node. All are of one kind, so that all rows are computed alike."""
    if ray.cluster_resources().get("GPU", 0) >= 1 and config.device != "cpu":
        return 1, 1
    if config.device not in ("auto", "cpu"):
        raise HdovdError(
            f"--device {config.device}: the Ray cluster has no GPU (`ray status`); use --device cpu, or wait for its "
            f"nodes"
        )
    largest = max(int(node.get("CPU", 0)) for node in _nodes())
    return 0, max(1, min(1 + (config.workers or 0), largest))


def _workers(config: ExtractConfig, gpus: int) -> int:
    """Of an actor. It may see all cores of its node, and nothing of the others there."""
    if config.workers is not None or not gpus:
        return config.workers or 0
    nodes = [node for node in _nodes() if node.get("GPU", 0) >= 1]
    return min(workers_a_gpu(int(node.get("CPU", 0)), int(node["GPU"])) for node in nodes)


def _first_line(error: RayError) -> str:
    return next((line.strip()[:120] for line in str(error).splitlines() if line.strip()), type(error).__name__)
