"""A layer's parts made fast for inference: fewer products, and nothing around them that only training needs.

Not Modules: what those do before each call takes nearly a tenth of MiniLM's time for a short sentence.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import onednn
from minibert.attention import SelfAttention
from minibert.embeddings import Embeddings
from minibert.fast_dropout import FastDropout
from minibert.layers import ACTIVATIONS, EncoderLayer, FeedForward, Pooler
from minibert.model import BertModel

M = TypeVar("M", bound=nn.Module)
FUSED_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "silu": "swish"}  # in oneDNN's product, by its names

KINDS = (
    *(BertModel, Embeddings, EncoderLayer, SelfAttention, FeedForward, Pooler, FastDropout),
    *(nn.ModuleList, nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout),
)


class FusedLinear:
    """Linears of one input as one product, and the activation after it.

    (tokens, in) -> (tokens, sum of their outs), in `dtype` or the weights' own; of some `inputs` and `outputs`
    alone, if given.
    """

    def __init__(
        self,
        *linears: nn.Linear,
        activation: str | None = None,
        dtype: torch.dtype | None = None,
        inputs: slice = slice(None),
        outputs: slice = slice(None),
    ) -> None:
        weights = [linear.weight[outputs, inputs].detach().to(dtype) for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (out, in)
        self.dtype = weight.dtype
        self.activation = activation
        self.fused = FUSED_ACTIVATIONS[activation] if activation else "none"
        self.packed = onednn.packs_weights(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        bias = torch.cat([linear.bias[outputs].detach() for linear in linears]).to(dtype)  # (out,)
        if inputs.start:
            bias = torch.zeros_like(bias)  # it belongs to the first inputs
        # Parameters, since torch.compile takes the sizes of those alone as fixed.
        self.weight, self.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not self.packed:
            product = F.linear(x, self.weight, self.bias)
            return ACTIVATIONS[self.activation](product) if self.activation else product
        return onednn.linear(x, self.weight, self.bias, self.fused)


class FusedAttention:
    """`SelfAttention` whose query, key and value are one product."""

    __call__ = SelfAttention.forward
    training = False

    def __init__(self, attention: SelfAttention, dtype: torch.dtype | None) -> None:
        self.head_size = attention.head_size
        self.query_key_value = FusedLinear(attention.query, attention.key, attention.value, dtype=dtype)
        self.output = FusedLinear(attention.output, dtype=dtype)
        self.dropout = _lighter(attention.dropout)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, H) -> query, key and value, (N, tokens, D) each."""
        tokens, width = hidden.shape
        states = self.query_key_value(hidden)  # (tokens, 3 * H)
        states = states.view(tokens, 3, width // self.head_size, self.head_size)  # (tokens, 3, N, D)
        query, key, value = states.permute(1, 2, 0, 3).unbind()
        return query, key, value


class FusedFeedForward:
    """`FeedForward` with its activation in the first product, where oneDNN has it; or a `part` of it.

    A part has some of the inner numbers.
    """

    __call__ = FeedForward.forward

    def __init__(
        self, feed_forward: FeedForward, hidden_act: str, dtype: torch.dtype | None, part: slice = slice(None)
    ) -> None:
        as_published = feed_forward.activation is ACTIVATIONS[hidden_act]
        fused = hidden_act if hidden_act in FUSED_ACTIVATIONS and as_published else None
        self.up = FusedLinear(feed_forward.up, activation=fused, dtype=dtype, outputs=part)
        self.activation = _unchanged if fused else feed_forward.activation
        self.down = FusedLinear(feed_forward.down, dtype=dtype, inputs=part)
        self.dropout = _lighter(feed_forward.dropout)


class FeedForwardInParts:
    """A feed-forward as the sum of its parts, each of `size` inner numbers. Without dropout."""

    def __init__(
        self, feed_forward: FeedForward, hidden_act: str, dtype: torch.dtype | None, size: int
    ) -> None:
        starts = range(0, feed_forward.up.out_features, size)
        parts = [slice(start, start + size) for start in starts]
        self.dtype = dtype or feed_forward.up.weight.dtype
        self.parts: list[Callable[[Tensor], Tensor]] = [
            FusedFeedForward(feed_forward, hidden_act, dtype, part) for part in parts
        ]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(tokens, H) -> (tokens, H)."""
        narrow = hidden.to(self.dtype)  # once for all parts
        total = self.parts[0](narrow).float()
        for part in self.parts[1:]:
            total += part(narrow)
        return total.to(hidden.dtype)


def fuse(layer: EncoderLayer, hidden_act: str, dtype: torch.dtype | None) -> None:
    """Puts these parts in the places of a layer's own, but where there is an adapter, say, or a hook."""
    attention, feed_forward = layer.attention, layer.feed_forward
    if _is_plain(attention, SelfAttention) and _are_linear(
        attention.query, attention.key, attention.value, attention.output
    ):
        replace(layer, "attention", FusedAttention(attention, dtype))
    if _is_plain(feed_forward, FeedForward) and _are_linear(feed_forward.up, feed_forward.down):
        down = feed_forward.down
        size = onednn.block(down.weight, dtype or down.weight.dtype)
        as_published = feed_forward.activation is ACTIVATIONS[hidden_act]  # so each number by itself
        if size < down.in_features and as_published and _lighter(feed_forward.dropout) is _unchanged:
            replace(layer, "feed_forward", FeedForwardInParts(feed_forward, hidden_act, dtype, size))
        else:
            replace(layer, "feed_forward", FusedFeedForward(feed_forward, hidden_act, dtype))
    lighten(layer, "attention_norm", "feed_forward_norm")


def lighten(module: nn.Module, *names: str) -> None:
    """Has `module` call functions in place of Modules with these names, if it has them."""
    for name in names:
        if (part := getattr(module, name)) is not None:
            replace(module, name, _lighter(part))


def _lighter(part: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a plain Module calls, which is nothing for a Dropout; otherwise the Module."""
    if _is_plain(part, nn.LayerNorm):
        return partial(
            torch.layer_norm,
            normalized_shape=part.normalized_shape,
            weight=part.weight,
            bias=part.bias,
            eps=part.eps,
        )
    if _is_plain(part, nn.Embedding) and part.max_norm is None:
        return partial(torch.embedding, part.weight)
    return _unchanged if _is_plain(part, nn.Dropout) or _is_plain(part, FastDropout) else part


def _unchanged(x: Tensor) -> Tensor:
    return x


def replace(module: nn.Module, name: str, by: object) -> None:
    """Puts what is no Module in the place of one, for which setattr alone is refused."""
    delattr(module, name)
    setattr(module, name, by)


def _are_linear(*modules: nn.Module) -> bool:
    """False for what somebody put in a Linear's place, such as an adapter: it is called, not fused."""
    return all(_is_plain(module, nn.Linear) and module.bias is not None for module in modules)


def is_plain(module: nn.Module) -> bool:
    """Whether it is one of those that a model is made of, and nobody has changed what it does."""
    return type(module) in KINDS and _is_plain(module, type(module))


def _is_plain(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    return type(module) is kind and not has_hook(module) and "forward" not in module.__dict__


def has_hook(module: nn.Module) -> bool:
    """Whether somebody wants to know when it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
