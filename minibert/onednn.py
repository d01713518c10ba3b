"""oneDNN, which comes with torch: where it multiplies faster than MKL, how to make torch use it, and
how to make it sum every row alike.

docs/performance.md has the measurements.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# torch hands products of fewer multiplications than this to other kernels (its mkldnn_gemm_min_size).
FEWEST_MULTIPLICATIONS = 16**3

HAS_AMX = bool(torch.cpu._is_amx_tile_supported())  # Intel's matrix registers, for bfloat16

# With AMX oneDNN sums a long row of a bfloat16 product in parts; in which ones depends on how many rows and
# threads there are. What goes through GELU or tanh behind the product is summed whole, up to SHORT_SUM numbers;
# and tanh(x) is x where x is tiny. So a product without an activation is made of inputs scaled by TINY, sent
# through tanh and scaled back: "unsplit". FEW_ROWS are always summed whole, and all others must be summed like
# them. The plain product is faster, so `_way` tries whether it comes to the same for a number of rows. Where no
# way does so for all rows at once they are multiplied in pieces, each the largest of MANY_ROWS for which one
# does.
FEW_ROWS = 32
MANY_ROWS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64)
SHORT_SUM = 1024
TINY = 2.0**-32  # tanh(x) == x up to 4e-4, which is 1.8 million times this


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


def block(weight: Tensor, dtype: torch.dtype) -> int:
    """Of how many of its inputs at a time a Linear (out, in) is best computed in `dtype`."""
    inputs = weight.shape[1]
    short = HAS_AMX and weight.is_cpu and dtype == torch.bfloat16 and inputs % SHORT_SUM == 0
    return SHORT_SUM if short else inputs


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """`F.linear` and oneDNN's `activation`, (rows, in) -> (rows, out), of a weight that oneDNN has reordered.

    A row's numbers do not depend on the others, nor on how many there are.
    """
    if not HAS_AMX or weight.dtype != torch.bfloat16:
        return _linear(x, weight, bias, activation)
    case = (activation, *weight.shape, torch.get_num_threads())
    rows = x.shape[0]  # len() of a tensor is written in Python
    if way := _way(rows, *case):
        return _linear(x, weight, bias, way)
    x = F.pad(x, (0, 0, 0, -rows % FEW_ROWS))
    pieces = x.split_with_sizes(_sizes(x.shape[0], *case))
    products = [_linear(piece, weight, bias, _way(piece.shape[0], *case) or activation) for piece in pieces]
    return (torch.cat(products) if len(products) > 1 else products[0])[:rows]


def _linear(x: Tensor, weight: Tensor, bias: Tensor, way: str) -> Tensor:
    """By an activation, or "unsplit": none, on the way to tanh."""
    if way == "unsplit":
        return _linear(x * TINY, weight, bias * TINY, "tanh").mul_(1 / TINY)
    if x.shape[0] == 1:  # oneDNN sums a single row in another order than one of several
        return _linear(x.expand(2, -1), weight, bias, way)[:1]
    # The public torch.utils.mkldnn copies input and output, and cannot fuse the activation.
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, way, [], "none")  # type: ignore[no-any-return]


def _sizes(rows: int, *case: Any) -> list[int]:
    """`rows`, so many times `FEW_ROWS`, as a sum of numbers of rows that are summed alike."""
    sizes = []
    for size in MANY_ROWS:
        if size <= rows and _way(size, *case):
            sizes += rows // size * [size]
            rows %= size
    return sizes + rows // FEW_ROWS * [FEW_ROWS]


@cache
def _way(rows: int, activation: str, outputs: int, inputs: int, threads: int) -> str | None:
    """How so many rows are summed like `FEW_ROWS`, if at all. (Tried; unlike speed it is always the same.)"""
    row, weight, bias = _trial(outputs, inputs)
    ways = (activation,) if activation != "none" else ("none", "unsplit")
    few = _linear(row.repeat(FEW_ROWS, 1), weight, bias, ways[-1])
    for way in ways:
        if _linear(row.repeat(rows, 1), weight, bias, way).eq(few[:1]).all():
            return way
    return None


@cache
def _trial(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row, a reordered weight and a bias. The terms of each sum cancel each other: what is left, about 1, is
    what the order makes of them.
    """
    with torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(inputs // 2 * 2, generator=generator)
        row, weight = torch.zeros(1, inputs), torch.zeros(outputs, inputs)
        row[:, order] = 2.0**20 * torch.randn(1, inputs // 2, generator=generator).repeat(1, 2)
        half = torch.randn(outputs, inputs // 2, generator=generator)
        weight[:, order] = torch.cat([half, -half], 1)
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16())
        return row.bfloat16(), reordered, torch.zeros(outputs, dtype=torch.bfloat16)


_SETTING: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
_NO_CHANGE = nullcontext()
_lock = threading.RLock()
_users = 0  # of the setting: threads may encode at the same time
_before = "none"


@contextmanager
def onednn_products() -> Iterator[None]:
    """While active, torch multiplies float32 matrices through oneDNN, if that is exact here.

    torch does so only where it may round them to bfloat16 on the way (fp32_precision "bf16"). oneDNN
    makes use of that on CPUs with AMX; on others with AVX-512 its products are those of float32, at up
    to twice the rate of MKL. Elsewhere nothing changes. The setting is the whole process's: meanwhile
    another thread's products may differ in the last bit, and those in here while another is in
    `products_through`.
    """
    global _users, _before
    with _lock:
        exact = are_exact()
        if exact and _users == 0:
            _before, _SETTING.fp32_precision = _SETTING.fp32_precision, "bf16"
        _users += exact
    try:
        yield
    finally:
        with _lock:
            _users -= exact
            if exact and _users == 0:
                _SETTING.fp32_precision = _before


def products_through(library: Literal["oneDNN", "MKL"], states: Tensor) -> AbstractContextManager[None]:
    """While active, such states' products go through this library: float32 on a CPU, where oneDNN's are exact.

    Whatever other threads want: they wait for each other, so nothing else belongs in there.
    """
    if are_exact() and states.dtype == torch.float32 and states.is_cpu:
        return _through("bf16" if library == "oneDNN" else "ieee")
    return _NO_CHANGE


@contextmanager
def _through(precision: str) -> Iterator[None]:
    with _lock:
        before, _SETTING.fp32_precision = _SETTING.fp32_precision, precision
        try:
            yield
        finally:
            _SETTING.fp32_precision = before


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
