"""The fast path of `encode`: the reference's numbers to 1e-6, and the same bits whatever is in the batch."""

import copy
import csv
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from heads.tables import DEMO
from minibert import (
    BertConfig,
    BertModel,
    SentenceEncoder,
    Tokenizer,
    amx,
    fast_attention,
    fast_inference,
    onednn,
)
from minibert.attention import eager_attention
from minibert.fast_attention import even_pieces
from minibert.fast_inference import FastModel, fast_copy, run
from minibert.fused_layers import FeedForwardInParts, FusedLinear
from minibert.layers import FeedForward
from minibert.onednn import packs_weights
from minibert.packing import PackedBatch, Packing
from tests.fast_reference import (
    BFLOAT16,
    CPU,
    FUSED,
    THREADS,
    needs_bfloat16,
    needs_exact,
    needs_onednn,
    random_encoder,
    reference,
    relative,
    text,
    threads,
    varied_texts,
)

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
    return random_encoder(minilm, 39, product)  # rows that begin anywhere in a cache line


@needs_onednn
@pytest.mark.filterwarnings("ignore:.*texts cut to 256 tokens")
@pytest.mark.parametrize("exact", [pytest.param(True, marks=needs_exact), False])  # False: as with AMX
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(0, 300), min_size=1, max_size=12),
    batch_size=st.none() | st.integers(1, 13),
    budget=st.integers(1, 4000),
    count=st.sampled_from([1, 2, 3, 8]),
    seed=st.integers(0, 99),
)
def test_the_bits_do_not_depend_on_the_batch(
    encoder: SentenceEncoder,
    exact: bool,
    lengths: list[int],
    batch_size: int | None,
    budget: int,
    count: int,
    seed: int,
) -> None:
    texts = [text(words, seed + i) for i, words in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        if not exact:
            patch.setattr(onednn, "are_exact", lambda: False)
        alone = np.stack([encoder.encode(each) for each in texts])
        patch.setitem(fast_inference.TOKEN_BUDGET, "cpu", budget)
        with threads(count):
            together = encoder.encode(texts, batch_size)
            reversed_ = encoder.encode(texts[::-1], batch_size)[::-1]
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
    for count in THREADS:
        with threads(count):
            if inputs > amx.SHORT_SUM and count > fast_attention.FEW_THREADS:
                expected = linear(x)  # other bits, but still the same whatever the others are
            for rows in (1, 2, 3, 7, 16, 17, 28, 33, 64, 255, 1024):
                for start in (0, 1, 13):
                    assert torch.equal(linear(x[start : start + rows]), expected[start : start + rows])


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("heads", [1, 12])
@pytest.mark.parametrize("length", [5, 7, 12, 20, 39, 40, 65, 100, 300])
def test_attention_does_not_depend_on_the_other_texts(length: int, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    texts = 9
    states = torch.randn(3, heads, texts * length, 64).to(dtype)
    for count in THREADS:
        with threads(count), torch.inference_mode(), onednn.onednn_products():
            q, k, v = states
            together, _ = Packing(((texts, length),), CPU).attend(q, k, v, None, 0.0)
            for i in range(texts):
                q, k, v = states[..., i * length : (i + 1) * length, :]
                alone, _ = Packing(((1, length),), CPU).attend(q, k, v, None, 0.0)
                assert torch.equal(alone, together[:, i * length : (i + 1) * length])


@pytest.mark.parametrize("width", [39, 384])
def test_a_mean_does_not_depend_on_the_others(width: int) -> None:
    """Nor on the threads: 256 tokens are enough for torch to share the work out."""
    torch.manual_seed(0)
    hidden = torch.randn(6 * 256 + 13, width)
    alone = [Packing.of([256], CPU).mean(hidden[i * 256 : (i + 1) * 256]) for i in range(6)]
    alone.append(Packing.of([13], CPU).mean(hidden[-13:]))
    exact = [*hidden[:-13].double().view(6, 256, width).mean(1), hidden[-13:].double().mean(0)]
    for count in (1, 2, 3, 8):
        with threads(count):
            together = Packing.of([*[256] * 6, 13], CPU).mean(hidden)
            assert torch.equal(together, torch.cat(alone))
    torch.testing.assert_close(together, torch.stack(exact).float(), atol=1e-7, rtol=1e-6)
    half, packing = hidden.bfloat16(), Packing.of([*[256] * 6, 13], CPU)  # is summed in float32
    assert torch.equal(packing.mean(half), packing.mean(half.float()))
    assert torch.equal(packing.first(half), half[::256].float())
    assert packing.first(half).dtype == torch.float32


@pytest.mark.parametrize("act", ["gelu", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_no_number_stays_none(minilm: Path, act: str, dtype: torch.dtype | None) -> None:
    config = BertConfig(
        hidden_size=36, num_attention_heads=3, num_hidden_layers=1, intermediate_size=37, hidden_act=act
    )
    encoder = SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm), dtype=dtype)
    nn.init.constant_(encoder.model.get_parameter("layers.0.feed_forward.up.weight"), torch.nan)
    assert np.isnan(encoder.encode(["one", "another text"])).all()


@pytest.mark.parametrize("zebras", [(70,), (12, 70, 75)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_text_without_finite_numbers_leaves_others_alone(
    minilm: Path, dtype: torch.dtype, zebras: tuple[int, ...]
) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm, dtype=dtype)
    encoder.model.layers = encoder.model.layers[:2]
    zebra = encoder.tokenizer(["zebra"])["input_ids"][0, 1]
    with torch.no_grad():
        encoder.model.embeddings.word.weight[zebra] = torch.inf
    lengths = (12, 70, 75)
    texts = [f"{w} " * n for n in lengths for w in ("cat", "zebra" if n in zebras else "horse", "dog")]
    texts += [f"{'dog ' * 90} {i}" for i in range(9)]  # which come first, more of them than there are layers
    together = encoder.encode(texts)
    assert np.isnan(together).any(1).tolist() == ["zebra" in text for text in texts]
    np.testing.assert_array_equal(together, np.stack([encoder.encode(text) for text in texts]))


def test_a_token_that_no_text_has_may_be_no_number(minilm: Path) -> None:
    """Such as [PAD]: what a long text's heads are filled up with has no weight, but 0 times nan is nan."""
    encoder = SentenceEncoder.from_pretrained(minilm)
    texts = [f"{'dog ' * n}" for n in range(60, 90)]
    expected = encoder.encode(texts)
    with torch.no_grad():
        encoder.model.embeddings.word.weight[0] = torch.nan
    np.testing.assert_array_equal(encoder.encode(texts), expected)
    np.testing.assert_array_equal(np.stack([encoder.encode(text) for text in texts]), expected)


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


def test_the_default_device_does_not_matter(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    expected = encoder.encode(["a sentence", "and another"])
    with torch.device("meta"):
        np.testing.assert_array_equal(encoder.encode(["a sentence", "and another"]), expected)


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
    many = FeedForwardInParts(whole, act, dtype, 2)(hidden)  # as exact, since the sum is float32's
    assert (many - exact(hidden.double())).norm() / exact(hidden.double()).norm() < 5e-3


def test_the_copy_shares_what_it_does_not_pack(minilm: Path) -> None:
    model = BertModel.from_pretrained(minilm)
    assert fast_copy(model) is fast_copy(model)
    fast = cast(Any, fast_copy(model))
    assert fast.embeddings.word.args[0] is model.embeddings.word.weight
    assert fast.layers[0].attention_norm.keywords["weight"] is model.layers[0].attention_norm.weight  # type: ignore[union-attr]
    assert type(model.layers[0].attention.query) is nn.Linear  # type: ignore[union-attr]


@pytest.mark.parametrize(("hidden_size", "budget"), [(36, 4096), (384, 4096), (768, 2048), (1024, 1536)])
def test_batches_fit_the_caches(hidden_size: int, budget: int) -> None:
    config = BertConfig(
        vocab_size=10, hidden_size=hidden_size, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8
    )
    fast = FastModel(BertModel(config), layers=0)  # what they compute does not matter
    with torch.no_grad():
        for length in (7, 8):  # of the latter some number fills the budget
            batches = [len(batch) for batch, _, _ in fast_inference.run_texts(fast, [[7] * length] * 1000)]
            assert batches[0] == budget // length
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
    assert Packing.of([2, 5, 5, 3], CPU).longest == 5  # in whatever order
    hidden = run(FastModel(model), batch)
    with torch.no_grad():
        for row, ours in zip(rows, torch.split(hidden[:71], [63, 3, 3, 2]), strict=True):
            torch.testing.assert_close(ours, model(torch.tensor([row])).last_hidden_state[0], atol=1e-5, rtol=0)
