import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ENCODE_AGAIN = """
import resource, sys
from minibert import SentenceEncoder, fast_inference

if sys.argv[1] == "without":
    fast_inference.keep_freed_memory = lambda: None
encoder = SentenceEncoder.from_pretrained(sys.argv[2])
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    encoder.encode(["the sky is blue and clear " * 4] * 500)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))  # a single pass may need a block more
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how glibc allocates")
def test_encoding_again_takes_no_fresh_memory(minilm: Path) -> None:
    # glibc's own defaults, whatever is set here (MALLOC_...)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def pages(how: str) -> int:
        command = [sys.executable, "-c", ENCODE_AGAIN, how, str(minilm)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    assert 10 * pages("with") < pages("without")
