"""Batches without padding: the tokens of all texts one after the other, (tokens, H).

Embeddings, Linears and LayerNorms treat each token alone, so they need not know. Attention and pooling
must know which tokens belong together. Texts of equal length lie side by side, a run: each run is an
ordinary batch (texts, length), and a text's numbers do not depend on how many others are in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minibert import onednn
from minibert.attention import eager_attention
from minibert.config import BertConfig
from minibert.fast_dropout import fast_dropout
from minibert.inputs import check_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
HAS_VARLEN = TORCH >= (2, 11) and torch.version.hip is None
# varlen_attn may split a text by the longest one beside it unless told not to; before 2.13 it never did.
UNSPLIT: dict[str, Any] = {"num_splits": 1} if TORCH >= (2, 13) else {}
ALIGNMENT = 64  # bytes; the last bits of MKL's products depend on where in a cache line a row begins

# Measured, see docs/performance.md:
MKL_MULTIPLICATIONS = 64**3  # of a float32 product: up to here the fused attention, MKL's, is faster
FUSED_BFLOAT16 = 40  # tokens; from here on the fused attention is faster in bfloat16, with AMX
GPU_ROWS = 256  # tokens on a GPU are filled up to a multiple of this
SCORES = 2**20  # of attention, formed at a time: 4 MB


@dataclass(frozen=True)
class Packing:
    """Which tokens belong together: `runs`, (texts, length of each) in order. On `device`.

    After them come `filling` tokens that belong to no text.
    """

    runs: tuple[tuple[int, int], ...]
    device: torch.device
    filling: int = 0

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device, *, fill: bool = False) -> Self:
        """Of texts of these lengths, none of them 0; equal ones must be neighbours.

        With `fill` the tokens are filled up to one of a few numbers. (oneDNN keeps code for every number
        of rows that it has met: 0.5 MB and 1 to 3 ms for each of them and each Linear. cuBLAS sums few rows
        in other parts than many.)
        """
        runs = tuple((len(list(run)), length) for length, run in groupby(lengths))
        tokens = sum(texts * length for texts, length in runs)
        step = GPU_ROWS if device.type == "cuda" else 64 if tokens > 512 else 16 if tokens > 64 else 1
        return cls(runs, device, -tokens % step if fill else 0)

    @cached_property
    def starts(self) -> Tensor:
        """(texts + 1,) int32: where each text begins, and where the last one ends."""
        return F.pad(self.lengths.cumsum(0), (1, 0)).int()

    @cached_property
    def lengths(self) -> Tensor:
        """(texts,): how many tokens each text has."""
        texts, lengths = np.array(self.runs, np.int64).T
        return send(lengths.repeat(texts), self.device)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(length for _, length in self.runs)

    @cached_property
    def sizes(self) -> list[int]:
        """How many tokens each run has, and then how many belong to none."""
        return [*(texts * length for texts, length in self.runs), self.filling]

    def split(self, packed: Tensor) -> list[Tensor]:
        """The runs of a packed tensor: (..., tokens, D) -> (..., texts, length, D) for each."""
        *axes, _, width = packed.shape
        parts = packed.split_with_sizes(self.sizes, -2)
        return [part.view(*axes, *run, width) for part, run in zip(parts, self.runs, strict=False)]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, None]:
        """An `AttentionFunction` in which a text sees only itself: (N, tokens, D) -> (N, tokens, D)."""
        if not self.runs:
            return query, None
        if query.is_cuda and not dropout_p and has_varlen(query.device, query.dtype, query.shape[2]):
            return varlen_attention(query, key, value, mask, dropout_p, self.starts, self.longest)
        if len(self.runs) == 1 and not self.filling:  # one text, say: less to call
            shape = (query.shape[0], *self.runs[0], query.shape[2])  # (N, texts, length, D)
            q, k, v = query.view(shape), key.view(shape), value.view(shape)
            context = attention_of_equal_lengths(q, k, v, dropout_p)
            return context.flatten(1, 2), None
        contexts = []  # (texts * length, N, D) each
        for q, k, v in zip(*map(self.split, (query, key, value)), strict=True):  # (N, texts, length, D)
            context = attention_of_equal_lengths(q, k, v, dropout_p)
            contexts.append(context.flatten(1, 2).transpose(0, 1))
        if self.filling:
            contexts.append(query.new_zeros(self.filling, len(query), query.shape[2]))
        return torch.cat(contexts).transpose(0, 1), None

    def mean(self, hidden: Tensor) -> Tensor:
        """(tokens, H) -> the mean of each text's tokens, (texts, H), float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        if hidden.is_cuda:  # one kernel for all runs; a check of the lengths ("safe") would wait for the GPU
            return torch.segment_reduce(hidden.to(wide), "mean", lengths=self.lengths, unsafe=True)
        return torch.cat([sum_by_halves(run) / run.shape[1] for run in self.split(hidden.to(wide))])

    def first(self, hidden: Tensor) -> Tensor:
        """(tokens, H) -> each text's first token, [CLS], (texts, H), float32 or wider."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        return hidden[self.starts[:-1]].to(wide)


@dataclass(frozen=True)
class PackedBatch:
    """`input_ids` and `position_ids`, (tokens,), and their `packing`."""

    input_ids: Tensor
    position_ids: Tensor
    packing: Packing

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], config: BertConfig, device: torch.device) -> Self:
        """From the ids of each text, at least one each; texts of equal length must be neighbours.

        Raises:
            ValueError: an id outside the vocabulary, or a text longer than the model has positions for.
        """
        packing = Packing.of(map(len, rows), device, fill=True)
        upwards, filling = np.arange(packing.longest), np.zeros(packing.filling, np.int64)
        positions = np.concatenate([*(upwards[: len(row)] for row in rows), filling])  # (tokens,)
        ids = np.fromiter(chain(*rows, filling), np.int64, len(positions))
        check_ids(config, ids, packing.longest)
        return cls(send(ids, device), send(positions, device), packing)


class PaddedBatch:
    """The way from padded (B, T, H) to packed (tokens, H) and back, for a mask (B, T)."""

    def __init__(self, attention_mask: Tensor) -> None:
        mask = attention_mask.bool()
        lengths, order = mask.sum(1).sort(descending=True, stable=True)  # (B,)
        cells = torch.arange(mask.numel(), device=mask.device).view(mask.shape)  # (B, T)
        self.cells = cells[order][mask[order]]  # (tokens,): where each token lies in (B * T)
        self.shape = mask.shape
        self.packing = Packing.of((length for length in lengths.tolist() if length), mask.device)

    def pack(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (tokens, H)."""
        return hidden.flatten(0, 1)[self.cells]

    def unpack(self, packed: Tensor) -> Tensor:
        """(tokens, H) -> (B, T, H), zero where the mask is."""
        empty = packed.new_zeros(self.shape.numel(), packed.shape[1])  # (B * T, H)
        return empty.index_copy(0, self.cells, packed).unflatten(0, self.shape)  # type: ignore[no-untyped-call, no-any-return]


