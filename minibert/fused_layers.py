"""The encoder's parts made fast for inference: fewer products, and nothing around them that training needs.

Not Modules: what those do before each call takes nearly a tenth of MiniLM's time for a short sentence.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import amx, onednn
from minibert.attention import ATTENTION_FUNCTIONS, SelfAttention, eager_attention, sdpa_attention
from minibert.embeddings import Embeddings
from minibert.fast_dropout import FastDropout
from minibert.layers import ACTIVATIONS, EncoderLayer, FeedForward
from minibert.meta_device import without_numbers
from minibert.model import BertModel

FUSED_ACTIVATIONS = {"gelu": "gelu", "silu": "swish"}  # in oneDNN's product, by its names (its relu hides NaN)


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
            self.multiply = amx.linear if amx.HAS_AMX and self.dtype == torch.bfloat16 else onednn.linear
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
        return self.multiply(x, self.weight, self.bias, self.fused)


class FusedAttention:
    """`SelfAttention` whose query, key and value are one product."""

    __call__ = SelfAttention.forward
    training = False

    def __init__(self, attention: SelfAttention, dtype: torch.dtype | None) -> None:
        self.head_size = attention.head_size
        self.query_key_value = FusedLinear(attention.query, attention.key, attention.value, dtype=dtype)
        self.output = FusedLinear(attention.output, dtype=dtype)
        self.dropout = _unchanged

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, H) -> query, key and value, (N, tokens, D) each."""
        states = self.query_key_value(hidden)  # (tokens, 3 * H)
        states = states.view(hidden.shape[0], 3, -1, self.head_size)  # (tokens, 3, N, D)
        query, key, value = states.permute(1, 2, 0, 3).unbind()
        return query, key, value


class FusedFeedForward:
    """`FeedForward` with its activation in the first product, where oneDNN has it.

    `part` says which inner numbers, those between `up` and `down`, it computes with; all if not given.
    """

    __call__ = FeedForward.forward

    def __init__(
        self, feed_forward: FeedForward, hidden_act: str, dtype: torch.dtype | None, part: slice = slice(None)
    ) -> None:
        fused = hidden_act if hidden_act in FUSED_ACTIVATIONS else None
        self.up = FusedLinear(feed_forward.up, activation=fused, dtype=dtype, outputs=part)
        self.activation = _unchanged if fused else feed_forward.activation
        self.down = FusedLinear(feed_forward.down, dtype=dtype, inputs=part)
        self.dropout = _unchanged


class FeedForwardInParts:
    """A feed-forward as the sum of its parts, each of `size` inner numbers."""

    def __init__(
        self, feed_forward: FeedForward, hidden_act: str, dtype: torch.dtype | None, size: int
    ) -> None:
        self.dtype = dtype or feed_forward.up.weight.dtype
        self.parts: list[Callable[[Tensor], Tensor]] = [
            FusedFeedForward(feed_forward, hidden_act, dtype, slice(start, start + size))
            for start in range(0, len(feed_forward.up.weight), size)
        ]

    def __call__(self, hidden: Tensor) -> Tensor:
        """(tokens, H) -> (tokens, H)."""
        narrow = hidden.to(self.dtype)  # once for all parts
        total = self.parts[0](narrow).float()
        for part in self.parts[1:]:
            total += part(narrow)
        return total.to(hidden.dtype)


class FusedLayer:
    """`EncoderLayer` whose parts are fused."""

    __call__ = EncoderLayer.forward

    def __init__(self, layer: EncoderLayer, hidden_act: str, dtype: torch.dtype | None) -> None:
        self.attention = FusedAttention(layer.attention, dtype)
        self.attention_norm = _layer_norm(layer.attention_norm)
        down = layer.feed_forward.down.weight  # (H, inner)
        size = amx.longest_sum(down, dtype or down.dtype)
        self.feed_forward: Callable[[Tensor], Tensor] = (
            FeedForwardInParts(layer.feed_forward, hidden_act, dtype, size)
            if size < down.shape[1]
            else FusedFeedForward(layer.feed_forward, hidden_act, dtype)
        )
        self.feed_forward_norm = _layer_norm(layer.feed_forward_norm)


class FusedEmbeddings:
    """`Embeddings` whose tables and norm are called without a Module's preparations."""

    __call__ = Embeddings.forward

    def __init__(self, embeddings: Embeddings) -> None:
        self.word, self.position = _table(embeddings.word), _table(embeddings.position)
        self.token_type = None if embeddings.token_type is None else _table(embeddings.token_type)
        self.norm = _layer_norm(embeddings.norm)
        self.dropout = _unchanged


def _layer_norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias = norm.normalized_shape, norm.weight, norm.bias
    return partial(torch.layer_norm, normalized_shape=shape, weight=weight, bias=bias, eps=norm.eps)


def _table(embedding: nn.Embedding) -> Callable[[Tensor], Tensor]:
    return partial(torch.embedding, embedding.weight)


def _unchanged(x: Tensor) -> Tensor:
    return x


def is_untouched(model: BertModel) -> bool:
    """Whether `encode` may compute it in its own way.

    Each part is of the class that `BertModel` puts there, with its parameters and functions, and without a
    hook. Sizes and values may differ, but query, key and value are of one size.
    """
    ours = {"sdpa": sdpa_attention, "eager": eager_attention, "packed": None}  # which no function does
    if model.attention not in ours or ATTENTION_FUNCTIONS.get(model.attention) is not ours[model.attention]:
        return False
    with without_numbers():
        originals = dict(BertModel(replace(model.config, num_hidden_layers=1)).named_modules())
    for name, part in model.named_modules():
        original = originals.get(re.sub(r"^layers\.\d+", "layers.0", name))
        if original is None or has_hook(part) or _recipe(part) != _recipe(original):
            return False
    attentions = [part for part in model.modules() if isinstance(part, SelfAttention)]
    return all(a.query.weight.shape == a.key.weight.shape == a.value.weight.shape for a in attentions)


def _recipe(part: nn.Module) -> tuple[object, ...]:
    """What decides what a part computes, but for sizes and values."""
    kind = nn.Dropout if type(part) is FastDropout else type(part)
    parameters = {name: type(parameter) for name, parameter in part._parameters.items()}
    functions = {name: f for name, f in vars(part).items() if callable(f) and not name.startswith("_")}
    return kind, parameters, functions, getattr(part, "max_norm", None)


def has_hook(module: nn.Module) -> bool:
    """Whether somebody wants to know when it is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
