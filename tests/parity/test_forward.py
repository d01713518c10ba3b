"""Every output of the encoder equals transformers' to the last bit."""

from pathlib import Path

import pytest
import torch

from minibert.parity import differences, random_inputs
from tests.conftest import TINY_DISTILBERT, save_random, save_random_bert
from tests.parity.conftest import load_both


def assert_equal_outputs(
    directory: Path, attention: str, dtype: torch.dtype = torch.float32, seed: int = 0
) -> None:
    ours, reference = load_both(directory, attention, dtype)
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    unequal = []
    for name, inputs in random_inputs(ours.config, seed):
        with torch.no_grad():
            found = differences(ours(**inputs, **asked), reference(**inputs, **asked))
        per_layer = 2 if attention == "eager" else 1  # hidden state, attention map
        assert len(found) == 2 + per_layer * ours.config.num_hidden_layers + (ours.pooler is not None)
        first = next((d for d in found if d.ulps), None)
        if first is not None:
            unequal.append(f"{name}: first {first}")
    assert not unequal, "\n".join(unequal)


def test_outputs_equal(directory: Path, attention: str) -> None:
    assert_equal_outputs(directory, attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("model", ["tiny", pytest.param("minilm", marks=pytest.mark.slow)])
def test_outputs_equal_in_other_dtypes(
    model: str, dtype: torch.dtype, attention: str, request: pytest.FixtureRequest
) -> None:
    assert_equal_outputs(request.getfixturevalue(model), attention, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_width_equal_in_other_dtypes(base_width: Path, dtype: torch.dtype, attention: str) -> None:
    assert_equal_outputs(base_width, attention, dtype)


@pytest.mark.parametrize("seed", range(1, 6))
def test_other_seeds(tiny: Path, attention: str, seed: int) -> None:
    assert_equal_outputs(tiny, attention, seed=seed)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "silu"},
        {"num_attention_heads": 1, "layer_norm_eps": 1e-5},
        {"num_attention_heads": 36, "num_hidden_layers": 5},
        {"type_vocab_size": 1, "intermediate_size": 1},
        {"pad_token_id": 7, "max_position_embeddings": 2},
    ],
    ids=str,
)
def test_other_configs(fields: dict[str, object], attention: str, tmp_path: Path) -> None:
    small = {
        "vocab_size": 41, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 1,
        "intermediate_size": 29, "max_position_embeddings": 17,
    }  # fmt: skip
    assert_equal_outputs(save_random_bert(tmp_path, **(small | fields)), attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distilbert(attention: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    directory = save_random(DistilBertModel, DistilBertConfig(**TINY_DISTILBERT), tmp_path)
    assert_equal_outputs(directory, attention, dtype)
