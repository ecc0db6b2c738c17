"""Memory that a step freed is the next step's. In a process of its own: what is asked of malloc stays for good."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, threading, torch
from hdovd.pipelines.training.kept_memory import keep_freed_memory

def pages(write):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def large():
    torch.empty(9 * 2**26)[: 2**24].fill_(1)  # 2.25 GiB: more than a limit of 31 bits; a part of it is written

def small():
    [torch.ones(2**18) for _ in range(200)]

def elsewhere():
    thread = threading.Thread(target=small)
    thread.start()
    thread.join()

torch.set_num_threads(1)
before = pages(large)
kept = keep_freed_memory()
small_before = pages(small)
after = [pages(write) for write in (large, large, large, small, elsewhere, elsewhere)]
print(kept, before, after[2], small_before, *after[3:])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is asked of malloc")
def test_freed_memory_is_not_fetched_again_by_any_thread() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    kept, *counts = done.stdout.split()
    assert kept == "True"
    large, large_again, small, *small_again = map(int, counts)
    assert large > 20  # pages of 4 KiB to 2 MiB
    assert large_again < large / 10
    assert max(small_again) < small / 10
