"""The encoder's pieces one by one, smallest first: the first failure names the piece that is wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minibert import BertModel
from minibert.attention import ATTENTION_FUNCTIONS, expand_mask
from minibert.layers import EncoderLayer
from minibert.parity import difference
from tests.parity.conftest import load_both

Pair = tuple[BertModel, Any]


@pytest.fixture(params=["tiny", "minilm"])
def pair(request: pytest.FixtureRequest, attention: str) -> Pair:
    return load_both(request.getfixturevalue(request.param), attention)


@pytest.fixture
def hidden(pair: Pair) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 13, pair[0].config.hidden_size, generator=generator)


@pytest.fixture
def mask() -> Tensor:
    mask = torch.rand(3, 13, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    return mask


def reference_mask(pair: Pair, mask: Tensor) -> Tensor:
    """The mask in the form transformers' layers take: additive for eager, boolean for SDPA."""
    wide = mask[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    if pair[0].attention == "sdpa":
        return wide
    return torch.zeros(()).where(wide, torch.finfo(torch.float32).min)


def first_layer(pair: Pair) -> EncoderLayer:
    layer = pair[0].layers[0]
    assert isinstance(layer, EncoderLayer)
    return layer


def assert_same(piece: str, ours: Tensor, reference: Tensor) -> None:
    found = difference(piece, ours, reference)
    assert found.ulps == 0, str(found)


def test_1_embeddings(pair: Pair) -> None:
    ours, reference = pair
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ours.config.vocab_size, (3, 13), generator=generator)
    types = torch.randint(ours.config.type_vocab_size, (3, 13), generator=generator)
    expected = reference.embeddings(input_ids=ids, token_type_ids=types)
    assert_same("embeddings", ours.embeddings(ids, types), expected)


def test_2_attention(pair: Pair, hidden: Tensor, mask: Tensor) -> None:
    ours, reference = first_layer(pair), pair[1].encoder.layer[0].attention
    context, weights = ours.attention(hidden, expand_mask(mask), ATTENTION_FUNCTIONS[pair[0].attention])
    expected, expected_weights = reference.self(hidden, reference_mask(pair, mask))
    if weights is not None:
        assert_same("attention weights", weights, expected_weights)
    assert_same("attention output", context, reference.output.dense(expected))


def test_3_feed_forward(pair: Pair, hidden: Tensor) -> None:
    ours, reference = first_layer(pair), pair[1].encoder.layer[0]
    expected = reference.output(reference.intermediate(hidden), hidden)
    assert_same("feed-forward", ours.feed_forward_norm(ours.feed_forward(hidden) + hidden), expected)


def test_4_layer(pair: Pair, hidden: Tensor, mask: Tensor) -> None:
    ours, reference = first_layer(pair), pair[1].encoder.layer[0]
    output, _ = ours(hidden, expand_mask(mask), ATTENTION_FUNCTIONS[pair[0].attention])
    assert_same("layer 0", output, reference(hidden, reference_mask(pair, mask)))


def test_5_pooler(pair: Pair, hidden: Tensor) -> None:
    ours, reference = pair
    assert ours.pooler is not None
    assert_same("pooler", ours.pooler(hidden), reference.pooler(hidden))


def test_6_model(pair: Pair, mask: Tensor) -> None:
    ours, reference = pair
    ids = torch.randint(ours.config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        output, expected = ours(ids, mask), reference(ids, mask)
    assert_same("last_hidden_state", output.last_hidden_state, expected.last_hidden_state)
