"""What `minibert.parity` says of two tensors, and of two outputs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minibert import BertConfig
from minibert.parity import Difference, difference, differences, random_inputs, run

A = torch.linspace(-3, 3, 24).view(2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_place_of_the_largest_and_its_ulps(dtype: torch.dtype) -> None:
    """Nearer to 0 a smaller difference is more ulps; those are not what is said of another place."""
    ours, reference = A.to(dtype), A.to(dtype).clone()
    step = torch.finfo(dtype).eps * 2  # from 2 to 4
    reference[1, 2, 3] = 3 - 2 * step
    reference[0, 2, 3] += step / 2  # -0.13
    found = difference("x", ours, reference)
    assert (found.largest, found.ulps, found.index) == (2 * step, 2, (1, 2, 3))
    assert str(found) == f"x: differs by up to {2 * step:.3g} (2 ulp) at [1, 2, 3]"
    assert str(difference("x", ours, ours.clone())) == "x: all bits equal"


def test_far_apart() -> None:
    """In float64 more ulps than int64 holds; what is infinite in both is equal, a nan never is."""
    a = torch.tensor([torch.inf, 2.0], dtype=torch.float64)
    assert difference("x", a, a * torch.tensor([1, -1])).ulps == 2 * 0x4000000000000000
    assert difference("x", a, a * torch.tensor([1, -1])).index == (1,)
    a[0] = torch.nan
    assert str(difference("x", a, a)) == "x: differs by up to nan (1 ulp) at [0]"


def test_arrays() -> None:
    """Of whatever dtype: masks are compared, too."""
    assert difference("x", A, A.numpy()).ulps == 0
    assert difference("x", A, np.broadcast_to(A.numpy(), A.shape)).ulps == 0  # which cannot be written to
    backwards = np.flip(A.numpy()).copy()
    assert difference("x", A, backwards[::-1, ::-1, ::-1]).ulps == 0
    assert difference("mask", np.array([True, False]), np.array([True, True])).index == (1,)
    with pytest.raises(
        ValueError, match=r"x: ours is torch.float64 \(4,\), the reference torch.float32 \(2, 3, 4\)"
    ):
        difference("x", np.zeros(4), A)
    with pytest.raises(ValueError, match=r"x: ours is torch.bfloat16 \(2, 3, 4\), the reference torch.float32"):
        difference("x", A.bfloat16(), A)


def output(**others: Any) -> SimpleNamespace:
    """Two layers."""
    states = {
        "last_hidden_state": A,
        "pooler_output": A[:, 0],
        "hidden_states": (A, A, A),
        "attentions": (A, A),
    }
    return SimpleNamespace(**states | others)


def test_all_that_ours_has_is_compared() -> None:
    pieces = [found.piece for found in differences(output(), output())]
    layers = ["attention map 0", "layer 0", "attention map 1", "layer 1"]
    assert pieces == ["embeddings", *layers, "last_hidden_state", "pooler_output"]
    found = differences(output(hidden_states=None), output(attentions=(A, A + 1)))
    assert [d.piece for d in found if d.ulps] == ["attention map 1"]
    assert len(differences(output(attentions=None, pooler_output=None), output())) == 4
    with pytest.raises(ValueError, match=r"ours, a torch.Tensor, has no last_hidden_state or other piece"):
        differences(A, A)


@pytest.mark.parametrize("name", ["hidden_states", "attentions", "pooler_output"])
def test_what_the_reference_lacks(name: str) -> None:
    has = getattr(output(), name)
    count = len(has) if isinstance(has, tuple) else 1
    with pytest.raises(ValueError, match=f"{name}: ours are {count}, the reference's 0"):
        differences(output(), output(**{name: None}))
    if count > 1:
        with pytest.raises(ValueError, match=f"{name}: ours are {count}, the reference's {count - 1}"):
            differences(output(), output(**{name: has[1:]}))
        with pytest.raises(ValueError, match=f"{name}: ours are {count - 1}, the reference's {count}"):
            differences(output(**{name: has[1:]}), output())


@pytest.mark.parametrize(("types", "share"), [(0, 1), (1, 1), (2, 2)])
def test_batches_of_several_token_types(types: int, share: int) -> None:
    batches = dict(random_inputs(BertConfig(vocab_size=97, type_vocab_size=types)))
    mixed = [inputs["token_type_ids"] for inputs in batches.values() if "token_type_ids" in inputs]
    assert len(batches) == 10 * share
    assert len(mixed) == 10 * (share - 1)
    assert all(set(ids.flatten().tolist()) <= {0, 1} for ids in mixed)


def test_one_batch_that_differs_is_enough(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = iter([[Difference("layer 0", 0.5, 3, (1, 2))]])
    monkeypatch.setattr("minibert.parity.differences", lambda *_: next(found, []))
    assert run(str(tiny)) == 1
    assert capsys.readouterr().out.count("first layer 0: differs by up to 0.5 (3 ulp) at [1, 2]") == 1
