"""`python -m ...` and `python -c ...` in processes that need not import torch: forks of one that has.

That one has not imported what reads an environment variable of Hugging Face: huggingface_hub does, once at import.
"""

import json
import os
import runpy
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]


class Forks:
    """Starts such processes, one at a time."""

    def __init__(self, directory: Path) -> None:
        """Their output passes through files in `directory`."""
        self.streams = [directory / "stdout", directory / "stderr"]
        self.server = subprocess.Popen(
            [sys.executable, "-m", __name__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path
    ) -> subprocess.CompletedProcess[str]:
        """As subprocess.run with the arguments of `python`."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        request = {
            "arguments": arguments,
            "environment": dict(environment),
            "cwd": str(cwd),
            "streams": [os.devnull, *map(str, self.streams)],
        }
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in self.streams))

    def close(self) -> None:
        """Ends the process that is forked."""
        self.server.communicate()


def requested() -> dict[str, Any]:
    """In each fork what is asked of it; the process that is forked does not come back from here."""
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return json.loads(line)  # type: ignore[no-any-return]
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


def become(arguments: list[str], environment: dict[str, str], cwd: str, streams: list[str]) -> NoReturn:
    """Does what `python` does with these arguments, where and with what it would find."""
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    kind, what, *rest = arguments
    status = 0
    try:
        if kind == "-m":
            sys.argv = [what, *rest]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(what, {"__name__": "__main__"})
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without taking apart all that was imported, which takes as long as the rest


if __name__ == "__main__":
    from minibert import BertModel, SentenceEncoder, Tokenizer  # noqa: F401

    assert "huggingface_hub" not in sys.modules
    become(**requested())
