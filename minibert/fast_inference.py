"""The encoder made fast for inference: the same embeddings and layers, other Linears, no padding.

`run_texts` runs a model's fast copy on texts, `run` on one packed batch. The copy shares the model's embeddings
and the weights of its LayerNorms; its Linears hold theirs in the layout that oneDNN multiplies fastest, query,
key and value as one product and GELU inside the up-projection. docs/performance.md has the measurements.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from minibert.attention import AttentionFunction
from minibert.config import BertConfig
from minibert.embeddings import Embeddings
from minibert.fast_attention import varlen_attention
from minibert.fused_layers import fuse, has_hook, is_plain, lighten, replace
from minibert.layers import EncoderLayer
from minibert.memory import keep_freed_memory
from minibert.model import BertModel
from minibert.packing import PackedBatch, Packing
from weights.safetensors_files import release_memory

# Per batch, at most: tokens, and numbers (tokens * H), which on a CPU fit its caches. See docs/performance.md.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
NUMBERS = {"cpu": 2048 * 768, "cuda": 32768 * 768}


def fast_copy(model: BertModel, dtype: torch.dtype | None = None) -> BertModel:
    """The model as `run` wants it. It shares all weights but the Linears', and is made anew when they change.

    So it is when a Module or a hook is put in, or taken out. (What is written into a parameter's `.data` goes
    unnoticed, since torch keeps no record of it, and so does one activation function in place of another.)
    Hooks inside it see packed states, (tokens, H); what has one in a layer is not fused, nor are adapters, and
    both are shared: then `training` is true, and whoever runs it sets the model's mode. `dtype` is what the
    Linears compute in (the weights' own if None); all else stays as it is. With inference tensors, of which
    nothing tells whether they have changed, it is made anew every time.
    """
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    state = _identities(model), dtype, model.config
    with _LOCK:
        kept: _Kept = vars(model).setdefault("_kept", _Kept())
        if kept.copy is None or kept.state != state:
            kept.copy, kept.weights = None, ()  # before their successors take as much memory
            kept.copy, kept.state = new_fast_copy(model, dtype), state
            kept.weights = [(parameter, parameter.detach()) for parameter in model.parameters()]
        return kept.copy


class _Kept:
    """A fast copy and what it was made from; an attribute of its model, but not copied or pickled with it.

    `weights` are there so that no later parameter can have the identity or the memory of one of them.
    """

    copy: BertModel | None = None
    state: object = None
    weights: Sequence[object] = ()

    def __reduce__(self) -> tuple[type["_Kept"], tuple[()]]:
        return _Kept, ()


def _identities(model: BertModel) -> list[object]:
    """What changes with the model. (`parameters()` takes 3% of encoding a short sentence.)"""
    state: list[object] = []
    modules: list[nn.Module | None] = [model]
    for module in modules:  # which grows as it is walked
        if module is None:  # `model.pooler = None`
            continue
        state += (*module._forward_hooks, *module._forward_pre_hooks)  # the hooks' numbers
        if "forward" in module.__dict__:  # somebody's own
            state.append(id(module.forward))
        for parameter in module._parameters.values():
            if parameter is not None:
                version = object() if parameter.is_inference() else parameter._version
                state += (id(parameter), version, parameter.data_ptr())
        modules += module._modules.values()
    return [*state, *map(id, modules)]


M = TypeVar("M", bound=nn.Module)
_LOCK = threading.Lock()  # threads may encode at the same time


def _note_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A fused optimizer writes into its parameters without torch's keeping a record of it."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            if parameter.grad is not None:
                increment_version(parameter)


register_optimizer_step_post_hook(_note_fused_step)


def new_fast_copy(model: BertModel, dtype: torch.dtype | None = None, layers: int | None = None) -> BertModel:
    """A `fast_copy` that nobody else keeps; of the lowest `layers` only, if given."""
    keep_freed_memory()
    fast = _twin(model)
    vars(fast).pop("_kept", None)
    if isinstance(model.embeddings, Embeddings):
        fast.embeddings = _twin(model.embeddings)
        lighten(fast.embeddings, "token_type", "position", "norm", "dropout")
    called = []
    for layer in list(model.layers)[:layers]:
        if isinstance(layer, EncoderLayer):
            used = list(layer.parameters())
            layer = _twin(layer)
            fuse(layer, model.config.hidden_act, dtype)
            release_memory(used)
        called.append(layer if has_hook(layer) else layer.forward)
    replace(fast, "layers", called)
    fast.training = not all(map(is_plain, model.modules()))
    return fast


def _twin(module: M) -> M:
    """A module with the same parts, of which some can be replaced in it alone."""
    twin = copy.copy(module)
    for name, value in module.__dict__.items():
        if isinstance(value, dict):  # of parts, parameters, hooks
            twin.__dict__[name] = value.copy()
    return twin


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
    device = fast.device
    order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: -len(ids[i]))
    for batch in in_batches(order, ids, batch_size, token_budget(fast.config, device)):
        packed = PackedBatch.from_rows([ids[i] for i in batch], fast.config, device)
        yield batch, packed.packing, run(fast, packed, compiled=compiled)


def token_budget(config: BertConfig, device: torch.device) -> int:
    """How many tokens make a batch."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return min(TOKEN_BUDGET[kind], NUMBERS[kind] // config.hidden_size)


def in_batches(
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
