"""Gradients, dropout and AdamW steps equal transformers' to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minibert import BertModel
from minibert.parity import difference
from tests.conftest import TINY_DISTILBERT, save_random
from tests.parity.conftest import load_both
from weights.key_maps import FAMILIES

Batch = dict[str, Tensor]


def batch(config: Any, seed: int = 0) -> Batch:
    """Ids (pad_token_id among them), a mask with holes and, if the model has them, both token types."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3, min(13, config.max_position_embeddings))
    mask = torch.rand(shape, generator=generator) < 0.7
    mask[:, 0] = True
    inputs = {"input_ids": torch.randint(config.vocab_size, shape, generator=generator), "attention_mask": mask}
    inputs["input_ids"][0, 1] = config.pad_token_id
    if config.type_vocab_size:
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, shape, generator=generator)
    return inputs


def loss_of(output: Any, seed: int = 0) -> Tensor:
    """A scalar on which every output element has its own weight."""
    generator = torch.Generator().manual_seed(seed)
    hidden: Tensor = output.last_hidden_state
    loss = (hidden * torch.randn(hidden.shape, generator=generator).to(hidden)).sum()
    pooled = getattr(output, "pooler_output", None)
    if pooled is not None:
        loss = loss + (pooled * torch.randn(pooled.shape, generator=generator).to(pooled)).sum()
    return loss


def step(model: nn.Module, inputs: Batch, training: bool, seed: int) -> Tensor:
    model.train(training)
    torch.manual_seed(seed)
    loss = loss_of(model(**inputs))
    torch.autograd.backward(loss)
    return loss.detach()


def assert_same(ours: BertModel, reference: Any, what: str) -> None:
    family = FAMILIES[ours.config.model_type]
    theirs = dict(reference.named_parameters())
    unequal = []
    for name, parameter in ours.named_parameters():
        other = theirs.pop(family.to_published(name))
        pair = (parameter.grad, other.grad) if what == "gradient" else (parameter, other)
        assert pair[0] is not None
        assert pair[1] is not None, f"transformers gives {name} no {what}"
        found = difference(f"{what} of {name}", pair[0], pair[1])
        if found.ulps:
            unequal.append(str(found))
    assert not theirs
    assert not unequal, "\n".join(unequal)


def assert_same_training(
    directory: Path, attention: str, dtype: torch.dtype, training: bool, steps: int = 20
) -> None:
    ours, reference = load_both(directory, attention, dtype)
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.1, fused=True) for m in (ours, reference)
    ]
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for i in range(steps):
        inputs = batch(ours.config, seed=i)
        losses = [step(model, inputs, training, seed=i) for model in (ours, reference)]
        assert torch.equal(*losses), f"step {i}: the losses are {losses}"
        if i == 0:  # later ones are in the parameters that are compared at the end
            assert_same(ours, reference, "gradient")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, reference, "value")
    if dtype != torch.bfloat16:  # where a step can be less than half an ulp
        assert all(not torch.equal(before[name], p) for name, p in ours.named_parameters())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tiny(tiny: Path, attention: str, dtype: torch.dtype, training: bool) -> None:
    assert_same_training(tiny, attention, dtype, training)


@pytest.mark.slow
@pytest.mark.parametrize(("training", "steps"), [(False, 2), (True, 20)], ids=["eval", "dropout"])
def test_minilm(minilm: Path, attention: str, training: bool, steps: int) -> None:
    assert_same_training(minilm, attention, torch.float32, training, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("training", "steps"), [(False, 2), (True, 5)], ids=["eval", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_minilm_in_other_dtypes(
    minilm: Path, attention: str, dtype: torch.dtype, training: bool, steps: int
) -> None:
    assert_same_training(minilm, attention, dtype, training, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "training", "steps"),
    [("sdpa", False, 2), ("sdpa", True, 20), ("eager", False, 2), ("eager", True, 3)],
    ids=["sdpa-eval", "sdpa-dropout", "eager-eval", "eager-dropout"],
)
def test_base_size(base_size: Path, attention: str, training: bool, steps: int) -> None:
    assert_same_training(base_size, attention, torch.float32, training, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("training", "steps"), [(False, 1), (True, 3)], ids=["eval", "dropout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_base_width_in_other_dtypes(
    base_width: Path, attention: str, dtype: torch.dtype, training: bool, steps: int
) -> None:
    assert_same_training(base_width, attention, dtype, training, steps)


def test_distilbert(attention: str, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    directory = save_random(DistilBertModel, DistilBertConfig(**TINY_DISTILBERT), tmp_path)
    assert_same_training(directory, attention, torch.float32, training=True)
