"""What a program shows on a terminal (Linux and macOS)."""

import os
import pty
import sys
import termios
from collections.abc import Callable
from contextlib import suppress

import pytest


def shown_on_a_terminal(run: Callable[[], object]) -> str:
    """What `run` prints on standard error where that is a terminal, 100 columns wide."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(screen, (24, 100))
    with pytest.MonkeyPatch.context() as patched, os.fdopen(terminal, "w") as stderr:
        patched.setattr(sys, "stderr", stderr)
        run()
    shown = b""
    with suppress(OSError):  # at its end
        while part := os.read(screen, 65536):
            shown += part
    os.close(screen)
    return shown.decode()
