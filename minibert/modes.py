"""Eval mode for a while."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_lock = threading.Lock()
# Module -> how many evaluate it now, and what mode each part was in before the first of them.
_evaluated: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; when the last of several threads leaves, each part gets its old mode back."""
    with _lock:
        users, modes = _evaluated.get(module) or (0, [(part, part.training) for part in module.modules()])
        _evaluated[module] = users + 1, modes
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        with _lock:
            users, modes = _evaluated.pop(module)
            if users > 1:
                _evaluated[module] = users - 1, modes
            else:
                for part, mode in modes:  # from the top down: `train` also sets the parts below
                    part.train(mode)
