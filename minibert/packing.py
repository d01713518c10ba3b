"""Batches without padding: the tokens of all texts one after the other, (tokens, H).

Linears and LayerNorms treat each token alone, so they need not know, nor do embeddings that are given each
token's position. Attention and pooling must know which tokens belong together. Texts of equal length lie
side by side, a run: each run is an ordinary batch (texts, length), and a text's numbers do not depend on how
many others are in it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby, repeat
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minibert.attention import AttentionFunction, sdpa_attention
from minibert.config import BertConfig
from minibert.fast_attention import choose_attention, has_varlen, varlen_attention
from minibert.inputs import check_ids

GPU_ROWS = 256  # tokens on a GPU are filled up to a multiple of this; measured, see docs/performance.md


@dataclass(frozen=True)
class Packing:
    """Which tokens belong together: `runs`, (texts, length of each) in order. On `device`.

    After them come `filling` tokens that belong to no text.
    """

    runs: tuple[tuple[int, int], ...]
    device: torch.device
    filling: int = 0
    _chosen: dict[object, list[AttentionFunction]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def of(cls, lengths: Iterable[int], device: torch.device, *, fill: bool = False) -> Self:
        """Of texts of these lengths, none of them 0; of equal ones only neighbours share a run.

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
        if _has_one_kernel(query, dropout_p):
            return varlen_attention(query, key, value, mask, dropout_p, self.starts, self.longest)
        functions = self._attention_functions(query, dropout_p)
        if len(self.runs) == self.runs[0][0] == 1 and not self.filling:  # one text: less to call
            context, _ = functions[0](query[None], key[None], value[None], None, dropout_p)
            return context[0], None
        contexts = []  # (texts * length, N, D) each
        for function, *states in zip(functions, *map(self.split, (query, key, value)), strict=True):
            q, k, v = (each.transpose(0, 1) for each in states)  # (texts, N, length, D)
            context, _ = function(q, k, v, None, dropout_p)
            contexts.append(context.transpose(1, 2).flatten(0, 1))
        if self.filling:
            contexts.append(query.new_zeros(self.filling, len(query), query.shape[2]))
        joined = torch.cat(contexts) if len(contexts) > 1 else contexts[0]
        return joined.transpose(0, 1), None

    def _attention_functions(self, states: Tensor, dropout_p: float) -> list[AttentionFunction]:
        """One for each run, chosen for the first layer that asks."""
        case = (states.dtype, dropout_p, torch.is_grad_enabled())
        if case not in self._chosen:
            self._chosen[case] = [choose_attention(states, length, dropout_p) for _, length in self.runs]
        return self._chosen[case]

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
        """From the ids of each text, at least one each; of texts of equal length only neighbours share a run.

        Raises:
            ValueError: an id outside the vocabulary, or a text longer than the model has positions for.
        """
        packing = Packing.of(map(len, rows), device, fill=True)
        upwards, first = np.arange(packing.longest), np.zeros(packing.filling, np.int64)
        positions = np.concatenate([*(upwards[: len(row)] for row in rows), first])  # (tokens,)
        filling = repeat(rows[-1][0], packing.filling)  # no weight, but a token that no text has might be nan
        ids = np.fromiter(chain(*rows, filling), np.int64, len(positions))
        check_ids(config, ids, packing.longest)
        return cls(send(ids, device), send(positions, device), packing)


class PaddedBatch:
    """The way from padded (B, T, H) to packed (tokens, H), longest text first, and back, for a mask (B, T)."""

    def __init__(self, attention_mask: Tensor) -> None:
        mask = attention_mask.bool()
        lengths, order = mask.sum(1).sort(descending=True, stable=True)  # (B,)
        cells = torch.arange(mask.numel(), device=mask.device).view(mask.shape)  # (B, T)
        self.cells = cells[order][mask[order]]  # (tokens,): where each token lies in (B * T)
        self.mask = mask
        self.packing = Packing.of((length for length in lengths.tolist() if length), mask.device)

    def pack(self, hidden: Tensor) -> Tensor:
        """(B, T, ...) -> (tokens, ...)."""
        return hidden.flatten(0, 1).index_select(0, self.cells)

    def unpack(self, packed: Tensor) -> Tensor:
        """(tokens, numbers) -> (B, T, numbers), zero where the mask is 0."""
        empty = packed.new_zeros(self.mask.numel(), packed.shape[1])  # (B * T, numbers)
        return empty.index_copy_(0, self.cells, packed).view(*self.mask.shape, packed.shape[1])

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
    ) -> tuple[Tensor, Tensor | None]:
        """As `Packing.attend`; padded in training on a GPU, where calls for each length start many kernels."""
        by_length = len(self.packing.runs) > 1 and not _has_one_kernel(query, dropout_p)
        if by_length and query.is_cuda and torch.is_grad_enabled():
            return self.attend_padded(query, key, value, dropout_p), None
        return self.packing.attend(query, key, value, mask, dropout_p)

    def attend_padded(self, query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> Tensor:
        """(N, tokens, D) -> (N, tokens, D), all texts in one call. Last bits may depend on the padding."""
        packed = torch.stack([states.transpose(0, 1) for states in (query, key, value)], 1)  # (tokens, 3, N, D)
        padded = self.unpack(packed.flatten(1)).view(*self.mask.shape, *packed.shape[1:])  # (B, T, 3, N, D)
        q, k, v = padded.permute(2, 0, 3, 1, 4)  # (B, N, T, D)
        context, _ = sdpa_attention(q, k, v, self.mask[:, None, None], dropout_p)
        return self.pack(context.transpose(1, 2)).transpose(0, 1)


def _has_one_kernel(states: Tensor, dropout_p: float) -> bool:
    """Whether there is one for all lengths, for states (N, tokens, D)."""
    return states.is_cuda and not dropout_p and has_varlen(states.device, states.dtype, states.shape[2])


def send(array: NDArray[np.int64], device: torch.device) -> Tensor:
    """As a tensor on `device`; does not wait until a GPU has finished what it was given before.

    The copy is numpy's, by one thread: torch's would take all, which are tokenizing the next block.
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
