"""The switch that sends float32 products through oneDNN: exact, and put back as it was found."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minibert import amx, onednn
from minibert.fused_layers import FusedLinear
from minibert.onednn import are_exact, multiplies, onednn_products, products_through
from tests.fast_reference import needs_bfloat16, needs_exact


def setting() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [(64, 5, 7), (100, 39, 37), (129, 64, 128), (300, 384, 1152)])
def test_linears_are_as_exact_as_ever_forward_and_backward(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    rows, inputs, outputs = shape
    narrow = [torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)]
    wide = [each.double().requires_grad_() for each in narrow]
    narrow = [each.requires_grad_() for each in narrow]
    gradient = torch.randn(rows, outputs)
    expected = F.linear(*wide)
    expected.backward(gradient.double())  # type: ignore[no-untyped-call]
    with onednn_products():
        product = F.linear(*narrow)
        product.backward(gradient)  # type: ignore[no-untyped-call]
    for ours, exact in [(product, expected), *((a.grad, b.grad) for a, b in zip(narrow, wide, strict=True))]:
        assert ours is not None
        assert exact is not None
        assert (ours - exact).abs().max() < 3e-7 * exact.abs().max() * outputs**0.5


def test_what_was_inherited_is_inherited_again() -> None:
    """The setting reads as its parent's; written back it would stay so when that one changes."""
    try:
        torch.backends.mkldnn.fp32_precision = "bf16"
        with onednn_products():
            pass
        with products_through("MKL", torch.empty(1)):
            pass
        torch.backends.mkldnn.fp32_precision = "ieee"
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.fp32_precision = "none"
    assert setting() == "none"


def through_onednn(a: torch.Tensor, b: torch.Tensor, capfd: pytest.CaptureFixture[str]) -> bool:
    """Whether a @ b goes there, by oneDNN's own log."""
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):  # type: ignore[no-untyped-call]
        _ = a @ b
    return ",matmul," in capfd.readouterr().out


@needs_exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [13, 32, 64])
def test_what_multiplies_says_is_what_torch_does(
    head_size: int, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]
) -> None:
    switched = []
    for length in range(1, 40):
        a, b = torch.randn(1, length, head_size).to(dtype), torch.randn(1, head_size, length).to(dtype)
        assert multiplies(a, length) == (dtype == torch.bfloat16 and through_onednn(a, b, capfd))
        with onednn_products():
            assert multiplies(a, length) == through_onednn(a, b, capfd)
            switched.append(multiplies(a, length))
    assert set(switched) == {False, True}


@needs_exact
def test_the_setting_is_put_back() -> None:
    before = setting()
    with onednn_products():
        assert setting() == "bf16"
        with onednn_products():
            pass
        assert setting() == "bf16"
        with pytest.raises(KeyError), onednn_products():
            raise KeyError
    assert setting() == before
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"  # type: ignore[attr-defined]
    try:
        with onednn_products():
            assert setting() == "bf16"
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]


@needs_exact
def test_the_last_thread_to_leave_puts_it_back() -> None:
    before = setting()
    entered, leave = threading.Event(), threading.Event()

    def encode() -> None:
        with onednn_products():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=encode)
    with onednn_products():
        thread.start()
        entered.wait(10)
    assert setting() == "bf16"
    leave.set()
    thread.join()
    assert setting() == before


@needs_exact
def test_a_single_call_goes_through_the_library_it_names(capfd: pytest.CaptureFixture[str]) -> None:
    before = setting()
    a, b = torch.randn(1, 39, 37), torch.randn(1, 37, 39)
    for outside in (nullcontext, onednn_products):
        with outside():
            held = setting()
            with products_through("MKL", a):
                assert not through_onednn(a, b, capfd)
            assert setting() == held
            with products_through("oneDNN", a):
                assert through_onednn(a, b, capfd)
            with pytest.raises(KeyError), products_through("MKL", a):
                raise KeyError
            for other in (a.bfloat16(), a.double()):
                with products_through("MKL", other):
                    assert setting() == held
            assert setting() == held
    assert setting() == before


@needs_exact
def test_threads_that_want_different_libraries_take_turns() -> None:
    def both(i: int) -> set[str]:
        seen = set()
        for _ in range(200):
            with products_through("oneDNN" if i % 2 else "MKL", torch.zeros(1)):
                seen.add(setting())
                time.sleep(1e-5)
                seen.add(setting())
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(both, range(4))) == 2 * [{"ieee"}, {"bf16"}]


@needs_bfloat16
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (96, [(96, "none")]),
        (225, [(96, "none"), (96, "none"), (64, "none")]),  # filled up to 256
        (31, [(32, "unsplit")]),
        (97, [(96, "none"), (32, "unsplit")]),
        (50, [(50, "unsplit")]),
    ],
)
def test_with_amx_rows_are_multiplied_so_that_they_are_summed_alike(
    monkeypatch: pytest.MonkeyPatch, rows: int, expected: list[tuple[int, str]]
) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, 37), (39, 37), (39,)))
    product, pieces = amx._multiply, []

    def spy(piece: torch.Tensor, *rest: Any) -> torch.Tensor:
        pieces.append((len(piece), rest[-1]))
        return product(piece, *rest)

    ways = {96: "none", 64: "none", 50: "unsplit", 32: "unsplit"}
    monkeypatch.setattr(amx, "_multiply", spy)
    monkeypatch.setattr(amx, "_way", lambda rows, *case: ways.get(rows))
    ours = amx.linear(x, torch.ops.mkldnn._reorder_linear_weight(weight), bias)
    assert pieces == expected
    exact = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(ours.double(), exact, rtol=8e-3, atol=8e-3)


def test_where_the_products_are_rounded_nothing_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "are_exact", lambda: False)
    before = setting()
    with onednn_products(), products_through("oneDNN", torch.zeros(1)):
        assert setting() == before
        assert not multiplies(torch.zeros(12, 100, 32), 100)


@needs_exact
def test_what_else_is_set_does_not_decide_whether_products_are_exact() -> None:
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        assert are_exact.__wrapped__()


@pytest.mark.parametrize("rounded", [False, True])
def test_rounding_to_bfloat16_is_noticed(monkeypatch: pytest.MonkeyPatch, rounded: bool) -> None:
    """As on a CPU with AMX, on any CPU; and that exact products are, on one with AMX, too."""

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if rounded:
            a, b = a.bfloat16(), b.bfloat16()
        return torch.bmm(a.double(), b.double()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(onednn, "packs_weights", lambda weight: True)
    assert are_exact.__wrapped__() == (not rounded)


@needs_bfloat16
@pytest.mark.parametrize("has_amx", [True, False])
def test_only_bfloat16_with_amx_is_summed_otherwise(monkeypatch: pytest.MonkeyPatch, has_amx: bool) -> None:
    monkeypatch.setattr(amx, "HAS_AMX", has_amx)
    narrow, wide = (FusedLinear(torch.nn.Linear(4, 4), dtype=t) for t in (torch.bfloat16, torch.float32))
    assert narrow.multiply is (amx.linear if has_amx else onednn.linear)
    assert wide.multiply is onednn.linear
