"""The encoder made fast for inference: the same embeddings and layers, other Linears, no padding.

`run_texts` runs a model's fast copy on texts, `run` on one packed batch. The copy shares the model's embeddings
and the weights of its LayerNorms; its Linears hold theirs in the layout that oneDNN multiplies fastest, query,
key and value as one product and GELU inside the up-projection. docs/performance.md has the measurements.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert import onednn
from minibert.attention import AttentionFunction, SelfAttention
from minibert.config import BertConfig
from minibert.fast_attention import varlen_attention
from minibert.fast_dropout import FastDropout
from minibert.layers import ACTIVATIONS, EncoderLayer, FeedForward
from minibert.memory import keep_freed_memory
from minibert.model import BertModel
from minibert.packing import PackedBatch, Packing
from weights.safetensors_files import release_memory

# Per batch, at most: tokens, and numbers (tokens * H), which on a CPU fit its caches. See docs/performance.md.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
NUMBERS = {"cpu": 2048 * 768, "cuda": 32768 * 768}
FUSED_ACTIVATIONS = ("gelu", "relu")  # those that oneDNN computes in the product, under its own names


class FusedLinear:
    """Linears of one input as one product, and the activation after it; for inference only.

    (tokens, in) -> (tokens, sum of their outs), in `dtype` or the weights' own. Not a Module: what that does
    before each call takes nearly a tenth of MiniLM's time for a short sentence.
    """

    def __init__(
        self, *linears: nn.Linear, activation: str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        weights = [linear.weight.detach().to(dtype) for linear in linears]
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # (out, in)
        self.dtype = weight.dtype
        self.activation = activation
        self.packed = onednn.packs_weights(weight)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        bias = torch.cat([linear.bias.detach() for linear in linears]).to(dtype)  # (out,)
        # Parameters, since torch.compile takes the sizes of those alone as fixed.
        self.weight, self.bias = (nn.Parameter(each, requires_grad=False) for each in (weight, bias))

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if not self.packed:
            product = F.linear(x, self.weight, self.bias)
            return ACTIVATIONS[self.activation](product) if self.activation else product
        return onednn.linear(x, self.weight, self.bias, self.activation or "none")


class FusedAttention:
    """Self-attention whose query, key and value are one product; for inference, and no Module, either."""

    __call__ = SelfAttention.forward
    training = False

    def __init__(self, attention: SelfAttention, dtype: torch.dtype | None) -> None:
        self.head_size = attention.head_size
        self.query_key_value = FusedLinear(attention.query, attention.key, attention.value, dtype=dtype)
        self.output = FusedLinear(attention.output, dtype=dtype)
        self.dropout = _unchanged

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, H) -> query, key and value, (N, tokens, D) each."""
        tokens, width = hidden.shape
        states = self.query_key_value(hidden)  # (tokens, 3 * H)
        states = states.view(tokens, 3, width // self.head_size, self.head_size)  # (tokens, 3, N, D)
        query, key, value = states.permute(1, 2, 0, 3).unbind()
        return query, key, value


class FusedFeedForward:
    """The feed-forward part of a layer, its activation in the first product where oneDNN has it."""

    __call__ = FeedForward.forward

    def __init__(self, feed_forward: FeedForward, hidden_act: str, dtype: torch.dtype | None) -> None:
        as_published = feed_forward.activation is ACTIVATIONS[hidden_act]
        fused = hidden_act if hidden_act in FUSED_ACTIVATIONS and as_published else None
        self.up = FusedLinear(feed_forward.up, activation=fused, dtype=dtype)
        self.activation = _unchanged if fused else feed_forward.activation
        self.down = FusedLinear(feed_forward.down, dtype=dtype)
        self.dropout = _unchanged


def fast_copy(model: BertModel, dtype: torch.dtype | None = None) -> BertModel:
    """The model as `run` wants it. It shares all weights but the Linears', and is made anew when they change.

    (Only what is written into a parameter's `.data` goes unnoticed: torch keeps no record of that.)
    Hooks on a layer are called; hooks on its Linears, LayerNorms and Dropouts are not.
    `dtype` is what the Linears compute in (the weights' own if None); all else stays as in the model.
    """
    state = _identities(model), dtype
    with _LOCK:
        if model not in _COPIES or _COPIES[model][0] != state:
            _COPIES.pop(model, None)  # before its successor takes as much memory
            _COPIES[model] = (state, new_fast_copy(model, dtype))
        return _COPIES[model][1]


def _identities(model: BertModel) -> list[int]:
    """What changes with the parameters' values. (`parameters()` takes 3% of encoding a short sentence.)"""
    state: list[int] = []
    modules: list[nn.Module | None] = [model]
    for module in modules:  # which grows as it is walked
        if module is None:  # `model.pooler = None`
            continue
        for parameter in module._parameters.values():
            if parameter is not None:  # an inference tensor has no version, and cannot change
                version = 0 if parameter.is_inference() else parameter._version
                state += (id(parameter), version, parameter.data_ptr())
        modules += module._modules.values()
    return state


_LOCK = threading.Lock()  # threads may encode at the same time
_COPIES: WeakKeyDictionary[BertModel, tuple[object, BertModel]] = WeakKeyDictionary()


def new_fast_copy(model: BertModel, dtype: torch.dtype | None = None, layers: int | None = None) -> BertModel:
    """A `fast_copy` that nobody else keeps; of the lowest `layers` only, if given."""
    keep_freed_memory()
    fast = copy.deepcopy(model, memo={id(weight): weight for weight in model.parameters()})
    fast.layers = fast.layers[:layers]
    _replace_by_functions(fast.embeddings, "position", "token_type", "norm", "dropout")
    for layer in fast.layers:
        used = list(layer.parameters())
        _fuse_layer(cast(EncoderLayer, layer), model.config.hidden_act, dtype)
        release_memory(used)
    return fast.eval()


def _fuse_layer(layer: EncoderLayer, hidden_act: str, dtype: torch.dtype | None) -> None:
    attention, feed_forward = layer.attention, layer.feed_forward
    if type(attention) is SelfAttention and _are_plain(
        attention.query, attention.key, attention.value, attention.output
    ):
        _replace(layer, "attention", FusedAttention(attention, dtype))
    if type(feed_forward) is FeedForward and _are_plain(feed_forward.up, feed_forward.down):
        _replace(layer, "feed_forward", FusedFeedForward(feed_forward, hidden_act, dtype))
    _replace_by_functions(layer, "attention_norm", "feed_forward_norm")


def _replace_by_functions(module: nn.Module, *names: str) -> None:
    """Modules by what they call, Dropouts by nothing. (Calling a Module takes as long as some compute.)"""
    for name in names:
        part = getattr(module, name, None)
        if type(part) is nn.LayerNorm:
            _replace(module, name, _layer_norm(part))
        elif type(part) is nn.Embedding and part.max_norm is None:
            _replace(module, name, partial(torch.embedding, part.weight))
        elif type(part) in (nn.Dropout, FastDropout):
            _replace(module, name, _unchanged)


def _layer_norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    return partial(
        torch.layer_norm,
        normalized_shape=norm.normalized_shape,
        weight=norm.weight,
        bias=norm.bias,
        eps=norm.eps,
    )


def _replace(module: nn.Module, name: str, function: Callable[..., object]) -> None:
    """Has `module` call a function where it called a Module of its own, for which setattr alone is refused."""
    delattr(module, name)
    setattr(module, name, function)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _are_plain(*modules: nn.Module) -> bool:
    """False for what somebody put in a Linear's place, such as an adapter: it is called, not fused."""
    return all(type(module) is nn.Linear and module.bias is not None for module in modules)


def run_texts(
    fast: BertModel,
    ids: Sequence[Sequence[int]],
    batch_size: int | None = None,
    *,
    compiled: bool = False,
) -> Iterator[tuple[list[int], Packing, Tensor]]:
    """`run` of all texts that have a token, the longest first, in batches of `batch_size` or the budget.

    For each batch: which texts, how they are packed, and their hidden states (tokens, H).
    """
    device = fast.embeddings.word.weight.device
    order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: -len(ids[i]))
    for batch in _cut(order, ids, batch_size, token_budget(fast.config, device)):
        packed = PackedBatch.from_rows([ids[i] for i in batch], fast.config, device)
        yield batch, packed.packing, run(fast, packed, compiled=compiled)


