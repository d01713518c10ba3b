"""Eval mode for a while."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

_lock = threading.RLock()
# Part of a model -> how many evaluate it now, and what mode it was in before the first of them.
_evaluated: WeakKeyDictionary[nn.Module, tuple[int, bool]] = WeakKeyDictionary()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; a part gets its old mode back when the last that uses it leaves.

    Several threads may do this at once, with one module or with several that share parts.
    """
    entered: list[nn.Module] = []
    try:
        with _lock:
            for part in module.modules():
                users, mode = _evaluated.get(part, (0, part.training))
                _evaluated[part] = users + 1, mode
                entered.append(part)
            module.eval()
        with torch.no_grad():
            yield
    finally:
        with _lock:
            _leave(module, entered)


def _leave(module: nn.Module, entered: Sequence[nn.Module]) -> None:
    modes = {}
    for part in entered:
        users, mode = _evaluated.pop(part)
        if users > 1:
            _evaluated[part] = users - 1, mode
        else:
            modes[part] = mode
    if len(modes) == len(entered) and modes.get(module):
        module.train()  # whatever else a module of the user's does in there
    for part, mode in modes.items():
        part.training = mode
