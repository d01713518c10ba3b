"""The fast path of `encode`: the reference's numbers to 1e-6, and the same bits whatever is in the batch."""

import copy
import csv
import gc
import itertools
import math
import random
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from heads.data import DEMO
from minibert import (
    BertConfig,
    BertModel,
    SentenceEncoder,
    Tokenizer,
    amx,
    fast_attention,
    fast_inference,
    onednn,
    sentence_encoder,
)
from minibert.attention import ATTENTION_FUNCTIONS, eager_attention
from minibert.fast_attention import even_pieces
from minibert.fast_dropout import use_fast_dropout
from minibert.fast_inference import FastModel, fast_copy, run, run_varlen
from minibert.fused_layers import FeedForwardInParts, FusedLinear
from minibert.layers import FeedForward
from minibert.onednn import packs_weights
from minibert.packing import PackedBatch, Packing

CPU = torch.device("cpu")
WORDS = (
    "the quick brown fox jumps over a lazy dog while unbelievable antidisestablishmentarianism 42 é !".split()
)
needs_onednn = pytest.mark.skipif(
    not packs_weights(torch.zeros(1)), reason="the promise is made for oneDNN's products"
)
needs_bfloat16 = pytest.mark.skipif(
    not packs_weights(torch.zeros(1, dtype=torch.bfloat16)), reason="the promise is made for oneDNN's products"
)
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_bfloat16)
FUSED = fast_attention.fuses_bfloat16(torch.zeros(1, dtype=torch.bfloat16))
THREADS = (1, 2, 3, 8, 32) if amx.HAS_AMX else (1, 2, 3, 8)
needs_exact = pytest.mark.skipif(not onednn.are_exact(), reason="oneDNN's float32 products are not exact here")


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def varied_texts(count: int, seed: int = 0) -> list[str]:
    """Lengths from the empty text to longer than 512 tokens, most of them short, as text is."""
    rng = random.Random(seed)
    lengths = [min(int(rng.lognormvariate(2.7, 1.1)), 600) for _ in range(count - 4)]
    return [text(length, seed + i) for i, length in enumerate([0, 1, 600, 300, *lengths])]


def reference(encoder: SentenceEncoder, texts: list[str]) -> Tensor:
    """`forward`, padded, 32 at a time."""
    ids = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings = torch.empty(len(texts), encoder.model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(ids), 32):
            rows = ids[start : start + 32]
            embeddings[rows] = encoder(**encoder.tokenizer([texts[i] for i in rows]))
    return embeddings


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of a component, relative to the embedding's norm."""
    return float(((ours - theirs).abs().amax(dim=1) / theirs.norm(dim=1)).max())


# ------------------------------------------------------------------------------------------ faithful


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*texts cut to 512 tokens")
def test_two_thousand_texts_agree_with_the_reference(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    encoder.tokenizer.max_length = 512
    texts = varied_texts(2000)
    lengths = {len(row) for row in encoder.tokenizer.token_ids(texts)}
    assert {2, 512} < lengths
    fast = encoder.encode(texts, normalize_embeddings=False, convert_to_tensor=True)
    padded = reference(encoder, texts)
    assert relative(fast, padded) < 1e-6
    # Both are rounded: measured from float64, the fast path strays hardly further than the reference.
    wide = SentenceEncoder.from_pretrained(minilm, dtype=torch.float64)
    wide.tokenizer.max_length = 512
    exact = wide.encode(texts[:100], normalize_embeddings=False, convert_to_tensor=True)
    ours, theirs = ((each[:100] - exact).norm(dim=1) / exact.norm(dim=1) for each in (fast, padded))
    assert ours.max() < 2 * theirs.max()


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_every_kind_of_model_agrees_with_the_reference(minilm: Path, hidden_act: str, pooling: str) -> None:
    torch.manual_seed(1)
    config = BertConfig(
        model_type="distilbert" if pooling == "cls" else "bert",
        type_vocab_size=0 if pooling == "cls" else 2,
        hidden_act=hidden_act,
        hidden_size=39,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=37,
        initializer_range=0.2,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    tokenizer = Tokenizer(Tokenizer.from_pretrained(minilm).backend, token_types=config.type_vocab_size > 0)
    encoder = SentenceEncoder(model, tokenizer, pooling=pooling)
    texts = [text(words, words) for words in range(30)]
    embeddings = encoder.encode(texts, convert_to_tensor=True)
    assert relative(embeddings, reference(encoder, texts)) < 1e-6
    if packs_weights(torch.zeros(1)):
        assert torch.equal(embeddings, torch.stack([encoder.encode(t, convert_to_tensor=True) for t in texts]))


@pytest.mark.parametrize("encoder", ["odd"], indirect=True)
def test_without_onednn_the_numbers_are_the_same(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text(words, words) for words in range(20)]
    with_it = encoder.encode(texts, convert_to_tensor=True)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: False)
    encoder = copy.deepcopy(encoder)  # which has no fast copy yet
    first: Any = FastModel(encoder.model).layers[0]
    assert not first.attention.output.packed
    assert relative(encoder.encode(texts, convert_to_tensor=True), with_it) < 1e-6
    assert relative(encoder.encode(texts, convert_to_tensor=True), reference(encoder, texts)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*texts cut to 256 tokens")
def test_bfloat16_is_close(minilm: Path) -> None:
    with DEMO.open(encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)] + varied_texts(150)
    wide = SentenceEncoder.from_pretrained(minilm).encode(texts)
    encoder = SentenceEncoder.from_pretrained(minilm, dtype=torch.bfloat16)
    assert encoder.model.embeddings.word.weight.dtype == torch.float32  # the model itself is as published
    assert (encoder.encode(texts) * wide).sum(1).min() > 0.9999


# ------------------------------------------------------------------------------------ batch-invariant


@pytest.fixture(scope="module", params=["MiniLM", "MiniLM bfloat16", "odd", "odd bfloat16"])
def encoder(request: pytest.FixtureRequest, minilm: Path) -> SentenceEncoder:
    name, _, variant = request.param.partition(" ")
    product = torch.bfloat16 if variant else None
    if name == "MiniLM":
        return SentenceEncoder.from_pretrained(minilm, dtype=product)
    torch.manual_seed(0)  # rows that begin anywhere in a cache line
    config = BertConfig(
        hidden_size=39, num_attention_heads=3, num_hidden_layers=2, intermediate_size=37, initializer_range=0.2
    )
    return SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm), dtype=product)


