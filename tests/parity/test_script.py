"""`encode` against what a script with transformers would write: tokenizer, AutoModel, masked mean."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from minibert import SentenceEncoder

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast brown animal leaps above a sleepy dog.",
    "The sky is blue and clear today.",
]


def encode_sentences(directory: Path, sentences: list[str]) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory)
    encoded_input = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        token_embeddings = model(**encoded_input).last_hidden_state
    attention_mask = encoded_input["attention_mask"]
    input_mask_expanded = attention_mask.unsqueeze(-1).expand(token_embeddings.size()).float()
    return torch.sum(token_embeddings * input_mask_expanded, dim=1) / torch.clamp(
        input_mask_expanded.sum(dim=1), min=1e-9
    )


def test_the_encoder_equals_the_script(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    expected = encode_sentences(minilm, SENTENCES)  # (3, H)
    with torch.no_grad():
        assert torch.equal(encoder(**encoder.tokenizer(SENTENCES)), expected)
    fast = encoder.encode(SENTENCES, normalize_embeddings=False, convert_to_tensor=True)  # not padded
    assert ((fast - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-6
