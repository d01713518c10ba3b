"""bfloat16 products that sum every row alike, on CPUs with AMX (Intel's matrix registers).

There oneDNN may sum a long row in parts, and in which parts depends on the number of rows and of threads, so
that a text's last bits would depend on its batch. `FEW_ROWS` rows are always summed whole, and all others must
come out like them. For a number of rows there may be two ways to that, and `_way` tries which of them works:

    the plain product     the faster one; always so with an activation behind it
    "unsplit"             a sum on its way to tanh is not split (up to SHORT_SUM numbers), and tanh(x) is x
                          where x is tiny: so inputs are scaled by TINY, sent through tanh, and scaled back

Where neither works for all rows at once, they are multiplied in pieces of `MANY_ROWS` for which one does.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert import onednn

HAS_AMX = bool(torch.cpu._is_amx_tile_supported())
FEW_ROWS = 32
MANY_ROWS = (4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 192, 128, 96, 64)
SHORT_SUM = 1024
TINY = 2.0**-32  # tanh(x) == x up to 4.2e-4, which is 1.8 million times this


def longest_sum(weight: Tensor, dtype: torch.dtype) -> int:
    """How many of its inputs a Linear (out, in) is best summed over at a time in `dtype`."""
    inputs = weight.shape[1]
    short = HAS_AMX and weight.is_cpu and dtype == torch.bfloat16 and inputs % SHORT_SUM == 0
    return SHORT_SUM if short else inputs


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """As `onednn.linear`."""
    case = (activation, *weight.shape, torch.get_num_threads())
    rows = x.shape[0]  # len() of a tensor is written in Python
    if way := _way(rows, *case):
        return _multiply(x, weight, bias, way)
    x = F.pad(x, (0, 0, 0, -rows % FEW_ROWS))
    pieces = x.split_with_sizes(_sizes(x.shape[0], *case))
    products = [_multiply(piece, weight, bias, _way(piece.shape[0], *case) or activation) for piece in pieces]
    return (torch.cat(products) if len(products) > 1 else products[0])[:rows]


def _multiply(x: Tensor, weight: Tensor, bias: Tensor, way: str) -> Tensor:
    """By an activation, or "unsplit"."""
    if way == "unsplit":
        return onednn.linear(x * TINY, weight, bias * TINY, "tanh").mul_(1 / TINY)
    return onednn.linear(x, weight, bias, way)


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
    """How so many rows are summed like `FEW_ROWS`, if at all: by a trial, whose outcome never varies.

    (With another number of `threads` it is another trial, so the cache must know it.)
    """
    row, weight, bias = _trial(outputs, inputs)
    ways = (activation,) if activation != "none" else ("none", "unsplit")
    few = _multiply(row.repeat(FEW_ROWS, 1), weight, bias, ways[-1])
    for way in ways:
        if _multiply(row.repeat(rows, 1), weight, bias, way).eq(few[:1]).all():
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
