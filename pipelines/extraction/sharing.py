"""How the units of an extraction are shared out: one process, torchrun's, or a SLURM array's `--shard I/N`.

There is one way through all of them: every process goes over its own share of the same list, leaves out what is done,
and claims what it does. Shares may change between runs, and may overlap: the bytes are the same.
"""

import os
from dataclasses import dataclass

from hdovd.pipelines.common.device import shown
from hdovd.pipelines.common.progress import progress
from hdovd.pipelines.extraction.config import Share
from hdovd.pipelines.extraction.engine import Extraction, Unit


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """What this process does: the part of the work that its command was given, and its rank among torchrun's `world`
    processes.
    """

    command: Share = Share(0, 1)  # noqa: RUF009 - frozen
    rank: int = 0
    world: int = 1
    local_rank: int | None = None

    @property
    def count(self) -> int:
        """How many processes there are for all of the work."""
        return self.command.count * self.world

    @property
    def speaks(self) -> bool:
        """Whether this process prints: one of torchrun's does."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """Under torchrun, one GPU a process."""
        import torch

        own = self.local_rank is not None and asked in ("auto", "cuda") and torch.cuda.is_available()
        return f"cuda:{self.local_rank}" if own else asked


def this_share(asked: Share | None) -> ProcessShare:
    """`asked` (None: all), shared again among the processes of torchrun if it started this one."""
    command = asked or Share(0, 1)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ProcessShare(command)
    return ProcessShare(command, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def do_share(extraction: Extraction, share: ProcessShare) -> None:
    """Do this process's units, then what the others of the same torchrun have not come to, and wait for what is in
    work.
    """
    texts, units = extraction.units()
    for unit in extraction.do(texts):
        extraction.wait_for(unit)
    asked = units[share.command.index :: share.command.count]
    mine = asked[share.rank :: share.world]
    others = [unit for unit in reversed(asked) if unit not in mine]  # from the end: where the others come last
    label = f"CLIP on {shown(extraction.teacher.device)}" + (f", 1 of {share.world}" if share.world > 1 else "")
    with progress(None, label, "row", total=new_rows(extraction, mine) if share.speaks else 0) as extraction.bar:
        for unit in extraction.do(mine + others):
            extraction.wait_for(unit)


def new_rows(extraction: Extraction, units: list[Unit]) -> int:
    """Rows that `units` have to compute."""
    count = 0
    for plan in extraction.plans.values():
        todo = set(plan.todo) & {unit.part for unit in units if unit.level is plan.level}
        count += plan.new_rows_of(todo)
    return count
