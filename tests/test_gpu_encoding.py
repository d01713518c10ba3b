"""What `encode` does on a GPU: as far as a CPU can tell and, in the last test, on one."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minibert import (
    BertConfig,
    BertModel,
    SentenceEncoder,
    Tokenizer,
    fast_attention,
    fast_inference,
    onednn,
    sentence_encoder,
)
from minibert.fast_inference import FastModel, run, run_varlen
from minibert.packing import PackedBatch, Packing
from tests.fast_reference import CPU, varied_texts


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


@torch.no_grad()
def assert_same_model(fast: FastModel, run_packed: Callable[..., Tensor]) -> None:
    """`run_packed` gives what `run` does, for all batches; the filling may differ."""
    for batch in batches(fast.config):
        packing = batch.packing
        ours = run_packed(fast, batch.input_ids, batch.position_ids, packing.starts, packing.longest)
        texts = slice(packing.starts[-1])
        torch.testing.assert_close(ours[texts], run(fast, batch)[texts], atol=2e-5, rtol=0)


def test_varlen_attention_is_the_same_model(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    assert_same_model(FastModel(BertModel.from_pretrained(minilm)), run_varlen)


@pytest.mark.slow
def test_two_graphs_serve_every_batch(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: False)  # as on a GPU
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run_varlen, fullgraph=True, dynamic=True, backend=counter)
    assert_same_model(FastModel(BertModel.from_pretrained(minilm), layers=2), compiled)
    assert counter.frame_count <= 2  # one text, and several
    for graph in counter.graphs:
        given = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        weights = [value.shape for value in given if isinstance(value, Tensor) and value.is_floating_point()]
        assert all(type(size) is int for shape in weights for size in shape)  # only tokens and texts vary
        assert torch.Size([1152, 384]) in weights


@pytest.mark.slow
def test_many_kinds_of_models_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes two graphs, of which torch allows eight, and here three, unless each thread says otherwise."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_mask)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: False)  # as on a GPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 3)
    fast_inference._compiled.cache_clear()
    torch._dynamo.reset()

    def compile_two(start: int) -> None:
        torch._dynamo.config.recompile_limit = 3
        for heads in (start, start + 1):
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

    compile_two(1)
    with ThreadPoolExecutor(1) as thread:
        thread.submit(compile_two, 3).result()
    fast_inference._compiled.cache_clear()
    torch._dynamo.reset()


def test_few_numbers_of_tokens_reach_a_gpu() -> None:
    cuda = torch.device("cuda")
    filled = {Packing.of([n], cuda, fill=True).filling + n for n in range(1, 600)}
    assert filled == {256, 512, 768}
    assert Packing.of([7], cuda).filling == 0


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
