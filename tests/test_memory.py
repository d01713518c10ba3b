import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ENCODE_THEN_ALLOCATE = """
import resource, sys
import torch
from minibert import SentenceEncoder

SentenceEncoder.from_pretrained(sys.argv[1]).encode("the sky is blue")
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(18 * 2**18) for _ in range(3)]  # 54 MiB, as a layer takes
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)  # the last time
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc allocates")
def test_what_is_freed_is_kept_for_the_next_batch(minilm: Path) -> None:
    # glibc's own defaults, whatever is set here (MALLOC_...): with them it takes 9,000 new pages nearly every time.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", ENCODE_THEN_ALLOCATE, str(minilm)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    assert int(done.stdout) < 100
