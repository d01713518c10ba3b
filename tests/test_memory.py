import platform
import subprocess
import sys

import pytest

FREED_AT_ONCE = """
import resource, sys
import torch
from minibert.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(12 * 2**20, dtype=torch.uint8) for _ in range(4)]  # 48 MiB
    for block in blocks:
        block[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print([faults() for _ in range(5)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc allocates")
def test_freed_memory_is_used_again() -> None:
    def faults(keep: str) -> int:
        done = subprocess.run([sys.executable, "-c", FREED_AT_ONCE, keep], stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert faults("keep") < 100 < faults("as it is")
