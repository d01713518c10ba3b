"""Linears whose three products, forward and backward, go through oneDNN where MKL is slow."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from minibert.fast_inference import uses_onednn

ZEN_5 = 0x1A  # its CPU family
FEWEST_ROWS = 64  # fewer do not pay for reordering the weight


@cache
def mkl_is_slow() -> bool:
    """Whether MKL uses half of this CPU; says no where that is not known (without /proc/cpuinfo).

    A fact about the CPU and not a trial run: a run that is resumed must choose as it chose before.
    """
    info = Path("/proc/cpuinfo")
    return info.is_file() and multiplies_in_halves(info.read_text())


def multiplies_in_halves(cpuinfo: str) -> bool:
    """On AMD MKL multiplies 256 bits at a time; CPUs from Zen 5 on could do 512."""
    fields = dict(line.replace("\t", "").split(": ", 1) for line in cpuinfo.splitlines() if ": " in line)
    return fields.get("vendor_id") == "AuthenticAMD" and int(fields.get("cpu family", 0)) >= ZEN_5


class OneDnnLinear(torch.autograd.Function):
    """x (rows, in), weight (out, in), bias (out,) or None -> (rows, out); both weights are reordered anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (out,) = gradients  # (rows, out)
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _product(out, weight.t(), None) if for_x else None,  # (rows, in)
            _product(out.t(), x.t(), None) if for_weight else None,  # (out, in)
            out.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "none")  # type: ignore[no-any-return]


class OneDnnLinears(TorchFunctionMode):
    """While active, `F.linear` on a packed batch is `OneDnnLinear`."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and not kwargs and len(args) == 3 and not torch.is_autocast_enabled("cpu"):
            x, weight, bias = args
            if x.dim() == 2 and len(x) >= FEWEST_ROWS and x.dtype == torch.float32 and uses_onednn(weight):
                return OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))
