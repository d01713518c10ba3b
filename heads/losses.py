"""One loss for several tasks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.inputs import full_name

MISSING = -100  # the label of an example that has none for a task


class MultiTaskLoss(nn.Module):
    """A cross-entropy per task, and their combination.

    Args:
        tasks: their names.
        weights: task -> factor, 1 where not given; the total is the weighted sum.
        uncertainty: learn the weights (Kendall et al. 2018, section 3.2): with s = log variance of a
            task, the total is the sum of exp(-s) * loss + s / 2. `log_variance` holds every s, 0 at first.

    Raises:
        TypeError: weights that are no dict.
        ValueError: no task, or one twice; a weight for none, below zero or not finite; both kinds of weights.
    """

    def __init__(
        self, tasks: Sequence[str], *, weights: Mapping[str, float] | None = None, uncertainty: bool = False
    ) -> None:
        super().__init__()
        weights = weights or {}
        names = [] if isinstance(tasks, str) else list(tasks)
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tasks is {tasks!r}, it must be a list of different names, one or more")
        check_dict("weights", weights)
        for name, weight in weights.items():
            if name not in names:
                raise ValueError(f"a loss weight is given for {name!r}, the tasks are: {', '.join(names)}")
            if not 0 <= _number(weight) < math.inf:
                raise ValueError(f"the loss weight of {name} is {weight}, it must be 0 or a positive number")
        if weights and uncertainty:
            raise ValueError("loss weights are given and also to be learned: choose one")
        self.weights = {name: float(weights.get(name, 1.0)) for name in names}
        self.log_variance = nn.Parameter(torch.zeros(len(names))) if uncertainty else None

    def forward(
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        counts: Mapping[str, float] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and each task's mean over the examples that have a label for it.

        A task without a label in the batch contributes exactly zero, and zero gradients.

        Args:
            logits: task -> (B, classes).
            labels: task -> (B,) class indices, `MISSING` where there is none.
            counts: what to divide each task's sum by; its number of labels here if None. (Where the
                gradients of k processes or parts of a batch are averaged: their common number / k.)

        Raises:
            TypeError: no mapping of tasks, logits that are no tensor, labels that are none of int64 or uint8.
            ValueError: a task without its logits, labels or count, a label that is no class.
        """
        self._check(logits, labels, counts)
        losses = {}
        total = torch.zeros((), device=next(iter(logits.values())).device)
        for i, (name, weight) in enumerate(self.weights.items()):
            # .long(), since in 8 bits MISSING would be a class, 156
            count = float((labels[name].long() != MISSING).sum()) if counts is None else counts[name]
            try:
                summed = F.cross_entropy(logits[name], labels[name], ignore_index=MISSING, reduction="sum")
            except IndexError as error:  # on a CPU; a GPU does not say
                last = logits[name].shape[1] - 1
                raise ValueError(f"labels of {name}: one is neither from 0 to {last} nor MISSING") from error
            losses[name] = summed / max(count, 1e-9)
            if self.log_variance is None:
                total = total + weight * losses[name]
            else:
                s = self.log_variance[i]
                # 0 * s: zero gradients, not none
                total = total + torch.exp(-s) * losses[name] + (s / 2 if count else 0 * s)
        return total, losses

    def _check(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], counts: Mapping[str, float] | None
    ) -> None:
        given = {"logits": logits, "labels": labels} | ({} if counts is None else {"counts": counts})
        for kind, tensors in given.items():
            check_dict(kind, tensors)
            if missing := self.weights.keys() - tensors.keys():
                raise ValueError(f"there are no {kind} for {min(missing)} (an unknown label is {MISSING})")
        integers = (torch.int64, torch.uint8)  # that cross_entropy takes
        if wrong := [name for name in self.weights if getattr(labels[name], "dtype", None) not in integers]:
            raise TypeError(f"labels of {wrong[0]} must be a tensor of class indices, int64")
        if wrong := [name for name in self.weights if not isinstance(logits[name], Tensor)]:
            raise TypeError(f"logits of {wrong[0]} must be a tensor, not a {full_name(logits[wrong[0]])}")
        for name in self.weights:
            ours, theirs = tuple(labels[name].shape), tuple(logits[name].shape)
            if len(theirs) != 2 or ours != theirs[:1]:
                raise ValueError(f"{name}: labels {ours} and logits {theirs} must be (B,) and (B, classes)")


def check_dict(name: str, given: object) -> None:
    """Raises TypeError unless it is a dict, with something for each task."""
    if not isinstance(given, Mapping):
        hint = ": give its .logits" * hasattr(given, "logits")
        raise TypeError(f"{name} must be a dict, task -> value, not a {full_name(given)}{hint}")


def _number(value: Any) -> float:
    """nan for what is none, such as a tensor of weights for each class."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan
