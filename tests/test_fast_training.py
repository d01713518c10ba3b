"""`attention="packed"` and `train.py --fast`: the reference's gradients to rounding, without padding."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train
from heads import MLPHead, MultiTaskModel
from minibert import BertModel, fast_training
from minibert.fast_inference import uses_onednn
from minibert.fast_training import OneDnnLinear, OneDnnLinears
from tests.conftest import save_small

needs_onednn = pytest.mark.skipif(not uses_onednn(torch.zeros(1)), reason="oneDNN is not used here")
PLAIN = pytest.param(nullcontext, id="MKL")
ONEDNN = pytest.param(OneDnnLinears, id="oneDNN", marks=needs_onednn)


def batch(kind: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(13, 37, dtype=torch.int64)
    for row in range(13):
        length = int(torch.randint(1, 38, (), generator=generator))
        mask[row, :length] = 1
    if kind == "left":
        mask = mask.flip(1)
    elif kind == "random":  # also a text without any token
        mask = (torch.rand(13, 37, generator=generator) < 0.5).long()
        mask[5] = 0
    elif kind == "full":
        mask[:] = 1
    ids = torch.randint(1000, 20000, (13, 37), generator=generator)
    types = torch.randint(0, 2, (13, 37), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64, 5, 7), (100, 39, 37), (129, 64, 128)])
def test_the_three_products(shape: tuple[int, int, int], bias: bool) -> None:
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    exact = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    wide = [each.double().requires_grad_() for each in exact]
    narrow = [each.requires_grad_() for each in exact]
    gradient = torch.randn(rows, outputs)
    expected = torch.nn.functional.linear(wide[0], wide[1], wide[2] if bias else None)
    expected.backward(gradient.double())  # type: ignore[no-untyped-call]
    ours = OneDnnLinear.apply(narrow[0], narrow[1], narrow[2] if bias else None)  # type: ignore[no-untyped-call]
    ours.backward(gradient)
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)
    for a, b in zip(narrow[: 3 if bias else 2], wide, strict=False):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("products", [PLAIN, ONEDNN])
@pytest.mark.parametrize("kind", ["right", "left", "random", "full"])
@pytest.mark.parametrize("frozen", [0, 4])
def test_gradients_agree_with_the_padded_reference(
    minilm: Path, products: type[AbstractContextManager[object]], kind: str, frozen: int
) -> None:
    inputs = batch(kind, seed=frozen)
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for attention, context in (("sdpa", nullcontext()), ("packed", products())):
        encoder = BertModel.from_pretrained(minilm, attention=attention)
        torch.manual_seed(0)
        model = MultiTaskModel(encoder, {"a": MLPHead(384, 256, 3), "b": MLPHead(384, 128, 2)}).eval()
        for part in [encoder.embeddings, *encoder.layers[:frozen]] if frozen else []:
            part.requires_grad_(False)
        with context:
            logits = model(**inputs).logits
        rows = inputs["attention_mask"].sum(1) > 0  # of an empty text the reference's layers make something
        loss = sum(each[rows].logsumexp(-1).sum() - each[rows, 0].sum() for each in logits.values())
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((torch.cat(list(logits.values()), 1)[rows], gradients))
    (expected, reference), (ours, fast) = results
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert fast.keys() == reference.keys()
    for name, gradient in fast.items():
        # softmax does not see what is added to all keys alike: the gradient of their bias is rounding
        scale = reference[name.replace("key.bias", "query.bias")].norm()
        assert (gradient - reference[name]).norm() <= 1e-5 * scale, name


def test_what_the_mask_hides_is_zero_and_is_not_read(minilm: Path) -> None:
    model = BertModel.from_pretrained(minilm, attention="packed")
    inputs = batch("random", 0)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)
        assert torch.equal(model(**inputs).last_hidden_state, hidden)
    assert (hidden[inputs["attention_mask"] == 0] == 0).all()
    assert (hidden[inputs["attention_mask"] == 1].abs().amax(-1) > 0).all()


# -------------------------------------------------------------------------------------------- train.py


@pytest.fixture(scope="module")
def no_dropout(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return save_small(
        tmp_path_factory.mktemp("models") / "model",
        minilm,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def run(model: Path, output: Path, options: str) -> list[dict[str, Any]]:
    command = f"--model {model} --data dummy --epochs 3 --batch-size 48 --output {output} {options}"
    assert train.main(command.split()) == 0
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("onednn", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("freeze", ["none", "layers:1", "backbone"])
def test_fast_runs_learn_the_same(
    no_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: str, onednn: bool
) -> None:
    monkeypatch.setattr(train, "mkl_is_slow", lambda: onednn)
    reference = run(no_dropout, tmp_path / "reference", f"--freeze {freeze}")
    fast = run(no_dropout, tmp_path / "fast", f"--freeze {freeze} --fast")
    assert len(fast) == len(reference)
    for ours, theirs in zip(fast, reference, strict=True):
        for task, loss in theirs.get("losses", {}).items():
            assert ours["losses"][task] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("cpu", "slow"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\n", False),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", False),
        ("", False),
    ],
)
def test_which_cpus_mkl_is_slow_on(cpu: str, slow: bool) -> None:
    assert fast_training.multiplies_in_halves(cpu) == slow
