"""`python -m ...` and `python -c ...` in processes that need not import torch: forks of one that has.

That one has not imported huggingface_hub, which reads its environment variables once at import.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])  # the latter is what the first optimizer imports


def run(
    arguments: Sequence[str], environment: Mapping[str, str], directory: Path
) -> subprocess.CompletedProcess[str]:
    """What `python` prints and returns, given these arguments, in `directory`."""
    with tempfile.TemporaryDirectory() as elsewhere:
        outputs = [Path(elsewhere, "stdout"), Path(elsewhere, "stderr")]
        process = FORKS.Process(target=_python, args=(arguments, dict(environment), directory, outputs))
        process.start()
        process.join()
        assert process.exitcode is not None
        printed = (path.read_text() for path in outputs)
        return subprocess.CompletedProcess(arguments, process.exitcode, *printed)


def _python(
    arguments: Sequence[str], environment: Mapping[str, str], directory: Path, outputs: Sequence[Path]
) -> None:
    assert "huggingface_hub" not in sys.modules
    for number, path in enumerate([Path(os.devnull), *outputs]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    option, what, *rest = arguments
    if option == "-m":
        sys.argv = [what, *rest]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(what, {"__name__": "__main__"})
