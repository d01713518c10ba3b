"""Eval mode for a while."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_lock = threading.Lock()
# Part of a model -> how many evaluate it now, and what mode it was in before the first of them.
_evaluated: dict[nn.Module, tuple[int, bool]] = {}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; a part gets its old mode back when the last that uses it leaves.

    Several threads may do this at once, with one module or with several that share parts.
    """
    parts = list(module.modules())
    with _lock:
        for part in parts:
            users, mode = _evaluated.get(part, (0, part.training))
            _evaluated[part] = users + 1, mode
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            modes = {}
            for part in parts:
                users, mode = _evaluated.pop(part)
                if users > 1:
                    _evaluated[part] = users - 1, mode
                else:
                    modes[part] = mode
            for part, mode in modes.items():  # from the top down: `train` also sets the parts below
                if len(modes) == len(parts):
                    part.train(mode)
                else:  # some of which others use
                    part.training = mode
