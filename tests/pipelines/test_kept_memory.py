"""Memory that a step freed is the next step's. In a process of its own: what is asked of malloc stays for good."""

import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from hdovd.pipelines.kept_memory import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
before = [pages() for _ in range(12)]
kept = keep_freed_memory()
after = [pages() for _ in range(12)]  # the first ones find holes that are too small by the alignment
print(min(before), kept, after[-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is asked of malloc")
def test_freed_memory_is_not_fetched_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(before) > 20  # pages of 4 KiB to 2 MiB
    assert int(after) < int(before) / 10
