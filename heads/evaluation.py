"""How good a model is on a set of sentences."""

from collections.abc import Mapping

import torch

from heads.data import SentenceDataset
from heads.features import compute, sorted_batches
from heads.metrics import TaskMetrics, majority
from heads.multitask import MultiTaskModel
from heads.processes import Processes
from minibert.modes import evaluating


def evaluate(model: MultiTaskModel, dataset: SentenceDataset, processes: Processes) -> dict[str, TaskMetrics]:
    """Each task's metrics, in eval mode.

    Raises:
        ValueError: logits that are not finite, of which the metrics would make a wrong class and a best epoch.
    """
    batches = sorted_batches(dataset, range(len(dataset)))
    outputs = []
    with evaluating(model), processes.autocast():
        for indices in batches:
            batch = {name: tensor.to(processes.device) for name, tensor in dataset.collate(indices).items()}
            outputs.append(compute(model, batch, dataset.depth).logits)
    order = [i for batch in batches for i in batch]
    metrics = {}
    for task in model.heads:
        scores = torch.cat([logits[task] for logits in outputs])  # (n, classes)
        if broken := int((~scores.isfinite()).any(1).sum()):
            raise ValueError(
                f"{task}: nan or inf among the logits of {broken} of {len(dataset)} sentences: nothing can be "
                "said of a model with a weight that is not finite, or with one so large that a sum is not"
            )
        metrics[task] = TaskMetrics.of(scores, dataset.labels[task][order].to(scores.device))
    return metrics


def score(metrics: Mapping[str, TaskMetrics], name: str) -> float:
    """What checkpoints are compared by, larger is better.

    `name` is loss, accuracy or macro_f1, the mean over the tasks that have labels; or TASK.loss and so on.
    """
    task, _, metric = name.rpartition(".")
    values = [getattr(m, metric) for t, m in metrics.items() if task in ("", t)]
    known: list[float] = [value for value in values if value is not None]
    return (-1.0 if metric == "loss" else 1.0) * sum(known) / len(known)


def majority_accuracies(sets: Mapping[str, SentenceDataset], name: str) -> dict[str, float | None]:
    """The accuracy on a set of always answering what is most frequent in training; None where unknown."""
    labels = sets[name].labels
    if "train" not in sets:
        return dict.fromkeys(labels)
    return {task: majority(sets["train"].labels[task], labels[task]) for task in labels}
