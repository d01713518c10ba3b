"""`attention="packed"` and `train.py --fast`: the reference's gradients up to rounding, without padding."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train
from heads import MLPHead, MultiTaskModel, features
from heads.data import SentenceDataset, dummy_examples
from heads.features import fill, size_in_bytes
from heads.processes import Processes
from minibert import BertModel, Tokenizer, fast_attention, onednn, packing
from minibert.fast_dropout import FastDropout, fast_dropout, use_fast_dropout
from minibert.onednn import onednn_products
from tests.fast_reference import needs_exact
from tests.training.conftest import command, steps

PLAIN = pytest.param(nullcontext, id="MKL")
ONEDNN = pytest.param(onednn_products, id="oneDNN", marks=needs_exact)


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


@pytest.mark.parametrize("products", [PLAIN, ONEDNN])
def test_gradients_after_a_pass_without_any(products: Callable[[], AbstractContextManager[object]]) -> None:
    """As where activations are computed twice to save memory; each has an attention of its own."""
    together = packing.Packing.of([100, 100, 30], torch.device("cpu"))
    states = torch.randn(3, 230, 32, requires_grad=True)
    with products():
        with torch.no_grad():
            expected, _ = together.attend(states, states, states, None, 0.0)
        context, _ = together.attend(states, states, states, None, 0.0)
        torch.autograd.backward(context.sum())
    assert torch.allclose(context, expected, atol=1e-5)
    assert states.grad is not None
    assert states.grad.any()


@pytest.mark.parametrize(
    ("products", "device"),
    [
        pytest.param(nullcontext, "cpu", id="MKL"),
        pytest.param(onednn_products, "cpu", id="oneDNN", marks=needs_exact),
        pytest.param(nullcontext, "cuda", id="GPU", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("kind", ["right", "left", "random", "full"])
@pytest.mark.parametrize("frozen", [0, 4])
def test_gradients_agree_with_the_padded_reference(
    minilm: Path, products: Callable[[], AbstractContextManager[object]], device: str, kind: str, frozen: int
) -> None:
    inputs = {name: tensor.to(device) for name, tensor in batch(kind, seed=frozen).items()}
    results: list[tuple[Tensor, dict[str, Tensor]]] = []
    for attention, context in (("sdpa", nullcontext()), ("packed", products())):
        encoder = BertModel.from_pretrained(minilm, attention=attention)
        torch.manual_seed(0)
        model = MultiTaskModel(encoder, {"a": MLPHead(384, 256, 3), "b": MLPHead(384, 128, 2)})
        model.to(device).eval()
        for part in [encoder.embeddings, *encoder.layers[:frozen]] if frozen else []:
            part.requires_grad_(False)
        rows = inputs["attention_mask"].sum(1) > 0  # of an empty text the reference's layers make something
        with context:
            logits = model(**inputs).logits
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


@pytest.mark.parametrize("kind", ["right", "left", "random"])
def test_one_call_attends_to_all_lengths(kind: str) -> None:
    texts = packing.PaddedBatch(batch(kind, seed=0)["attention_mask"])
    torch.manual_seed(0)
    states = torch.randn(3, len(texts.cells), 5, 7, requires_grad=True)
    query, key, value = states.transpose(1, 2)  # (N, tokens, D)
    direction = torch.randn_like(query)
    results = []
    for context in (
        texts.packing.attend(query, key, value, None, 0.0)[0],
        texts.attend_padded(query, key, value, 0.0),
    ):
        results.append((context, *torch.autograd.grad(context, states, direction)))
    torch.testing.assert_close(*results)
    assert not texts.attend_padded(query, key, value, dropout_p=1.0).any()


def test_without_a_mask_nothing_is_left_out(small: Path) -> None:
    input_ids = torch.randint(1, 30522, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, exact = (
            BertModel.from_pretrained(small, attention=kind)(input_ids) for kind in ("packed", "sdpa")
        )
    torch.testing.assert_close(ours.last_hidden_state, exact.last_hidden_state, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "full"])
def test_on_a_gpu_lengths_share_a_call(minilm: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    dropped = []
    one_call = packing.PaddedBatch.attend_padded

    def noting(*arguments: Any) -> Any:
        dropped.append(arguments[-1])
        return one_call(*arguments)

    monkeypatch.setattr(packing.PaddedBatch, "attend_padded", noting)
    processes = Processes("cuda", bf16=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    model = BertModel.from_pretrained(minilm, attention="packed").to(processes.device).train()
    inputs = {name: tensor.to(processes.device) for name, tensor in batch(kind, seed=0).items()}
    with processes.autocast():
        hidden = model(**inputs).last_hidden_state
    hidden.float().logsumexp(-1).sum().backward()
    assert dropped == ([] if kind == "full" else [0.1] * 6)
    gradients = [p.grad for name, p in model.named_parameters() if not name.startswith("pooler")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_what_the_mask_hides_is_zero_and_is_not_read(minilm: Path) -> None:
    model = BertModel.from_pretrained(minilm, attention="packed")
    inputs = batch("random", 0)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), 7)
        assert torch.equal(model(**inputs).last_hidden_state, hidden)
    assert (hidden[inputs["attention_mask"] == 0] == 0).all()
    assert (hidden[inputs["attention_mask"] == 1].abs().amax(-1) > 0).all()


def test_a_batch_of_padding_is_zero(tiny: Path) -> None:
    model = BertModel.from_pretrained(tiny, attention="packed")
    with torch.no_grad():
        hidden = model(torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, 3)).last_hidden_state
    assert torch.equal(hidden, torch.zeros(2, 3, 36))


@pytest.mark.parametrize("products", [PLAIN, ONEDNN])
@pytest.mark.parametrize("depth", [0, 1, 4, 6])
@pytest.mark.parametrize("bf16", [False, True])
def test_features_agree_with_the_padded_reference(
    minilm: Path, products: Callable[[], AbstractContextManager[object]], depth: int, bf16: bool
) -> None:
    examples = dummy_examples(70, {"a": ("no", "yes")}, seed=depth)
    results: list[list[Tensor]] = []
    for attention in ("sdpa", "packed"):
        encoder = BertModel.from_pretrained(minilm, attention=attention)
        model = MultiTaskModel(encoder, {"a": MLPHead(384, 37, 2)}).eval()
        dataset = SentenceDataset(examples, Tokenizer.from_pretrained(minilm), {"a": ("no", "yes")})
        dataset.ids[3] = []  # of which some tokenizers make nothing
        in_bf16 = bf16 and attention == "packed"
        with products(), torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            assert sum(fill(model, {dataset: [[5, 2, 60], [4, 3, 5]]}, depth)) == len(dataset)
        assert dataset.depth == depth
        assert dataset.features is not None
        assert sum(row.nbytes for row in dataset.features) == size_in_bytes(model, dataset, depth)
        results.append(dataset.features)
    for reference, ours in zip(*results, strict=True):
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)
        difference = (ours - reference).norm() / reference.norm().clamp(min=1e-9)
        assert difference <= (2e-2 if bf16 else 2e-6)
        assert (difference > 1e-4) == (bf16 and depth > 0 and bool(ours.any()))


# --------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_drops_the_share_that_it_says(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 997, dtype=dtype, requires_grad=True)  # an odd number of numbers
    dropped = fast_dropout(x, p)
    assert dropped.dtype == dtype
    kept = dropped != 0
    scale = 2**16 / (2**16 - round(p * 2**16))
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], scale), rtol=rounding, atol=0)
    spread = (p * (1 - p)) ** 0.5
    for lane in range(4):  # four are cut from each random integer
        numbers = kept.flatten()[lane::4].double()
        assert abs(numbers.mean() - (1 - p)) < 5 * spread / len(numbers) ** 0.5
    for shift in (1, 2, 3, 4):  # neighbours know nothing of each other
        numbers = (kept.flatten().double() - (1 - p)) / spread
        assert abs((numbers[shift:] * numbers[:-shift]).mean()) < 5 / len(numbers) ** 0.5
    dropped.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad, dropped.detach())  # type: ignore[arg-type]


def test_dropout_of_nothing_of_all_and_again() -> None:
    x = torch.randn(13, 7)
    assert torch.equal(fast_dropout(x, 0.0), x)
    assert torch.equal(fast_dropout(x, 1.0), torch.zeros_like(x))
    assert fast_dropout(x[:0], 0.5).shape == (0, 7)
    torch.manual_seed(5)
    first, second = fast_dropout(x, 0.5), fast_dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    with torch.device("meta"):  # the default is not where its numbers come from
        assert torch.equal(fast_dropout(x, 0.5), first)


def test_every_dropout_of_the_encoder_is_replaced(tiny: Path) -> None:
    model = BertModel.from_pretrained(tiny)
    before = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    use_fast_dropout(model)
    after = [part for part in model.modules() if isinstance(part, nn.Dropout)]
    assert len(after) == len(before) > 2
    assert all(type(part) is FastDropout and not part.training for part in after)
    assert [part.p for part in after] == [part.p for part in before]
    hidden = torch.ones(13, 36)
    assert torch.equal(after[0](hidden), hidden)
    assert not torch.equal(after[0].train()(hidden), hidden)


# -------------------------------------------------------------------------------------------- train.py


def run(model: Path, output: Path, options: str) -> list[dict[str, Any]]:
    assert train.main(command(model, output, options)) == 0
    return steps(output)


@pytest.mark.parametrize("through_onednn", [False, pytest.param(True, marks=needs_exact)])
@pytest.mark.parametrize("freeze", ["none", "layers:1", "backbone"])
def test_fast_runs_learn_the_same(
    no_dropout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, freeze: str, through_onednn: bool
) -> None:
    monkeypatch.setattr(onednn, "are_exact", lambda: through_onednn)
    reference = run(no_dropout, tmp_path / "reference", f"--freeze {freeze}")
    used: set[str] = set()
    attend = packing.Packing.attend

    def spy(*arguments: Any) -> Any:
        used.add(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return attend(*arguments)

    monkeypatch.setattr(packing.Packing, "attend", spy)
    fast = run(no_dropout, tmp_path / "fast", f"--freeze {freeze} --fast")
    assert used == ({"bf16"} if through_onednn else {"none"})
    for ours, theirs in zip(fast, reference, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


@pytest.mark.parametrize("fast", [False, True])
def test_only_fast_runs_use_what_rounds_or_draws_otherwise(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    used: set[str] = set()

    def noting(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def called(*arguments: Any, **named: Any) -> Any:
            used.add(name)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    noting(FastDropout, "forward")
    noting(fast_attention, "fast_dropout")
    noting(features, "run_texts")
    noting(torch, "_fused_adamw_")
    noting(train, "keep_freed_memory")  # this one changes no number
    run(small, tmp_path / "run", f"--device cpu --freeze layers:1{' --fast' if fast else ''}")
    expected = {"forward", "run_texts", "_fused_adamw_", "fast_dropout"}
    assert used == {"keep_freed_memory"} | (expected if fast else set())
