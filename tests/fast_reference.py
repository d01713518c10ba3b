"""A model and texts for the tests of `encode`, what `forward` gives for them, and where promises hold."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from minibert import BertConfig, BertModel, SentenceEncoder, Tokenizer, amx, fast_attention, onednn
from minibert.onednn import packs_weights

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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_encoder(minilm: Path, hidden_size: int = 36, dtype: torch.dtype | None = None) -> SentenceEncoder:
    """Two random layers of odd sizes behind the published vocabulary."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=hidden_size,
        num_attention_heads=3,
        num_hidden_layers=2,
        intermediate_size=37,
        initializer_range=0.2,
    )
    return SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm), dtype=dtype)


def text(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def varied_texts(count: int, seed: int = 0) -> list[str]:
    """Lengths from the empty text to longer than 512 tokens, most of them short, as text is."""
    rng = random.Random(seed)
    lengths = [min(int(rng.lognormvariate(2.7, 1.1)), 600) for _ in range(count - 4)]
    return [text(length, seed + i) for i, length in enumerate([0, 1, 600, 300, *lengths])]


def reference(encoder: SentenceEncoder, texts: list[str]) -> Tensor:
    """`forward`, padded, 32 at a time."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    embeddings = torch.empty(len(texts), encoder.model.config.hidden_size)
    with torch.no_grad():
        for start in range(0, len(order), 32):
            rows = order[start : start + 32]
            embeddings[rows] = encoder(**encoder.tokenizer([texts[i] for i in rows]))
    return embeddings


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of a component, relative to the embedding's norm."""
    return float(((ours - theirs).abs().amax(dim=1) / theirs.norm(dim=1)).max())
