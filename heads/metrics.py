"""How good a task's predictions are."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.losses import MISSING


@dataclass(frozen=True)
class TaskMetrics:
    """Of one task on one set: mean cross-entropy in nats, accuracy and macro-F1 from 0 to 1.

    `confusion[i][j]` counts the examples of class i that were taken for class j. Where no example has a
    label the numbers are None.
    """

    loss: float | None
    accuracy: float | None
    macro_f1: float | None
    confusion: list[list[int]]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> "TaskMetrics":
        """(n, classes) logits and (n,) class indices, `MISSING` where there is none."""
        known = labels != MISSING
        logits, labels = logits[known].float(), labels[known]
        classes = logits.shape[1]
        pairs = labels * classes + logits.argmax(1)
        confusion = torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
        table = confusion.tolist()
        if len(labels) == 0:
            return cls(None, None, None, table)
        return cls(
            F.cross_entropy(logits, labels).item(),
            confusion.diagonal().sum().item() / len(labels),
            macro_f1(confusion),
            table,
        )

    def scores(self) -> dict[str, float | None]:
        """The three numbers by name."""
        return {"loss": self.loss, "accuracy": self.accuracy, "macro_f1": self.macro_f1}


def macro_f1(confusion: Tensor) -> float:
    """The mean over classes of 2 TP / (2 TP + FP + FN), of the classes that occur or are predicted.

    (classes, classes) counts, true by predicted; as scikit-learn's f1_score(average="macro").
    """
    hits = confusion.diagonal().double()
    sizes = (confusion.sum(0) + confusion.sum(1)).double()  # predicted + true = 2 TP + FP + FN
    present = sizes > 0
    return float((2 * hits[present] / sizes[present]).mean())


def majority(train_labels: Tensor, labels: Tensor) -> float | None:
    """The accuracy of always answering the class that is most frequent in training."""
    train_labels, labels = train_labels[train_labels != MISSING], labels[labels != MISSING]
    if len(train_labels) == 0 or len(labels) == 0:
        return None
    most_frequent = torch.bincount(train_labels).argmax()
    return float((labels == most_frequent).double().mean())