def send(array: "NDArray[np.int64]", device: torch.device) -> Tensor:
    """As a tensor on `device`, without waiting for what a GPU is at work on.

    numpy takes one thread to copy, torch would take all, which are busy tokenizing what a GPU gets next.
    """
    if device.type != "cuda":
        return torch.from_numpy(array).to(device)
    pinned = torch.empty(array.shape, dtype=torch.int64, device="cpu", pin_memory=True)
    pinned.numpy()[:] = array
    return pinned.to(device, non_blocking=True)


def sum_by_halves(states: Tensor) -> Tensor:
    """(n, T, H) -> (n, H), summed over T. (How torch's `sum` adds depends on n and the number of threads.)"""
    sums, length = states.clone(), states.shape[1]
    while length > 1:
        half = length // 2
        sums.narrow(1, 0, half).add_(sums.narrow(1, length - half, half))
        length -= half
    return sums[:, 0]


def attention_of_equal_lengths(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """Of texts of equal length, (N, texts, T, D) -> the same, by what is fastest for that length.

    However many texts there are, so that their number does not change the bits.
    """
    length, head_size = query.shape[-2:]
    if dropout_p and query.is_cpu:  # the fused attention would draw torch's own numbers
        return eager_attention(query, key, value, None, dropout_p, fast_dropout)[0]
    if not onednn.multiplies(query) or (fuses_bfloat16(query) and length >= FUSED_BFLOAT16):
        return aligned_sdpa(query, key, value, dropout_p)
    if torch.is_grad_enabled():
        return eager_attention(query, key, value, None, 0.0)[0]
    if query.dtype == torch.float32 and length * length * head_size <= MKL_MULTIPLICATIONS:
        return aligned_sdpa(query, key, value, dropout_p)
    return onednn_attention(query, key, value)


def onednn_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`eager_attention` of texts of equal length, (N, texts, T, D) -> the same, without gradients.

    In pieces that fit the cache. A head's numbers do not depend on how many there are, nor on which piece
    it is in; what lies in two pieces is computed twice, which costs less than a third piece.
    """
    length, head_size = query.shape[-2:]
    row = length + _softmax_filling(length, query.dtype)
    q, k, v = (states.flatten(0, 1) for states in (query, key, value))  # (N * texts, T, D)
    context = q.new_empty(q.shape)
    heads, starts = even_pieces(len(q), most=SCORES // (length * row))
    rows = q.new_empty(heads, length, row)  # where scores become weights, again and again
    weights = rows[..., :length]  # (heads, T, T)
    with onednn.products_through("oneDNN", q):
        for start in starts:
            some_q, some_k, some_v, some_context = (x.narrow(0, start, heads) for x in (q, k, v, context))
            # With beta=0 what was there is not read.
            weights.baddbmm_(some_q, some_k.mT, beta=0, alpha=head_size**-0.5)
            rows[..., length:] = -torch.inf
            torch.softmax(rows, -1, out=rows)
            torch.bmm(weights, some_v, out=some_context)
    return context.view(query.shape)


def _softmax_filling(length: int, dtype: torch.dtype) -> int:
    """What a row is filled up by, where that pays: the softmax takes 32 numbers at a time, the rest singly."""
    return -length % 32 if dtype == torch.bfloat16 and length % 32 > 8 else 0


def even_pieces(total: int, most: int) -> tuple[int, list[int]]:
    """The size of as few pieces as cover `total`, and where each starts; the last may overlap the one before.

    The size is one of 1 to 8, 10, 12, 14, 16, 20, ..., none above `most` (but 1), since oneDNN keeps half a
    megabyte for every size of product that it has met.
    """
    largest = min(total, max(most, 1))
    largest -= largest % _step(largest)
    size = -(-total // -(-total // largest))
    size += -size % _step(size)
    return size, [*range(0, total - size, size), total - size]


def _step(number: int) -> int:
    """What numbers about as large are rounded to: three binary digits are kept."""
    return 1 << max(number.bit_length() - 3, 0)


def aligned_sdpa(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
    """`sdpa_attention` of texts of equal length, (N, texts, T, D) -> the same.

    MKL, which forms it in float32, finds every row at the same place of a cache line.
    """
    head_size, dtype = query.shape[-1], query.dtype
    wide, filling = dtype, 0
    if query.is_cpu and not fuses_bfloat16(query):
        wide = torch.promote_types(dtype, torch.float32)  # bfloat16 is slower here
        filling = -head_size % (ALIGNMENT // wide.itemsize)  # 0 in every published model
    if wide != dtype:
        query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if filling:
        query, key, value = (F.pad(state, (0, filling)) for state in (query, key, value))
    q, k, v = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)  # (texts, N, T, D)
    with onednn.products_through("MKL", q):
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=head_size**-0.5)
    if filling:
        context = context[..., :head_size]
    if wide != dtype:
        context = context.to(dtype)
    return context.transpose(0, 1)


def fuses_bfloat16(states: Tensor) -> bool:
    """Whether PyTorch's fused attention is fast in bfloat16 itself: on CPUs with AMX.

    (With more threads the number of texts would change its bits.)
    """
    return onednn.HAS_AMX and states.dtype == torch.bfloat16 and states.is_cpu and onednn.few_threads()


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether there is one kernel for texts of all lengths: on CUDA from Ampere on, in bfloat16 and float16."""
    if not HAS_VARLEN or device.type != "cuda" or dtype.itemsize != 2 or head_size % 8 or head_size > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    starts: Tensor,
    longest: int,
) -> tuple[Tensor, None]:
    """`Packing.attend` as one kernel for all runs, where `has_varlen`; without dropout.

    What comes out for the filling is what happened to lie in memory.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states.transpose(0, 1) for states in (query, key, value))  # (tokens, N, D)
    scale = query.shape[-1] ** -0.5
    context = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, **UNSPLIT)
    assert isinstance(context, Tensor)
    return context.transpose(0, 1), None
