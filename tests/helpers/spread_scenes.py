"""Extractions by several processes. `test_spread_extraction` plays these scenes and judges what they saw."""

from __future__ import annotations

import os
import select
import signal

from forked_extractions import Child, Extractions, Facts, Interrupted, damaged

from hdovd.pipelines.extraction.config import Share


def together(all_of: Extractions) -> Facts:
    """The same command started three times at once: all are in the middle of a part when the first goes on."""
    cache = all_of.folder("together")
    arrived, arrive = os.pipe()
    going, go = os.pipe()

    def meet() -> None:
        os.write(arrive, b".")
        os.read(going, 1)

    children = [Child(all_of.function(cache, Interrupted(all_of.teacher, 3, meet))) for _ in range(3)]
    for _ in children:
        assert select.select([arrived], [], [], 60)[0], [child.printed() for child in children]
        os.read(arrived, 1)
    os.write(go, b"...")
    return Facts(
        codes=[child.wait() for child in children],
        printed=[child.printed() for child in children],
        same=all_of.same(cache),
    )


def elastic(all_of: Extractions) -> Facts:
    """Two shards, killed; three, one of them killed; then the plain command."""
    cache = all_of.folder("elastic")
    facts = Facts()

    def shards(count: int, killed: dict[int, int]) -> None:
        children = []
        for index in range(count):
            teacher = Interrupted(all_of.teacher, killed.get(index, 0), lambda: os.kill(os.getpid(), signal.SIGKILL))
            children.append(Child(all_of.function(cache, teacher, share=Share(index, count))))
        facts[f"{count} codes"] = [child.wait() for child in children]
        facts[f"{count} printed"] = [child.printed() for child in children]
        facts[f"{count} damaged"] = damaged(cache)

    shards(2, {0: 7, 1: 12})
    shards(3, {1: 4})
    last = Child(all_of.command(cache))
    return facts | Facts(code=last.wait(), printed=last.printed(), same=all_of.same(cache))


def ranks_and_shards(all_of: Extractions) -> Facts:
    """What torchrun tells its processes: two of one command; then two commands with a shard each, of two processes
    each.
    """
    facts = Facts()
    for name, shares in (("torchrun", [None]), ("torchrun in an array", [Share(0, 2), Share(1, 2)])):
        cache, children = all_of.folder(name), []
        for share in shares:
            for rank in (0, 1):
                told = {"TORCHELASTIC_RUN_ID": "x", "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
                children.append(
                    Child(all_of.function(cache, before=lambda told=told: os.environ.update(told), share=share))
                )
        facts[name] = Facts(codes=[child.wait() for child in children], printed=[child.printed() for child in children])
        facts[name]["same"] = all_of.same(cache)
    return facts


SCENES = (together, elastic, ranks_and_shards)