def token_budget(config: BertConfig, device: torch.device) -> int:
    """How many tokens make a batch."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return min(TOKEN_BUDGET[kind], NUMBERS[kind] // config.hidden_size)


def _cut(
    order: list[int], ids: Sequence[Sequence[int]], batch_size: int | None, budget: int
) -> Iterator[list[int]]:
    """`order` in pieces of `batch_size` texts or, if that is None, of at most `budget` tokens or one text."""
    batch: list[int] = []
    tokens = 0
    for i in order:
        if batch and (len(batch) == batch_size or (batch_size is None and tokens + len(ids[i]) > budget)):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(ids[i])
    if batch:
        yield batch


def run(fast: BertModel, batch: PackedBatch, *, compiled: bool = False) -> Tensor:
    """The last hidden state of every token, (tokens, H); `compiled` by torch.compile, for CUDA."""
    if compiled:
        starts, longest = batch.packing.starts, batch.packing.longest
        return _compiled()(fast, batch.input_ids, batch.position_ids, starts, longest)
    return _run(fast, batch.input_ids, batch.position_ids, batch.packing.attend)


def _run(fast: BertModel, input_ids: Tensor, position_ids: Tensor, attend: AttentionFunction) -> Tensor:
    hidden: Tensor = fast.embeddings(input_ids, None, position_ids)  # (tokens, H)
    for output, _ in fast.run_layers(hidden, None, attend=attend):
        hidden = output
    return hidden


def run_varlen(
    fast: BertModel, input_ids: Tensor, position_ids: Tensor, starts: Tensor, longest: int
) -> Tensor:
    """`run` of tensors alone, without a loop over runs: a graph serves batches of all sizes."""
    return _run(fast, input_ids, position_ids, partial(varlen_attention, starts=starts, longest=longest))


@cache
def _compiled() -> Callable[..., Tensor]:
    import torch._dynamo.config as settings

    # Each kind of model takes two graphs, and with eight torch gives up.
    settings.recompile_limit = max(settings.recompile_limit, 64)
    return torch.compile(run_varlen, fullgraph=True, dynamic=True)