@needs_onednn
@pytest.mark.filterwarnings("ignore:.*texts cut to 256 tokens")
@pytest.mark.parametrize("exact", [pytest.param(True, marks=needs_exact), False])  # False: as with AMX
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(0, 300), min_size=1, max_size=12),
    batch_size=st.none() | st.integers(1, 13),
    budget=st.integers(1, 4000),
    threads=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 99),
)
def test_the_bits_do_not_depend_on_the_batch(
    encoder: SentenceEncoder,
    exact: bool,
    lengths: list[int],
    batch_size: int | None,
    budget: int,
    threads: int,
    seed: int,
) -> None:
    texts = [text(words, seed + i) for i, words in enumerate(lengths)]
    available = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.setattr(onednn, "are_exact", lambda: False)
        alone = np.stack([encoder.encode(each) for each in texts])
        patch.setitem(fast_inference.TOKEN_BUDGET, "cpu", budget)
        try:
            torch.set_num_threads(threads)
            together = encoder.encode(texts, batch_size)
            reversed_ = encoder.encode(texts[::-1], batch_size)[::-1]
        finally:
            torch.set_num_threads(available)
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(reversed_, alone)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (384, 1152),
        (1536, 384),
        (768, 768),
        (3072, 768),
        (39, 37),
        (37, 39),
        (512, 128),
        (1200, 312),
        (28, 2048),
    ],
)
def test_a_row_of_a_product_does_not_depend_on_the_others(
    inputs: int, outputs: int, activation: str | None, dtype: torch.dtype
) -> None:
    """Nor on how many threads there are, which could sum a long row in parts.

    The terms of a sum cancel each other: all bits of what is left depend on the order in which they are summed.
    """
    torch.manual_seed(0)
    x, weight, half = torch.zeros(1100, inputs), torch.zeros(outputs, inputs), inputs // 2
    order = torch.randperm(2 * half)
    x[:, order] = 2.0**20 * torch.randn(1100, half).repeat(1, 2)
    some = torch.randn(outputs, half)
    weight[:, order] = torch.cat([some, -some], 1)
    plain = nn.Linear(inputs, outputs)
    plain.weight = nn.Parameter(weight)
    linear = FusedLinear(plain, activation=activation, dtype=dtype)
    expected = linear(x)
    available = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            if inputs > amx.SHORT_SUM and threads > fast_attention.FEW_THREADS:
                expected = linear(x)  # other bits, but still the same whatever the others are
            for rows in (1, 2, 3, 7, 16, 17, 28, 33, 64, 255, 1024):
                for start in (0, 1, 13):
                    assert torch.equal(linear(x[start : start + rows]), expected[start : start + rows])
    finally:
        torch.set_num_threads(available)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("length", [7, 12, 39, 40, 65, 100, 300])
