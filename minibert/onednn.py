"""oneDNN, which comes with torch: where it multiplies faster than MKL, and how to make torch use it.

docs/performance.md has the measurements.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

# torch hands products of fewer multiplications than this to other kernels (its mkldnn_gemm_min_size).
FEWEST_MULTIPLICATIONS = 16**3


def packs_weights(weight: Tensor) -> bool:
    """Whether a Linear with this weight is to be packed for oneDNN: on x86 CPUs, in float32 and bfloat16.

    By the kind of CPU and not by a trial run, which could turn out differently the next time and
    with it the last bits. On x86 oneDNN is faster than MKL where that is slow (AMD) and as fast
    where it is not. On ARM torch has other kernels.
    """
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """`F.linear` and oneDNN's `activation`, (rows, in) -> (rows, out), of a weight that oneDNN has reordered.

    A row's numbers depend neither on the other rows nor on how many there are (in bfloat16 with AMX: amx.py).
    """
    if x.shape[0] == 1:  # oneDNN sums a single row in another order than one of several
        return linear(x.expand(2, -1), weight, bias, activation)[:1]
    # The public torch.utils.mkldnn copies input and output, and cannot fuse the activation.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, activation, [], "none")  # type: ignore[no-any-return]


_SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_NO_CHANGE = nullcontext()
_lock = threading.RLock()
_users = 0  # of the setting: threads may encode at the same time
_before = "none"


@contextmanager
def onednn_products() -> Iterator[None]:
    """While active, torch multiplies float32 matrices through oneDNN, if that is exact here.

    torch does so only if it is allowed to round them to bfloat16 on the way (fp32_precision "bf16"). oneDNN
    does round on CPUs with AMX; on others with AVX-512 its products are those of float32, at up to twice the
    rate of MKL. Elsewhere nothing changes. The setting is the whole process's: meanwhile another thread's
    products may differ in the last bit, and so may those in here while another thread is in
    `products_through`.
    """
    global _users, _before
    entered = False
    try:
        with _lock:
            if are_exact():
                if _users == 0:
                    _before = _own_precision()
                _users += 1
                entered = True  # from here on an interrupt, too, is followed by what is below
                _SETTING.fp32_precision = "bf16"
        yield
    finally:
        if entered:
            with _lock:
                _users -= 1
                if _users == 0:
                    _SETTING.fp32_precision = _before


def products_through(library: Literal["oneDNN", "MKL"], states: Tensor) -> AbstractContextManager[None]:
    """While active, products of states like these go through this library, if they are float32 on a CPU and
    oneDNN's are exact there.

    Whatever other threads want: they wait for each other, so nothing else belongs in there.
    """
    if are_exact() and states.dtype == torch.float32 and states.is_cpu:
        return _through("bf16" if library == "oneDNN" else "ieee")
    return _NO_CHANGE


@contextmanager
def _through(precision: str) -> Iterator[None]:
    with _lock:
        before = _own_precision()
        try:
            _SETTING.fp32_precision = precision
            yield
        finally:
            _SETTING.fp32_precision = before


def _own_precision() -> str:
    """The setting as it was given: "none" where it reads as its parent's, to which it is to go back."""
    own, parent = _SETTING.fp32_precision, torch.backends.mkldnn.fp32_precision
    return "none" if own == parent else own


def multiplies(states: Tensor, length: int) -> bool:
    """Whether torch now sends attention's products through oneDNN: `length` tokens, states like these (..., D).

    Each of them alone is large enough for it, so that it does not matter how many there are.
    """
    if length * length * states.shape[-1] <= FEWEST_MULTIPLICATIONS:
        return False
    if states.dtype == torch.float32:
        return _users > 0 and states.is_cpu
    return states.dtype == torch.bfloat16 and packs_weights(states)


@cache
def are_exact() -> bool:
    """Whether oneDNN's products of float32 are those of float32, with all 24 bits, on this CPU.

    The first time it changes the setting for a moment.
    """
    # The same question that torch asks before it takes oneDNN: AVX-512, on x86.
    if not packs_weights(torch.empty(0, dtype=torch.bfloat16, device="cpu")):
        return False
    kind: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    numbers = 1 + torch.arange(64 * 64, **kind).view(1, 64, 64) * 2.0**-23  # all alike to bfloat16's 8 bits
    with _through("bf16"), torch.autocast("cpu", enabled=False):
        return torch.equal(numbers @ torch.eye(64, **kind)[None], numbers)
