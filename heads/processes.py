"""Training in several processes that torchrun started; one process is the same with nothing to exchange."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from heads.losses import MISSING
from minibert.devices import find_device

LONGEST_WAIT = timedelta(days=1)  # the others wait while the first process evaluates


class FirstFailedError(RuntimeError):
    """Something failed in the first process, so the others stop too."""


class Processes:
    """This process among those that train together: its `rank`, how many there are, its device.

    `device` is cpu, cuda, cuda:N, or auto; `bf16` whether `autocast` does anything. On a GPU cuDNN's attention
    is turned off, for all that runs in this process.

    Raises:
        ValueError: there is no such device here.
    """

    def __init__(self, device: str = "auto", *, bf16: bool = False) -> None:
        self.bf16 = bf16
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = find_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every size of batch
        if self.count > 1 and not dist.is_initialized():
            kind = "nccl" if self.device.type == "cuda" and dist.is_nccl_available() else "gloo"
            dist.init_process_group(kind, timeout=LONGEST_WAIT)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that evaluates, prints and writes."""
        return self.rank == 0

    def totals(self, values: list[float]) -> list[float]:
        """Each value summed over the processes."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(total) for total in tensor]

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives in the first process; it runs only there, and if it fails all fail.

        Raises:
            FirstFailedError: in the others, if it raised in the first.
        """
        if self.count == 1:
            return compute()
        box = [None, False]  # the value, whether there is one
        if self.is_first:
            try:
                box = [compute(), True]
            except Exception:
                dist.broadcast_object_list(box, device=self.device)
                raise
        dist.broadcast_object_list(box, device=self.device)
        if not box[1]:
            raise FirstFailedError("the first process failed, and has said why")
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        values: list[Any] = [value]
        if self.count > 1:
            values = [None] * self.count
            dist.all_gather_object(values, value)
        return values

    def autocast(self) -> torch.autocast:
        """Computes in bfloat16 where that is safe, if this was asked for."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over the processes."""
        if self.count == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def share(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This process's part of a batch of `SentenceDataset.collate`, on its device.

        Every process needs something to run: where there are fewer rows than processes, the first row
        without its labels.
        """
        rows = {name: tensor[self.rank :: self.count] for name, tensor in batch.items()}
        if len(rows["attention_mask"]) == 0:
            rows = {name: tensor[:1] for name, tensor in batch.items()}
            rows |= {n: torch.full_like(t, MISSING) for n, t in rows.items() if n.startswith("labels.")}
        return {name: tensor.to(self.device) for name, tensor in rows.items()}

    def random_states(self) -> dict[str, Tensor]:
        """What the random numbers of this process go on from, by kind of device."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_random_state(self, kind: str, state: Tensor) -> None:
        """Takes back one of `random_states`, if this process has such a device."""
        if kind == "cpu":
            torch.set_rng_state(state)
        elif self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)

    def close(self) -> None:
        """Leaves the group."""
        if self.count > 1:
            dist.destroy_process_group()


@contextmanager
def catching_interrupts() -> Iterator[list[int]]:
    """A list that is no longer empty after Ctrl-C or SIGTERM. The same signal again acts at once."""
    caught: list[int] = []

    def note(number: int, _: Any) -> None:
        if not caught and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # unlike print, it may be called in the middle of itself
                os.write(2, b"\nstopping once all is saved; the same again stops at once\n")
        caught.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {}
    for stop in (signal.SIGINT, signal.SIGTERM):  # torchrun passes Ctrl-C on as both
        if signal.getsignal(stop) != signal.SIG_IGN:
            before[stop] = signal.signal(stop, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
