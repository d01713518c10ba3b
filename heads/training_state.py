"""All that decides, besides the model, how training goes on: a few numbers and named tensors."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from heads.processes import Processes


@dataclass
class Progress:
    """How far a run has come."""

    data: dict[str, str]  # set -> fingerprint of its examples
    processes: int = 1
    epoch: int = 0
    batch: int = 0  # batches done in this epoch
    step: int = 0
    totals: dict[str, list[float]] = field(default_factory=dict)  # task -> loss, hits, labels in this epoch
    best: float | None = None
    stale: int = 0  # epochs since the best one
    finished: bool = False
    metrics_bytes: int = 0  # length of metrics.jsonl when saved

    def count(self, task: str, loss: float, hits: float, labels: float) -> None:
        """Adds a step's sums to the epoch's."""
        old = self.totals.get(task, [0.0, 0.0, 0.0])
        self.totals[task] = [a + b for a, b in zip(old, (loss, hits, labels), strict=True)]

    def means(self) -> dict[str, dict[str, float | None]]:
        """The epoch's training loss and accuracy per task, None where it had no labels."""
        return {
            task: {"loss": loss / labels if labels else None, "accuracy": hits / labels if labels else None}
            for task, (loss, hits, labels) in self.totals.items()
        }

    def judge(self, score: float) -> bool:
        """Notes an epoch's score; whether it is the best so far."""
        better = self.best is None or score > self.best
        self.best, self.stale = (score, 0) if better else (self.best, self.stale + 1)
        return better

    def next_epoch(self, *, finished: bool) -> None:
        """An epoch is over, perhaps the last."""
        self.epoch, self.batch, self.totals, self.finished = self.epoch + 1, 0, {}, finished


def collect(module: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes) -> dict[str, Tensor]:
    """The optimizer's state, the parameters of `module.loss`, every process's random state, by name."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    tensors = {
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }
    tensors |= {name: p for name, p in module.named_parameters() if name.startswith("loss.")}
    for rank, states in enumerate(processes.gather(processes.random_states())):
        tensors |= {f"random/{rank}/{kind}": state for kind, state in states.items()}
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def restore(
    state: dict[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer, processes: Processes
) -> None:
    """The inverse of `collect`."""
    parameters = dict(module.named_parameters())
    for name, tensor in state.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            parameter, _, key = rest.rpartition("/")
            on_cpu = key == "step" and not optimizer.defaults.get("fused")
            device = torch.device("cpu") if on_cpu else parameters[parameter].device
            optimizer.state[parameters[parameter]][key] = tensor.clone().to(device)
        elif kind == "random":
            rank, _, device_kind = rest.partition("/")
            if rank == str(processes.rank):
                processes.set_random_state(device_kind, tensor.clone())
        else:
            parameters[name].data.copy_(tensor)
