"""Published and committed numbers; no transformers needed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minibert import BertModel, SentenceEncoder
from weights.hub import on_disk

GOLDENS: dict[str, Any] = json.loads(Path(__file__).with_name("goldens").joinpath("minilm.json").read_text())
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-5}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_minilm(minilm: Path, attention: str) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm, attention=attention)
    batch = encoder.tokenizer(GOLDENS["texts"])
    assert batch["input_ids"].tolist() == GOLDENS["input_ids"]
    assert batch["attention_mask"].tolist() == GOLDENS["attention_mask"]
    with torch.no_grad():
        output = encoder.model(**batch, output_hidden_states=True, output_attentions=attention == "eager")
    hidden = torch.stack([h[:, 1, 1:5] for h in output.hidden_states])
    torch.testing.assert_close(hidden, torch.tensor(GOLDENS["hidden_states[:][:, 1, 1:5]"]), **CLOSE)
    pooled = torch.tensor(GOLDENS["pooler_output[:, 1:5]"])
    torch.testing.assert_close(output.pooler_output[:, 1:5], pooled, **CLOSE)
    long = torch.tensor(GOLDENS["last_hidden_state[4, ::7, 1:5]"])
    torch.testing.assert_close(output.last_hidden_state[4, ::7, 1:5], long, **CLOSE)
    if attention == "eager":
        maps = torch.stack([a[:3, 1:4, 2, 3] for a in output.attentions])
        torch.testing.assert_close(maps, torch.tensor(GOLDENS["attentions[:][:3, 1:4, 2, 3]"]), **CLOSE)
    for name, normalize in (("embeddings", True), ("means", False)):
        vectors = encoder.encode(GOLDENS["texts"], normalize_embeddings=normalize, convert_to_tensor=True)
        torch.testing.assert_close(vectors[:, :8], torch.tensor(GOLDENS[f"{name}[:, :8]"]), **CLOSE)
    with pytest.warns(UserWarning, match="1 of 1 texts cut to 256 tokens"):
        of_long = encoder.encode(GOLDENS["long text"], convert_to_tensor=True)
    torch.testing.assert_close(of_long[:8], torch.tensor(GOLDENS["long text's embedding[:8]"]), **CLOSE)
    left = [torch.tensor(GOLDENS[f"left-padded {name}"]) for name in ("input_ids", "attention_mask")]
    with torch.no_grad():
        of_left = encoder.model(*left).last_hidden_state
    expected = torch.tensor(GOLDENS["left-padded last_hidden_state[:, -4, 1:5]"])
    torch.testing.assert_close(of_left[:, -4, 1:5], expected, **CLOSE)
    pair = [torch.tensor(GOLDENS[f"pair's {name}"]) for name in ("input_ids", "token_type_ids")]
    with torch.no_grad():
        of_pair = encoder.model(pair[0], token_type_ids=pair[1])
    second = torch.tensor(GOLDENS["pair's last_hidden_state[0, ::3, 1:5]"])
    torch.testing.assert_close(of_pair.last_hidden_state[0, ::3, 1:5], second, **CLOSE)
    pooled = torch.tensor(GOLDENS["pair's pooler_output[0, 1:5]"])
    torch.testing.assert_close(of_pair.pooler_output[0, 1:5], pooled, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert_base_uncased(attention: str) -> None:
    """transformers' own integration test of the published weights."""
    directory = on_disk("bert-base-uncased")
    if directory is None:
        pytest.skip("bert-base-uncased is not on this disk (python -m minibert fetch)")
    model = BertModel.from_pretrained(directory, attention=attention)
    ids = torch.tensor([[0, 345, 232, 328, 740, 140, 1695, 69, 6078, 1588, 2]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        hidden = model(ids, mask).last_hidden_state
    expected = torch.tensor([[0.4249, 0.1008, 0.7531], [0.3771, 0.1188, 0.7467], [0.4152, 0.1098, 0.7108]])
    torch.testing.assert_close(hidden[0, 1:4, 1:4], expected, rtol=0, atol=1e-4)
