"""Attention made fast: for texts of one length by what is fastest there, or by one kernel for all lengths.

However many texts there are beside it, a text's numbers have the same bits.
"""

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minibert import onednn
from minibert.amx import HAS_AMX
from minibert.attention import AttentionFunction, eager_attention, sdpa_attention
from minibert.fast_dropout import fast_dropout

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
HAS_VARLEN = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
# varlen_attn may split a text by the longest one beside it unless told not to; before 2.13 it never did.
UNSPLIT: dict[str, Any] = {"num_splits": 1} if TORCH >= (2, 13) else {}
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
ALIGNMENT = 64  # bytes; the last bits of MKL's products depend on where in a cache line a row begins
FEW_THREADS = 16  # up to which they do not change PyTorch's fused bfloat16 attention

# Measured, see docs/performance.md:
MKL_MULTIPLICATIONS = 64**3  # of a float32 product: up to here the fused attention, MKL's, is faster
SCORES = 2**20  # formed at a time: 4 MB
VECTOR = 16  # scores that the fused attention's softmax takes at a time with AVX-512, and the rest one by one
MOST_SINGLY = 2  # so few left over take no longer than rounding up to whole vectors
# From so many tokens on rounding up pays. (Behind a text that is alone zeros must be copied, which takes time.)
WHOLE_FROM, WHOLE_FROM_BFLOAT16 = 65, 12


def choose_attention(states: Tensor, length: int, dropout_p: float) -> AttentionFunction:
    """For texts of `length` tokens each, without a mask, on states like these, (N, tokens, D)."""
    head_size = states.shape[-1]
    if dropout_p and states.is_cpu:  # the fused attention would draw torch's own numbers
        return partial(eager_attention, dropout=fast_dropout)
    if not onednn.multiplies(states, length):
        return choose_fused_attention(states, length)
    if torch.is_grad_enabled():
        return eager_attention
    small = states.dtype == torch.float32 and length * length * head_size <= MKL_MULTIPLICATIONS
    return choose_fused_attention(states, length) if small or fuses_bfloat16(states) else onednn_attention


def onednn_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, None]:
    """`eager_attention` without mask, dropout and gradients, (B, N, T, D) -> the same.

    In pieces that fit the cache. A head's numbers do not depend on how many there are, nor on which piece
    it is in; what lies in two pieces is computed twice, which costs less than a third piece.
    """
    batch, heads_of_each, length, head_size = query.shape
    # The softmax takes 32 numbers of bfloat16 at a time, the rest singly: a row is filled up where that pays.
    row = length + (-length % 32 if query.dtype == torch.bfloat16 and length % 32 > 8 else 0)
    q, k, v = (states.transpose(0, 1).flatten(0, 1) for states in (query, key, value))  # (N * B, T, D)
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
    return context.view(heads_of_each, batch, length, head_size).transpose(0, 1), None


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


def choose_fused_attention(states: Tensor, length: int) -> AttentionFunction:
    """`sdpa_attention`, with what it needs around it for so many tokens and states like these."""
    if not states.is_cpu:
        return sdpa_attention
    attend: AttentionFunction = sdpa_attention
    dtype = states.dtype
    if not fuses_bfloat16(states):
        dtype = torch.promote_types(dtype, torch.float32)  # bfloat16 is slower here
        padding = -states.shape[-1] % (ALIGNMENT // dtype.itemsize)  # 0 in every published model
        if dtype != states.dtype or padding or onednn.are_exact():
            attend = partial(mkl_attention, dtype=dtype, padding=padding)
    whole_from = WHOLE_FROM_BFLOAT16 if dtype == torch.bfloat16 else WHOLE_FROM
    if HAS_AVX512 and length >= whole_from and length % VECTOR > MOST_SINGLY and not torch.is_grad_enabled():
        attend = partial(whole_vectors_attention, attend=attend, keys_mask=_keys_mask(length, dtype))
    return partial(one_head_attention, attend=attend) if states.shape[-3] == 1 else attend


def one_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    attend: AttentionFunction,
) -> tuple[Tensor, Tensor | None]:
    """`attend` for models with one head. A text that is alone is computed twice.

    PyTorch shares heads out among its threads. It starts none for a single one, whose products MKL then
    shares out, and sums in another order.
    """
    if len(query) > 1:
        return attend(query, key, value, mask, dropout_p)
    query, key, value = (states.expand(2, -1, -1, -1) for states in (query, key, value))
    context, weights = attend(query, key, value, mask, dropout_p)
    return context[:1], weights


def whole_vectors_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    attend: AttentionFunction,
    keys_mask: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """`attend`, without another mask, on keys and values that go on beyond a text's end.

    `keys_mask` (1, 1, 1, keys) leaves what lies there no weight, if it is finite.
    """
    keys = keys_mask.shape[-1]
    return attend(query, _continued(key, keys), _continued(value, keys), keys_mask, dropout_p)


def _continued(states: Tensor, length: int) -> Tensor:
    """(B, N, T, D) -> (B, N, length, D): with the next text, or what else follows in memory, or zeros."""
    sizes = (*states.shape[:2], length, states.shape[3])
    steps = states.stride()
    end = states.storage_offset() + 1 + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if end * states.itemsize > states.untyped_storage().nbytes():
        return F.pad(states, (0, 0, 0, length - states.shape[2]))
    return states.as_strided(sizes, steps)


@lru_cache(maxsize=1024)
def _keys_mask(length: int, dtype: torch.dtype) -> Tensor:
    """(1, 1, 1, keys): 0 for a text's own, -inf for those that follow until there are whole vectors of them."""
    keys = torch.arange(length + -length % VECTOR, device="cpu").view(1, 1, 1, -1)
    return torch.zeros(keys.shape, dtype=dtype, device="cpu").masked_fill(keys >= length, -torch.inf)


def mkl_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    *,
    dtype: torch.dtype,
    padding: int,
) -> tuple[Tensor, None]:
    """`sdpa_attention` in `dtype`, of heads with `padding`, whose products are MKL's."""
    head_size, narrow = query.shape[-1], query.dtype
    if narrow != dtype:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if padding:
        query, key, value = (F.pad(states, (0, padding)) for states in (query, key, value))
    with onednn.products_through("MKL", query):
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=head_size**-0.5
        )
    if padding:
        context = context[..., :head_size]
    return context if narrow == dtype else context.to(narrow), None


def fuses_bfloat16(states: Tensor) -> bool:
    """Whether PyTorch's fused attention is fast in bfloat16 itself: on CPUs with AMX.

    (With more than `FEW_THREADS` threads the number of texts would change its bits.)
    """
    few_threads = torch.get_num_threads() <= FEW_THREADS
    return HAS_AMX and states.dtype == torch.bfloat16 and states.is_cpu and few_threads


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
