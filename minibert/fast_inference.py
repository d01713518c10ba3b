"""The encoder made fast for inference: the same embeddings and layers, other Linears, no padding.

`run_texts` runs a model's fast copy on texts, `run` on one packed batch. The copy shares the model's embeddings
and the weights of its LayerNorms; its Linears hold theirs in the layout that oneDNN multiplies fastest, query,
key and value as one product and GELU inside the up-projection. docs/performance.md has the measurements.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook

from minibert.attention import ATTENTION_FUNCTIONS, AttentionFunction
from minibert.config import BertConfig
from minibert.fast_attention import varlen_attention
from minibert.fused_layers import FusedEmbeddings, FusedLayer, is_untouched
from minibert.memory import keep_freed_memory, release_memory
from minibert.model import BertModel
from minibert.packing import PackedBatch, Packing
from minibert.wrapped import uncompiled

# Per batch, at most: tokens, and numbers (tokens * H), which on a CPU fit its caches. See docs/performance.md.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 65536}
NUMBER_BUDGET = {"cpu": 2048 * 768, "cuda": 32768 * 768}
SAMPLE = 16  # so many numbers, a line of the cache, of each Linear's matrix and bias are compared
_LOCK = threading.RLock()  # threads, and a signal handler in between, may encode at the same time


class FastModel:
    """A model, or its lowest `layers`, as `run` wants it. It shares all weights but the Linears'.

    `dtype` is what the Linears compute in, the weights' own if None; all else stays as it is.
    """

    def __init__(self, model: BertModel, dtype: torch.dtype | None = None, layers: int | None = None) -> None:
        keep_freed_memory()
        self.config, self.device = model.config, model.device
        self.embeddings: Callable[..., Tensor] = FusedEmbeddings(model.embeddings)
        self.layers: list[Callable[..., tuple[Tensor, Tensor | None]]] = []
        for layer in list(model.layers)[:layers]:
            self.layers.append(FusedLayer(layer, model.config.hidden_act, dtype))  # type: ignore[arg-type]
            release_memory(layer.parameters())


def fast_copy(model: BertModel, dtype: torch.dtype | None = None) -> FastModel | None:
    """A model's `FastModel`, made anew when it has changed; None unless it `is_untouched`.

    A change is another part, setting, function, hook, parameter or shape, or another number. (Of what is
    written into a parameter's `.data` torch keeps no record, so some numbers of each Linear are compared.)
    With inference tensors, of which nothing tells whether they have changed, the copy is made anew every time.
    """
    model = uncompiled(model)
    if not isinstance(model, BertModel):  # somebody's own around it
        return None
    with _LOCK:
        kept: _Kept | None = vars(model).get("_kept")
        if kept is None or not kept.is_of(model, dtype):
            kept = vars(model)["_kept"] = None  # before its successor takes as much memory
            kept = vars(model)["_kept"] = _Kept(model, dtype)
        return kept.copy


class _Kept:
    """A fast copy and what it was made from; an attribute of its model, but not copied or pickled with it.

    `samples` are views, and so keep the memory alive that the Linears were packed from: its addresses are
    compared, and what is freed could become another parameter's.
    """

    def __init__(self, model: BertModel, dtype: torch.dtype | None) -> None:
        modules, self.parameters = list(model.modules()), list(model.parameters())
        self.matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        self.inner = modules[1:]  # not the model, which would hold itself
        self.namespaces = [vars(module) for module in self.inner]
        self.namespaces += [names for module in modules for names in (module._parameters, module._modules)]
        self.hooks = [each for module in modules for each in (module._forward_hooks, module._forward_pre_hooks)]
        self.parts, self.numbers = self._parts(model), self._numbers(dtype)
        self.copy, self.samples = None, []
        if is_untouched(model):
            linears = [part for part in model.layers.modules() if isinstance(part, nn.Linear)]
            self.samples = [each.weight.detach()[len(each.weight) // 2, :SAMPLE] for each in linears]
            self.samples += [each.bias.detach()[:SAMPLE] for each in linears]
            self.sampled = torch.cat(self.samples) if linears else torch.empty(0)
            self.copy = FastModel(model, dtype)

    def is_of(self, model: BertModel, dtype: torch.dtype | None) -> bool:
        """Whether it was made of these very parts, and of these numbers."""
        parts = self._parts(model)
        return (
            len(parts) == len(self.parts)
            and all(map(is_, parts, self.parts))
            and self._numbers(dtype) == self.numbers
            and (not self.samples or torch.equal(torch.cat(self.samples), self.sampled))
        )

    def _parts(self, model: BertModel) -> list[object]:
        """All parts and their classes, settings, functions and parameters."""
        own = (value for name, value in list(vars(model).items()) if name != "_kept")
        attend = ATTENTION_FUNCTIONS.get(model.attention)
        classes = map(type, (model, *self.inner))
        return [attend, *classes, *own, *chain.from_iterable(map(dict.values, self.namespaces))]

    def _numbers(self, dtype: torch.dtype | None) -> list[object]:
        """What changes when one is written to or moved, or a hook is set; of inference tensors, always."""
        try:
            versions = [*map(attrgetter("_version"), self.parameters)]
        except RuntimeError:  # inference tensors have none
            return [object()]
        shapes = chain(map(Tensor.size, self.matrices), map(Tensor.stride, self.matrices))
        return [dtype, any(self.hooks), *versions, *map(Tensor.data_ptr, self.parameters), *shapes]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def _note_fused_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """A fused optimizer writes into its parameters without torch's keeping a record of it."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version(group["params"])


register_optimizer_step_post_hook(_note_fused_step)


def run_texts(
    fast: FastModel, ids: Sequence[Sequence[int]], batch_size: int | None = None, *, compiled: bool = False
) -> Iterator[tuple[list[int], Packing, Tensor]]:
    """`run` of all texts that have a token, the longest first, in batches of `batch_size` or the budget.

    For each batch: which texts, how they are packed, and their hidden states (tokens, H).
    """
    device = fast.device
    order = sorted((i for i, row in enumerate(ids) if row), key=lambda i: -len(ids[i]))
    batches = list(in_batches(order, ids, batch_size, token_budget(fast.config, device)))
    for batch in batches:  # which may grow
        packed = PackedBatch.from_rows([ids[i] for i in batch], fast.config, device)
        hidden = run(fast, packed, compiled=compiled)  # (tokens, H)
        if len(batch) > 1 and hidden.is_cpu and not math.isfinite(hidden.sum(dtype=torch.float32)):
            batches += [[i] for i in batch]  # one text's NaN may have reached the text before it: each alone
        else:
            yield batch, packed.packing, hidden


def token_budget(config: BertConfig, device: torch.device) -> int:
    """How many tokens make a batch."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    return min(TOKEN_BUDGET[kind], NUMBER_BUDGET[kind] // config.hidden_size)


def in_batches(
    order: list[int], ids: Sequence[Sequence[int]], batch_size: int | None, budget: int
) -> Iterator[list[int]]:
    """`order` in pieces of `batch_size` texts or, if None, of at most `budget` tokens (or one longer text)."""
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


def run(fast: FastModel, batch: PackedBatch, *, compiled: bool = False) -> Tensor:
    """The last hidden state of every token, (tokens, H); `compiled` by torch.compile, for CUDA."""
    if compiled:
        import torch._dynamo.config as settings

        # Each kind of model takes two graphs, and with eight torch gives up. (A setting is its thread's own.)
        settings.recompile_limit = max(settings.recompile_limit, 64)
        starts, longest = batch.packing.starts, batch.packing.longest
        return _compiled()(fast, batch.input_ids, batch.position_ids, starts, longest)
    return _run(fast, batch.input_ids, batch.position_ids, batch.packing.attend)


def _run(fast: FastModel, input_ids: Tensor, position_ids: Tensor, attend: AttentionFunction) -> Tensor:
    hidden = fast.embeddings(input_ids, None, position_ids)  # (tokens, H)
    for layer in fast.layers:
        hidden, _ = layer(hidden, None, attend)
    return hidden


def run_varlen(
    fast: FastModel, input_ids: Tensor, position_ids: Tensor, starts: Tensor, longest: int
) -> Tensor:
    """`run` of tensors alone, without a loop over runs: a graph serves batches of all sizes."""
    return _run(fast, input_ids, position_ids, partial(varlen_attention, starts=starts, longest=longest))


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(run_varlen, fullgraph=True, dynamic=True)