def test_attention_does_not_depend_on_the_other_texts(length: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    texts, available = 9, torch.get_num_threads()
    states = torch.randn(3, 12, texts * length, 64).to(dtype)
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            with torch.inference_mode(), onednn.onednn_products():
                q, k, v = states
                together, _ = Packing(((texts, length),), CPU).attend(q, k, v, None, 0.0)
                for i in range(texts):
                    q, k, v = states[..., i * length : (i + 1) * length, :]
                    alone, _ = Packing(((1, length),), CPU).attend(q, k, v, None, 0.0)
                    assert torch.equal(alone, together[:, i * length : (i + 1) * length])
    finally:
        torch.set_num_threads(available)


@pytest.mark.parametrize("width", [39, 384])
def test_a_mean_does_not_depend_on_the_others(width: int) -> None:
    """Nor on the threads: 256 tokens are enough for torch to share the work out."""
    torch.manual_seed(0)
    hidden = torch.randn(6 * 256 + 13, width)
    alone = [Packing.of([256], CPU).mean(hidden[i * 256 : (i + 1) * 256]) for i in range(6)]
    alone.append(Packing.of([13], CPU).mean(hidden[-13:]))
    exact = [*hidden[:-13].double().view(6, 256, width).mean(1), hidden[-13:].double().mean(0)]
    available = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            together = Packing.of([*[256] * 6, 13], CPU).mean(hidden)
            assert torch.equal(together, torch.cat(alone))
    finally:
        torch.set_num_threads(available)
    torch.testing.assert_close(together, torch.stack(exact).float(), atol=1e-7, rtol=1e-6)


# ---------------------------------------------------------------------------------------- the pieces


@needs_onednn
@pytest.mark.parametrize(
    ("length", "head_size", "dtype", "through_onednn"),
    [
        (64, 64, torch.float32, False),
        pytest.param(65, 64, torch.float32, True, marks=needs_exact),
        (90, 32, torch.float32, False),
        pytest.param(91, 32, torch.float32, True, marks=needs_exact),
        (11, 32, torch.bfloat16, False),
        pytest.param(12, 32, torch.bfloat16, not FUSED, marks=needs_bfloat16),
        pytest.param(100, 32, torch.bfloat16, not FUSED, marks=needs_bfloat16),
    ],
)
def test_the_length_alone_decides_what_forms_attention(
    monkeypatch: pytest.MonkeyPatch, length: int, head_size: int, dtype: torch.dtype, through_onednn: bool
) -> None:
    spy = Mock(wraps=fast_attention.onednn_attention)
    monkeypatch.setattr(fast_attention, "onednn_attention", spy)
    for texts in (1, 3):
        q, k, v = torch.randn(3, 5, texts * length, head_size).to(dtype)
        apart = [states.double().view(5, texts, length, head_size) for states in (q, k, v)]
        expected, _ = eager_attention(apart[0], apart[1], apart[2], None, 0.0)
        with torch.no_grad(), onednn.onednn_products():
            context, _ = Packing(((texts, length),), CPU).attend(q, k, v, None, 0.0)
        tolerance = 2e-6 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(context.double(), expected.flatten(1, 2), atol=tolerance, rtol=0)
    assert spy.call_count == 2 * through_onednn


@pytest.mark.parametrize(("length", "dtype"), [(79, torch.float32), (28, torch.bfloat16)])
def test_what_follows_a_text_has_no_weight(
    monkeypatch: pytest.MonkeyPatch, length: int, dtype: torch.dtype
) -> None:
    """However large it is: keys and values are continued by those of the next text, without a copy."""
    spy = Mock(wraps=fast_attention.whole_vectors_attention)
    monkeypatch.setattr(fast_attention, "whole_vectors_attention", spy)
    torch.manual_seed(0)
    q, k, v, _ = torch.randn(4, 5, 3 * length, 32).to(dtype)  # something follows the values, too
    monkeypatch.setattr("torch.nn.functional.pad", Mock(side_effect=AssertionError))
    contexts = []
    for factor in (1, 1e30):
        k[:, 2 * length :] *= factor
        v[:, 2 * length :] *= factor
        with torch.no_grad():
            contexts.append(Packing(((3, length),), CPU).attend(q, k, v, None, 0.0)[0][:, : 2 * length])
    assert torch.equal(*contexts)
    assert spy.call_count == 2 * (fast_attention.HAS_AVX512 and (dtype == torch.float32 or FUSED))


@pytest.mark.parametrize("by_columns", [False, True])
def test_keys_are_continued_as_far_as_memory_goes(by_columns: bool) -> None:
    """By what is there, up to its last number, and otherwise by zeros; in whichever order it lies."""
    memory = torch.randn(13, 3, 7)  # (tokens, N, D)
    if by_columns:
        memory = memory.flatten(1).T.contiguous().T.view(13, 3, 7)
    for tokens in (5, 10, 13):
        states = memory[:tokens].transpose(0, 1)[None]  # (1, N, T, D)
        assert torch.equal(fast_attention._continued(states, 13), memory.transpose(0, 1)[None])
        longer = fast_attention._continued(states, 14)
        assert torch.equal(longer[:, :, :tokens], states)
        assert not longer[:, :, tokens:].any()


def test_what_was_chosen_for_one_case_is_not_taken_in_another() -> None:
    """In one packing: dropout after none, gradients after none, another dtype."""
    torch.manual_seed(0)
    runs = ((3, 100), (2, 20))
    q, k, v = torch.randn(3, 5, 340, 32)
    used = Packing(runs, CPU)
    with torch.no_grad(), onednn.onednn_products():
        used.attend(q, k, v, None, 0.0)
    with onednn.onednn_products():
        for dropout_p, dtype in ((0.5, torch.float32), (0.0, torch.float32), (0.0, torch.bfloat16)):
            results = []
            for packing in (used, Packing(runs, CPU)):
                torch.manual_seed(1)
                states = [each.to(dtype).requires_grad_() for each in (q.clone(), k.clone(), v.clone())]
                context, _ = packing.attend(states[0], states[1], states[2], None, dropout_p)
                results.append((context, *torch.autograd.grad(context.float().square().sum(), states)))
            assert all(torch.equal(ours, fresh) for ours, fresh in zip(*results, strict=True))


def test_fused_linear_is_its_linears_and_the_activation() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(7, 5).double(), nn.Linear(7, 3).double()]
    x = torch.randn(11, 7, dtype=torch.float64)
    expected = torch.cat([linear(x) for linear in linears], 1)
    exact = 0.5 * expected * (1 + torch.erf(expected / math.sqrt(2)))
    fused = FusedLinear(*(linear.float() for linear in linears), activation="gelu")
    torch.testing.assert_close(fused(x.float()), exact.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_feed_forward_in_parts_is_what_it_is_as_a_whole(act: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    whole = FeedForward(BertConfig(hidden_size=36, intermediate_size=52, hidden_act=act)).eval()
    exact = copy.deepcopy(whole).double()
    parts = FeedForwardInParts(whole, act, dtype, 13)
    assert len(parts.parts) == 4
    hidden = torch.randn(7, 36)
    ours = parts(hidden)
    assert ours.dtype == torch.float32
    error = (ours - exact(hidden.double())).norm() / exact(hidden.double()).norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_the_copy_shares_what_it_does_not_pack(minilm: Path) -> None:
    model = BertModel.from_pretrained(minilm)
    assert fast_copy(model) is fast_copy(model)
    fast = cast(Any, fast_copy(model))
    assert fast.embeddings.word.args[0] is model.embeddings.word.weight
    assert fast.layers[0].attention_norm.keywords["weight"] is model.layers[0].attention_norm.weight  # type: ignore[union-attr]
    assert type(model.layers[0].attention.query) is nn.Linear  # type: ignore[union-attr]


class Louder(nn.Module):
    """Around the embeddings."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.inner(*inputs) * torch.arange(36)  # type: ignore[no-any-return]


def uniform_attention(
    _: object, __: object, value: Tensor, mask: Tensor | None, ___: object
) -> tuple[Tensor, None]:
    if mask is None:
        mask = torch.ones(len(value), 1, value.shape[2], value.shape[2])
    weights = mask.float() / mask.sum(-1, keepdim=True)  # (B, 1, T, T)
    return weights.expand(-1, value.shape[1], -1, -1) @ value, None


def changes() -> list[Callable[[BertModel], None]]:
    def in_place(model: BertModel) -> None:
        with torch.no_grad():
            model.get_parameter("layers.1.feed_forward.down.weight").mul_(1.5)

    def a_step(model: BertModel) -> None:
        model(torch.tensor([[5, 6, 7]])).last_hidden_state[..., 0].sum().backward()
        torch.optim.Adam(model.parameters(), lr=0.1).step()

    def a_fused_step(model: BertModel) -> None:
        model(torch.tensor([[5, 6, 7]])).last_hidden_state[..., 0].sum().backward()
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()

    def new_data(model: BertModel) -> None:
        weight = model.get_parameter("layers.0.attention.value.weight")
        weight.data = weight.data * 1.5

    def told(model: BertModel) -> None:
        model.get_parameter("layers.1.feed_forward.up.weight").detach().numpy()[:] *= 1.5
        torch.autograd.graph.increment_version(model.parameters())

    def new_parameters(model: BertModel) -> None:
        value = model.layers[0].attention.value  # type: ignore[union-attr]
        for seed in range(3):  # the last of which may lie where the first did
            torch.manual_seed(seed)
            value.weight = nn.Parameter(torch.randn(36, 36))  # type: ignore[union-attr]

    def pruned(model: BertModel) -> None:
        prune.l1_unstructured(model.get_submodule("layers.1.feed_forward.up"), "weight", amount=0.5)  # type: ignore[no-untyped-call]

    def other_forward(model: BertModel) -> None:
        value = model.get_submodule("layers.0.attention.value")
        forward = value.forward
        value.forward = lambda x: 2 * forward(x)

    def new_module(model: BertModel) -> None:
        model.layers[0].attention.value = nn.Linear(36, 36)  # type: ignore[union-attr]

    def adapter(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        attention.value = nn.Sequential(attention.get_submodule("value"), nn.Linear(36, 36))

    def table_adapter(model: BertModel) -> None:
        table = model.get_submodule("embeddings.word")
        model.embeddings.word = nn.Sequential(table, nn.Linear(36, 36))  # type: ignore[assignment]

    def no_bias(model: BertModel) -> None:
        model.layers[1].feed_forward.down = nn.Linear(37, 36, bias=False)  # type: ignore[union-attr]

    def other_embeddings(model: BertModel) -> None:
        model.embeddings = Louder(model.embeddings)  # type: ignore[assignment]

    def outside_hook(model: BertModel) -> None:
        model.register_forward_hook(
            lambda _, __, output: output._replace(last_hidden_state=output.last_hidden_state * torch.arange(36))
        )

    def outside_forward(model: BertModel) -> None:
        forward = model.forward
        model.forward = lambda *inputs: forward(*inputs)._replace(  # type: ignore[method-assign]
            last_hidden_state=forward(*inputs).last_hidden_state * torch.arange(36)
        )

    def activation(model: BertModel) -> None:
        model.get_submodule("layers.0.feed_forward").activation = nn.ReLU()
        model.layers[0].feed_forward.up = nn.Linear(36, 37)  # type: ignore[union-attr]

    def activation_alone(model: BertModel) -> None:
        model.get_submodule("layers.0.feed_forward").activation = nn.ReLU()

    class OnlyScaled(nn.Module):
        def forward(self, hidden: Tensor, mask: object, attend: object) -> tuple[Tensor, None]:
            return hidden * torch.arange(36), None

    def other_layer(model: BertModel) -> None:
        model.get_submodule("layers")[1] = OnlyScaled()  # type: ignore[operator]

    def merged(model: BertModel) -> None:  # as peft does
        for layer in model.layers:
            value = layer.get_submodule("attention.value")
            value.get_parameter("weight").data += 0.01 * torch.randn(36, 2) @ torch.randn(2, 36)

    def biases(model: BertModel) -> None:  # as torch_ema does
        model.get_parameter("layers.1.feed_forward.up.bias").data.copy_(torch.randn(37))

    def plain_tensor(model: BertModel) -> None:
        value = model.get_submodule("layers.1.attention.value")
        del value.weight
        value.weight = torch.randn(36, 36)

    def without_cls(model: BertModel) -> None:
        def ablate(_: nn.Module, __: object, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
            hidden = output[0].clone()
            hidden[:, 0] = 0
            return hidden, None

        model.layers[0].register_forward_hook(ablate)

    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(1))  # of a text's tokens, from the left

    def mixes_tokens(model: BertModel) -> None:
        model.layers[0].feed_forward.up = Mixing(36, 37)  # type: ignore[union-attr]

    def own_function(model: BertModel) -> None:
        attention: Any = model.get_submodule("layers.1.attention")
        project = attention.project
        attention.project = lambda hidden: [2 * states for states in project(hidden)]

    def one_key_for_all_heads(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        attention.key, attention.value = nn.Linear(36, 12), nn.Linear(36, 12)

    def no_layers(model: BertModel) -> None:
        model.layers = nn.ModuleList()

    def limited_table(model: BertModel) -> None:
        model.embeddings.position = nn.Embedding(512, 36, max_norm=0.01)

    def own_attention(model: BertModel) -> None:
        model.attention = "uniform"

    def fewer_heads(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(36, 24))
        attention.output = nn.Linear(24, 36)

    def fewer_inner_numbers(model: BertModel) -> None:
        up, down = (model.get_submodule(f"layers.0.feed_forward.{name}") for name in ("up", "down"))
        up.weight, up.bias = nn.Parameter(torch.randn(9, 36)), nn.Parameter(torch.randn(9))
        down.weight = nn.Parameter(torch.randn(36, 9))  # in_features stay what they were

    def norm(model: BertModel) -> None:
        with torch.no_grad():
            model.get_parameter("layers.1.feed_forward_norm.weight").mul_(1.5)

    def other_eps(model: BertModel) -> None:
        model.layers[0].attention_norm.eps = 1.0  # type: ignore[union-attr]

    def other_head_size(model: BertModel) -> None:
        model.layers[0].attention.head_size = 18  # type: ignore[union-attr]

    def other_activation(model: BertModel) -> None:
        model.layers[0].feed_forward.activation = F.relu  # type: ignore[union-attr]

    def other_method(model: BertModel) -> None:
        run_layers: Any = model.run_layers

        def twice(*inputs: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
            return ((2 * hidden, weights) for hidden, weights in run_layers(*inputs))

        model.run_layers = twice  # type: ignore[method-assign, assignment]

    class TwiceTheNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def other_norm(model: BertModel) -> None:
        model.layers[1].feed_forward_norm = TwiceTheNorm(36)

    return [
        *(biases, in_place, a_step, a_fused_step, new_data, told, new_parameters, pruned, norm),
        *(merged, plain_tensor, without_cls, mixes_tokens, fewer_heads, fewer_inner_numbers, own_attention),
        *(own_function, one_key_for_all_heads, no_layers, limited_table),
        *(no_bias, activation, activation_alone, other_forward, outside_forward, outside_hook),
        *(new_module, adapter, table_adapter, other_embeddings, other_layer, other_norm),
        *(other_eps, other_head_size, other_activation, other_method),
    ]


def two_layers(minilm: Path) -> SentenceEncoder:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=36, num_attention_heads=3, num_hidden_layers=2, intermediate_size=37, initializer_range=0.2
    )
    return SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm))


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_changed_weights_are_seen(
    minilm: Path, change: Callable[[BertModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "uniform", uniform_attention)
    encoder = two_layers(minilm)
    texts = ["one text", "and another one"]
    before = encoder.encode(texts, convert_to_tensor=True)
    change(encoder.model)
    after = encoder.encode(texts, convert_to_tensor=True)
    assert relative(after, before) > 1e-3
    assert relative(after, reference(encoder, texts)) < 1e-6


def test_new_data_where_the_old_was(minilm: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=70_000)
    encoder = SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm))
    bias = encoder.model.get_parameter("layers.0.feed_forward.up.bias")  # not compared, as some of a matrix is
    old = bias.data
    bias.data = torch.randn(70_000)
    encoder.encode("one text")
    seen = bias.data_ptr()
    bias.data = old  # whose memory is the other's now?
    others = [torch.randn(70_000) for _ in range(99)]
    bias.data = next((data for data in others if data.data_ptr() == seen), others[0])
    after = encoder.encode(["one text"], convert_to_tensor=True)
    assert relative(after, reference(encoder, ["one text"])) < 1e-6


def test_a_norm_in_the_place_of_a_dropout_counts(minilm: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=36,
        num_attention_heads=3,
        num_hidden_layers=1,
        intermediate_size=2048,
        initializer_range=0.2,
    )
    model = BertModel(config).eval()
    norm = nn.LayerNorm(36)
    nn.init.normal_(norm.bias, std=3.0)
    model.layers[0].feed_forward.dropout = norm  # type: ignore[union-attr]
    encoder = SentenceEncoder(model, Tokenizer.from_pretrained(minilm), dtype=torch.bfloat16)
    texts = ["one text", "and another one"]
    assert relative(encoder.encode(texts, convert_to_tensor=True), reference(encoder, texts)) < 0.02


def test_inference_tensors_are_taken_as_they_are(minilm: Path) -> None:
    with torch.inference_mode():
        encoder = two_layers(minilm)
        before = encoder.encode(["one text"], convert_to_tensor=True)
        for parameter in encoder.model.parameters():
            parameter.mul_(1.5)
        after = encoder.encode(["one text"], convert_to_tensor=True)
        assert relative(after, before) > 1e-3
        assert relative(after, reference(encoder, ["one text"])) < 1e-6
        loaded = BertModel.from_pretrained(minilm)
    loaded(torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()  # can be trained


def test_an_encoder_with_a_forward_of_its_own(minilm: Path) -> None:
    class Shifted(SentenceEncoder):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
        ) -> Tensor:
            return super().forward(input_ids, attention_mask, token_type_ids) + torch.arange(36)

    plain = two_layers(minilm)
    shifted = Shifted(plain.model, plain.tokenizer, dtype=torch.bfloat16).train()
    texts = ["a b c", "", "d e f", "one more, which is longer", "g h i"]
    expected = plain.encode(texts, convert_to_tensor=True) + torch.arange(36)
    for batch_size in (None, 2):
        assert relative(shifted.encode(texts, batch_size, convert_to_tensor=True), expected) < 1e-6
    assert shifted.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_encoder_whose_vectors_are_others(minilm: Path, dtype: torch.dtype) -> None:
    class Dense(SentenceEncoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            hidden = self.model(input_ids, attention_mask).last_hidden_state  # (B, T, H)
            return hidden.masked_fill(attention_mask[..., None] == 0, -9).amax(1)[:, :7].to(dtype)  # type: ignore[no-any-return]

    plain = two_layers(minilm)
    encoder, texts = Dense(plain.model, plain.tokenizer), [text(n, n) for n in (1, 5, 5, 0)] + 4100 * ["one"]
    vectors = encoder.encode(texts, convert_to_tensor=True)
    assert vectors.shape == (4104, 7)
    assert vectors.dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        expected = encoder(**{k: v for k, v in plain.tokenizer(texts[:5]).items() if k != "token_type_ids"})
    assert relative(vectors[:5], expected.to(vectors.dtype)) < (0.01 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("how", ["hook on the encoder", "function of the encoder", "hook on a compiled model"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # on importing the compiler
def test_what_is_put_around_the_model(minilm: Path, how: str) -> None:
    encoder, texts = two_layers(minilm), ["one text", "and another one"]
    if how == "hook on the encoder":
        encoder.register_forward_hook(lambda _, __, output: output * torch.arange(36))
    elif how == "function of the encoder":
        forward = encoder.forward
        encoder.forward = lambda *inputs, **named: forward(*inputs, **named) * torch.arange(36)  # type: ignore[method-assign]
    else:
        encoder.model = torch.compile(encoder.model, backend="eager")  # type: ignore[assignment]
        encoder.model.register_forward_hook(
            lambda _, __, output: output._replace(last_hidden_state=output.last_hidden_state * torch.arange(36))
        )
    before = two_layers(minilm).encode(texts, convert_to_tensor=True)
    after = encoder.encode(texts, convert_to_tensor=True)
    assert relative(after, before * torch.arange(36)) < 1e-6


def test_a_module_around_the_model(minilm: Path, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self, inner: BertModel) -> None:
            super().__init__()
            self.inner, self.config, self.device, self.dtype = inner, inner.config, inner.device, inner.dtype

        def forward(self, *inputs: Tensor | None) -> Any:
            output = self.inner(*inputs)
            return output._replace(last_hidden_state=2 * output.last_hidden_state)

    plain, texts = two_layers(minilm), ["one text", "and another one"]
    expected = 2 * plain.encode(texts, convert_to_tensor=True)
    encoder = SentenceEncoder(Around(plain.model), plain.tokenizer)  # type: ignore[arg-type]
    assert relative(encoder.encode(texts, convert_to_tensor=True), expected) < 1e-6
    with pytest.raises(ValueError, match="a Around cannot be saved: put the BertModel inside it in its place"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_subclass_of_the_model(minilm: Path) -> None:
    class Doubled(BertModel):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            output = super().forward(*inputs, **named)
            return output._replace(last_hidden_state=2 * output.last_hidden_state)

    plain = two_layers(minilm)
    model = Doubled(plain.model.config).eval()
    model.load_state_dict(plain.model.state_dict())
    texts = ["one text", "and another one"]
    expected = 2 * plain.encode(texts, convert_to_tensor=True)
    assert (
        relative(SentenceEncoder(model, plain.tokenizer).encode(texts, convert_to_tensor=True), expected) < 1e-6
    )


def test_an_activation_of_ones_own(minilm: Path) -> None:
    encoder, texts = two_layers(minilm), ["one text", "and another one"]
    feed_forward: Any = encoder.model.get_submodule("layers.0.feed_forward")
    feed_forward.activation = torch.sin
    assert relative(encoder.encode(texts, convert_to_tensor=True), reference(encoder, texts)) < 1e-6


def test_cheaper_dropout_is_ours(minilm: Path) -> None:
    model = two_layers(minilm).model
    use_fast_dropout(model)
    assert fast_copy(model) is not None


def test_a_pooling_of_ones_own(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def max_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)

    monkeypatch.setitem(sentence_encoder.POOLINGS, "max", max_pooling)
    encoder, texts = two_layers(minilm), ["one text", "and another one"]
    encoder.pooling = "max"
    assert relative(encoder.encode(texts, convert_to_tensor=True), reference(encoder, texts)) < 1e-6


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_no_number_stays_none(minilm: Path, act: str, dtype: torch.dtype | None) -> None:
    config = BertConfig(
        hidden_size=36, num_attention_heads=3, num_hidden_layers=1, intermediate_size=37, hidden_act=act
    )
    encoder = SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm), dtype=dtype)
    nn.init.constant_(encoder.model.get_parameter("layers.0.feed_forward.up.weight"), torch.nan)
    assert np.isnan(encoder.encode(["one", "another text"])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_without_finite_numbers_leaves_others_alone(minilm: Path, dtype: torch.dtype) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm, dtype=dtype)
    zebra = encoder.tokenizer(["zebra"])["input_ids"][0, 1]
    with torch.no_grad():
        encoder.model.embeddings.word.weight[zebra] = torch.inf
    texts = [f"{word} " * length for length in (12, 70, 75) for word in ("cat", "zebra", "dog")]
    together = encoder.encode(texts)
    assert np.isnan(together).any(1).tolist() == [False, True, False] * 3
    np.testing.assert_array_equal(together, np.stack([encoder.encode(text) for text in texts]))


class Merging(nn.Linear):
    """As loralib's: `train` merges and unmerges."""

    merged = False

    def train(self, mode: bool = True) -> Self:
        self.merged = not mode
        return super().train(mode)


def test_a_part_is_told_when_it_is_in_training_again(minilm: Path) -> None:
    encoder = two_layers(minilm)
    part = Merging(36, 36)
    encoder.model.get_submodule("layers.0.attention").value = part
    encoder.train()
    encoder.model.layers[1].eval()
    before = [module.training for module in encoder.modules()]
    encoder.encode("one text")
    assert [module.training for module in encoder.modules()] == before
    assert not part.merged


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # on importing the compiler
def test_a_compiled_model_is_left_as_it_is(minilm: Path, tmp_path: Path) -> None:
    encoder = two_layers(minilm)
    expected = encoder.encode(["one text"])
    compiled = SentenceEncoder(torch.compile(encoder.model), encoder.tokenizer)  # type: ignore[arg-type]
    np.testing.assert_array_equal(compiled.encode(["one text"]), expected)
    assert relative(reference(encoder, ["one text"]), torch.tensor(expected)) < 1e-6
    compiled.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(
        SentenceEncoder.from_pretrained(tmp_path / "saved").encode(["one text"]), expected
    )


def test_the_copy_dies_with_its_model(minilm: Path) -> None:
    encoder = two_layers(minilm)
    encoder.model.layers[0].register_forward_hook(lambda *_, holds=encoder: None)
    encoder.encode("one text")
    model = weakref.ref(encoder.model)
    assert vars(copy.deepcopy(encoder.model))["_kept"] is None  # it would take the memory twice
    del encoder
    gc.collect()
    assert model() is None


def test_old_weights_go_when_the_model_is_converted(minilm: Path) -> None:
    encoder = two_layers(minilm)
    encoder.encode("one text")
    kept = weakref.ref(vars(encoder.model)["_kept"])  # the packed ones, too
    encoder.half()
    assert kept() is None
    encoder.float()
    assert (
        relative(encoder.encode(["one text"], convert_to_tensor=True), reference(encoder, ["one text"])) < 1e-6
    )


def test_a_larger_vocabulary_counts_once_the_config_says_so(minilm: Path) -> None:
    encoder = two_layers(minilm)
    encoder.tokenizer.backend.add_tokens(["zzqq"])
    table = encoder.model.embeddings.word.weight
    encoder.model.embeddings.word = nn.Embedding(30523, 36, _weight=torch.cat([table, 2 * table[:1]]).detach())
    with pytest.raises(ValueError, match=r"input_ids\[2\] is 30522, it must be from 0 to 30521"):
        encoder.encode("a zzqq")
    encoder.model.config = replace(encoder.model.config, vocab_size=30523)
    vector = encoder.encode(["a zzqq"], convert_to_tensor=True)
    assert relative(vector, reference(encoder, ["a zzqq"])) < 1e-6


class Scaled(nn.Module):
    """An adapter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = 2.0
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.dropout(self.inner(x)) + self.shift  # type: ignore[no-any-return]


def test_what_an_adapter_keeps_counts(minilm: Path) -> None:
    encoder, texts = two_layers(minilm), ["one text", "and another one"]
    attention = encoder.model.get_submodule("layers.1.attention")
    adapter = Scaled(attention.get_submodule("value"))
    attention.value = adapter
    encoder.train()  # which encode is not
    seen = []
    for adapter.scale, shift in ((2.0, 1.0), (0.5, 1.0), (0.5, 3.0)):
        adapter.get_buffer("shift").fill_(shift)
        seen.append(encoder.encode(texts, convert_to_tensor=True))
        assert all(module.training for module in encoder.modules())
    encoder.eval()
    assert relative(seen[-1], reference(encoder, texts)) < 1e-6
    adapter.train()  # as one that was put into a loaded model
    assert torch.equal(encoder.encode(texts, convert_to_tensor=True), seen[-1])
    assert adapter.training
    assert relative(seen[0], seen[1]) > 1e-3
    assert relative(seen[1], seen[2]) > 1e-3


def test_hooks_see_what_they_see_in_forward(minilm: Path) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[nn.Module, tuple[int, ...]]] = []

        def note(self, part: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            self.seen.append((part, tuple(inputs[0].shape)))

    encoder, method, bound = two_layers(minilm), Recorder(), Recorder()
    first, second = encoder.model.layers
    first.register_forward_hook(method.note)
    second.register_forward_hook(partial(Recorder.note, bound))
    encoder.encode(["one text", "two text"])
    assert method.seen == [(first, (2, 4, 36))]
    assert bound.seen == [(second, (2, 4, 36))]


PARTS = """embeddings embeddings.position embeddings.norm layers.1 layers.0.attention layers.1.attention.key
layers.0.attention.dropout layers.1.attention_norm layers.0.feed_forward layers.1.feed_forward.up"""


@pytest.mark.parametrize("name", PARTS.split())
def test_hooks_are_called(minilm: Path, name: str) -> None:
    """Whenever they are put there, and what they return counts, as in the reference."""
    encoder, texts = two_layers(minilm), ["one text", "and another one"]
    before = encoder.encode(texts, convert_to_tensor=True)

    def negate(_: nn.Module, inputs: object, output: Any) -> Any:
        return (-output[0], output[1]) if isinstance(output, tuple) else -output

    hook = encoder.model.get_submodule(name).register_forward_hook(negate)
    after = encoder.encode(texts, convert_to_tensor=True)
    assert relative(after, before) > 1e-3
    assert relative(after, reference(encoder, texts)) < 1e-6
    hook.remove()
    assert torch.equal(encoder.encode(texts, convert_to_tensor=True), before)


def test_a_part_that_was_taken_out(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    expected = encoder.encode("one text")
    encoder.model.pooler = None
    np.testing.assert_array_equal(encoder.encode("one text"), expected)


def test_two_types_of_one_model_in_two_threads(minilm: Path) -> None:
    model, tokenizer = BertModel.from_pretrained(minilm), Tokenizer.from_pretrained(minilm)
    encoders = [SentenceEncoder(model, tokenizer, dtype=dtype) for dtype in (None, torch.bfloat16)]
    texts = [text(words, words) for words in range(1, 9)]
    expected = [encoder.encode(texts) for encoder in encoders]
    with ThreadPoolExecutor(4) as pool:
        for i, embeddings in enumerate(pool.map(lambda i: encoders[i % 2].encode(texts), range(12))):
            np.testing.assert_array_equal(embeddings, expected[i % 2])


@needs_onednn
def test_short_and_long_texts_in_two_threads(minilm: Path) -> None:
    """Their attention goes through different libraries, and which one is the whole process's setting."""
    encoder = SentenceEncoder.from_pretrained(minilm)
    texts = [[text(words, words) for words in lengths] for lengths in (range(20, 60, 4), range(80, 120, 4))]
    expected = [encoder.encode(each) for each in texts]
    with ThreadPoolExecutor(4) as pool:
        for i, embeddings in enumerate(pool.map(lambda i: encoder.encode(texts[i % 2]), range(12))):
            np.testing.assert_array_equal(embeddings, expected[i % 2])


def test_a_batch_says_what_is_wrong_with_it() -> None:
    config = BertConfig(vocab_size=10, max_position_embeddings=4)
    with pytest.raises(ValueError, match=r"input_ids\[2\] is 10, it must be from 0 to 9"):
        PackedBatch.from_rows([[1, 2], [10, 3]], config, CPU)
    with pytest.raises(ValueError, match="input_ids is 5 tokens long, this model has positions for 4"):
        PackedBatch.from_rows([[1] * 5], config, CPU)


@pytest.mark.parametrize(("hidden_size", "budget"), [(36, 4096), (384, 4096), (768, 2048), (1024, 1536)])
def test_batches_fit_the_caches(hidden_size: int, budget: int) -> None:
    config = BertConfig(
        vocab_size=10, hidden_size=hidden_size, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    fast = FastModel(BertModel(config))
    with torch.no_grad():
        batches = [len(batch) for batch, _, _ in fast_inference.run_texts(fast, [[7] * 7] * 1000)]
    assert batches[0] == budget // 7
    assert sum(batches) == 1000


@pytest.mark.parametrize(
    ("tokens", "rows"), [(2, 2), (65, 80), (497, 512), (511, 512), (513, 576), (2047, 2048)]
)
def test_batches_come_in_few_sizes(tokens: int, rows: int) -> None:
    """Else oneDNN would keep code for each size that a million sentences bring."""
    batch = PackedBatch.from_rows([[7] * tokens], BertConfig(max_position_embeddings=5000), CPU)
    assert len(batch.input_ids) == len(batch.position_ids) == rows


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [
        (12, 99, (12, [0])),
        (12, 8, (6, [0, 6])),
        (13, 99, (7, [0, 6])),
        (1, 0, (1, [0])),
        (3, 0, (1, [0, 1, 2])),
        (9, 5, (5, [0, 4])),
        (300, 999, (160, [0, 140])),
        (300, 150, (112, [0, 112, 188])),
    ],
)
def test_attention_comes_in_few_sizes(total: int, most: int, expected: tuple[int, list[int]]) -> None:
    assert even_pieces(total, most) == expected


def test_pieces_cover_everything() -> None:
    for total, most in itertools.product(range(1, 400), range(90)):
        size, starts = even_pieces(total, most)
        assert size <= max(most, 1)
        assert size.bit_length() <= 3 or size % 2 ** (size.bit_length() - 3) == 0
        assert set().union(*(range(start, start + size) for start in starts)) == set(range(total))


def test_packing_keeps_positions_and_order(minilm: Path) -> None:
    model = BertModel.from_pretrained(minilm)
    rows = [[101, *[2000] * 61, 102], [101, 7592, 102], [101, 2088, 102], [101, 102]]
    batch = PackedBatch.from_rows(rows, model.config, CPU)
    assert batch.packing.runs == ((1, 63), (2, 3), (1, 2))
    assert batch.position_ids.tolist() == [*range(63), 0, 1, 2, 0, 1, 2, 0, 1] + 9 * [0]
    assert batch.packing.filling == 9
    assert batch.packing.lengths.tolist() == [63, 3, 3, 2]
    hidden = run(FastModel(model), batch)
    with torch.no_grad():
        for row, ours in zip(rows, torch.split(hidden[:71], [63, 3, 3, 2]), strict=True):
            torch.testing.assert_close(ours, model(torch.tensor([row])).last_hidden_state[0], atol=1e-5, rtol=0)


# --------------------------------------------------------- what runs on a GPU, as far as a CPU can tell


def varlen_by_mask(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *rest: object, scale: float, num_splits: int = 1
) -> Tensor:
    """What varlen_attn computes (tokens, N, D), by a mask over all pairs of tokens."""
    text = torch.bucketize(torch.arange(len(query)), starts[1:].long(), right=True)  # (tokens,)
    scores = torch.einsum("qnd,knd->nqk", query, key) * scale
    weights = scores.masked_fill(text[:, None] != text, -torch.inf).softmax(-1)
    return torch.einsum("nqk,knd->qnd", weights, value)


def batches(config: BertConfig) -> Iterator[PackedBatch]:
    generator = torch.Generator().manual_seed(0)
    for lengths in ([5], [9, 9, 4], [31, 7, 7, 7, 2, 2], [3] * 11, [8], [64, 2], [2] * 64):
        rows = [torch.randint(999, 2000, (n,), generator=generator).tolist() for n in lengths]
        yield PackedBatch.from_rows(rows, config, CPU)


def test_varlen_attention_is_the_same_model(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    fast = FastModel(BertModel.from_pretrained(minilm))
    for batch in batches(fast.config):
        with torch.no_grad():
            ours = run_varlen(
                fast, batch.input_ids, batch.position_ids, batch.packing.starts, batch.packing.longest
            )
            texts = slice(batch.packing.starts[-1])  # not the filling
            torch.testing.assert_close(ours[texts], run(fast, batch)[texts], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_two_graphs_serve_every_batch(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: False)  # as on a GPU
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run_varlen, fullgraph=True, dynamic=True, backend=counter)
    fast = FastModel(BertModel.from_pretrained(minilm), layers=2)
    for batch in batches(fast.config):
        with torch.no_grad():
            ours = compiled(
                fast, batch.input_ids, batch.position_ids, batch.packing.starts, batch.packing.longest
            )
            texts = slice(batch.packing.starts[-1])  # not the filling
            torch.testing.assert_close(ours[texts], run(fast, batch)[texts], atol=2e-5, rtol=0)
    assert counter.frame_count <= 2  # one text, and several
    for graph in counter.graphs:
        given = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        weights = [value.shape for value in given if isinstance(value, Tensor) and value.is_floating_point()]
        assert all(type(size) is int for shape in weights for size in shape)  # only tokens and texts vary
        assert torch.Size([1152, 384]) in weights


@pytest.mark.slow
def test_many_kinds_of_models_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes two graphs, of which torch allows eight, and here three, unless it is told otherwise."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: False)  # as on a GPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    fast_inference._compiled.cache_clear()
    torch._dynamo.reset()
    for heads in (1, 2):
        config = BertConfig(
            vocab_size=2000,
            hidden_size=8 * heads,
            num_attention_heads=heads,
            num_hidden_layers=1,
            intermediate_size=7,
        )
        fast = FastModel(BertModel(config).eval())
        for batch in batches(config):
            with torch.no_grad():
                texts = slice(batch.packing.starts[-1])  # not the filling
                ours = run(fast, batch, compiled=True)[texts]
                torch.testing.assert_close(ours, run(fast, batch)[texts], atol=2e-5, rtol=0)
    fast_inference._compiled.cache_clear()
    torch._dynamo.reset()


def test_compiling_needs_a_gpu(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm, dtype=torch.bfloat16, compile=True)
    with pytest.raises(ValueError, match="compile=True needs a GPU"):
        encoder.encode("a sentence")


def test_few_numbers_of_tokens_reach_a_gpu() -> None:
    cuda = torch.device("cuda")
    filled = {Packing.of([n], cuda, fill=True).filling + n for n in range(1, 600)}
    assert filled == {256, 512, 768}
    assert Packing.of([7], cuda).filling == 0


def test_the_default_device_does_not_matter(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    expected = encoder.encode(["a sentence", "and another"])
    with torch.device("meta"):
        np.testing.assert_array_equal(encoder.encode(["a sentence", "and another"]), expected)


@pytest.mark.parametrize(("hidden_size", "budget"), [(32, 65536), (384, 65536), (768, 32768), (1024, 24576)])
def test_a_gpu_gets_larger_batches(hidden_size: int, budget: int) -> None:
    assert (
        fast_inference.token_budget(
            BertConfig(hidden_size=hidden_size, num_attention_heads=4), torch.device("cuda")
        )
        == budget
    )


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "head_size", "expected"),
    [
        ("cuda", (9, 0), torch.bfloat16, 64, True),
        ("cuda", (8, 0), torch.float16, 256, True),
        ("cuda", (7, 5), torch.float16, 64, False),
        ("cuda", (9, 0), torch.float32, 64, False),
        ("cuda", (9, 0), torch.bfloat16, 12, False),
        ("cuda", (9, 0), torch.bfloat16, 264, False),
        ("cpu", (9, 0), torch.bfloat16, 64, False),
    ],
)
def test_where_one_kernel_attends_to_all_lengths(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_size: int,
    expected: bool,
) -> None:
    monkeypatch.setattr(fast_attention, "HAS_VARLEN", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert fast_attention.has_varlen(torch.device(device), dtype, head_size) is expected


@pytest.mark.parametrize(("n", "width"), [(1, 1), (5, 2), (3, 37), (7, 384), (0, 36)])
def test_vectors_of_length_one_on_a_gpu(n: int, width: int) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(n, width)
    torch.testing.assert_close(sentence_encoder._divide_by_length(vectors), F.normalize(vectors, dim=1))
    assert torch.equal(sentence_encoder._divide_by_length(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore:.*texts cut to 512 tokens")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # in torch's compiler
@pytest.mark.gpu
@pytest.mark.parametrize("size", ["MiniLM", "two layers of bert-base's"])
@pytest.mark.parametrize(
    ("dtype", "compiled"), [(None, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_on_a_gpu(
    minilm: Path, monkeypatch: pytest.MonkeyPatch, size: str, dtype: torch.dtype | None, compiled: bool
) -> None:
    """Faithful, and in bfloat16, unless it is compiled, the same bits in any batch."""
    texts = varied_texts(200)
    model = BertModel.from_pretrained(minilm)
    if size != "MiniLM":
        torch.manual_seed(0)
        model = BertModel(BertConfig(num_hidden_layers=2)).eval()
    tokenizer = Tokenizer.from_pretrained(minilm)
    tokenizer.max_length = 512
    wide = SentenceEncoder(model, tokenizer, normalize_embeddings=True).encode(texts)
    encoder = SentenceEncoder(model, tokenizer, normalize_embeddings=True, dtype=dtype, compile=compiled).cuda()
    together = encoder.encode(texts)
    assert (together * wide).sum(1).min() > (0.9999 if dtype else 0.999999)
    if dtype and not compiled:
        np.testing.assert_array_equal(np.stack([encoder.encode(each) for each in texts]), together)
        np.testing.assert_array_equal(encoder.encode(texts[::-1], batch_size=7)[::-1], together)
        monkeypatch.setitem(fast_inference.TOKEN_BUDGET, "cuda", 777)
        np.testing.assert_array_equal(encoder.encode(texts), together)
