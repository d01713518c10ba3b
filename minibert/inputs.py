"""What the encoder refuses, each in one sentence."""

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minibert.config import BertConfig
from weights.checkpoint import FLOATS

Array = Tensor | NDArray[Any]


def check_inputs(
    config: BertConfig, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
) -> None:
    """Raises TypeError or ValueError, saying what and where, unless a model can encode these."""
    _check_integers("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, it must be (batch, tokens) and not empty"
        )
    check_ids(config, input_ids, longest=input_ids.shape[1])
    if attention_mask is not None:
        check_mask(attention_mask, input_ids.shape)
    if token_type_ids is not None:
        if config.type_vocab_size == 0:
            raise ValueError("this model has no token types (type_vocab_size 0): leave token_type_ids out")
        _check_integers("token_type_ids", token_type_ids)
        _check_shape("token_type_ids", token_type_ids, input_ids.shape)
        _check_range("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")


def check_ids(config: BertConfig, input_ids: Array, longest: int) -> None:
    """Raises ValueError unless the model has a vector for each id, and positions for the longest text."""
    _check_range("input_ids", input_ids, config.vocab_size, "vocab_size")
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"input_ids is {longest} tokens long, this model has positions for "
            f"{config.max_position_embeddings} (max_position_embeddings): truncate it"
        )


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raises TypeError or ValueError unless this is a mask of 0, 1 or booleans of this shape, (B, T)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is {type(mask).__name__}, it must be a tensor")
    _check_shape("attention_mask", mask, shape)
    _refuse_any("attention_mask", mask, (mask != 0) & (mask != 1), "1 for a token and 0 for padding")


def _check_integers(name: str, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        hint = ": call model(**batch)" if isinstance(ids, dict) else ""
        raise TypeError(f"{name} is {kind}, it must be a tensor of int64 or int32{hint}")


def _check_shape(name: str, tensor: Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, it must be {tuple(shape)}: one value per token"
        )


def _check_range(name: str, ids: Array, size: int, size_name: str) -> None:
    _refuse_any(name, ids, (ids < 0) | (ids >= size), f"from 0 to {size - 1} ({size_name} {size})")


def _refuse_any(name: str, tensor: Array, wrong: Array, expected: str) -> None:
    """Raises ValueError about the first number that is `wrong`, if any is."""
    if holds(wrong.any()):
        first = torch.as_tensor(wrong, device=getattr(wrong, "device", "cpu")).nonzero()[0]
        where = tuple(first.tolist())
        raise ValueError(f"{name}{list(where)} is {tensor[where].item()}, it must be {expected}")


def holds(condition: object) -> bool:
    """Whether a truth value is true; False where torch has none: in a graph, under vmap, on the meta device."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False  # the graph serves other numbers, too
    if getattr(condition, "is_cuda", False) and torch.cuda.is_current_stream_capturing():
        return False
    try:
        return bool(condition)
    except RuntimeError:
        return False


def check_states(states: Tensor, mask: Tensor) -> None:
    """Raises TypeError or ValueError unless these can be a `last_hidden_state`, (B, T, H), and its mask."""
    if not isinstance(states, Tensor):
        hint = ": give its .last_hidden_state" * hasattr(states, "last_hidden_state")
        raise TypeError(f"last_hidden_state is a {full_name(states)}, it must be a tensor{hint}")
    if states.dim() != 3:
        raise ValueError(
            f"last_hidden_state has shape {tuple(states.shape)}, it must be (batch, tokens, hidden size)"
        )
    check_mask(mask, states.shape[:2])


def checked_pair(part: str, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """What a layer or an attention gave. Raises TypeError unless that is a pair (a batch of two is none)."""
    if not isinstance(output, tuple | list) or len(output) != 2:
        length = f" of {len(output)}" if isinstance(output, tuple | list) else ""
        raise TypeError(
            f"{part} gave a {type(output).__name__}{length}, it must give a pair: its states, and the "
            "attention weights or None"
        )
    return output


def check_config(config: object) -> None:
    """Raises TypeError unless it is a `BertConfig`."""
    if not isinstance(config, BertConfig):
        raise TypeError(
            f"config is a {full_name(config)}, it must be a minibert.BertConfig: from_dict makes one of a "
            "dict, BertModel.from_pretrained takes a model's name"
        )


def check_dtype(dtype: object) -> None:
    """Raises ValueError unless a model can be in it, or it is None."""
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype!r}, it must be torch.float32, bfloat16, float16 or float64")


def check_as_configured(model: nn.Module, configured: nn.Module) -> None:
    """Raises ValueError if an activation, eps or head size is not that of `configured`, a model by the config.

    (Which is all that files can say of these.)
    """
    parts, device = dict(model.named_modules()), next(model.parameters()).device
    some = torch.linspace(-40, 40, 321, device=device, dtype=torch.float32)
    for name, expected in configured.named_modules():
        for setting in ("eps", "head_size", "activation"):
            ours, configs = (getattr(part, setting, None) for part in (parts.get(name), expected))
            if ours is None or configs is None or ours == configs:
                continue
            if setting == "activation" and (not callable(ours) or _agree(ours, configs, some)):
                continue
            raise ValueError(
                f"{name}.{setting} is not what the config says, and only that is saved: correct it, or "
                "model.config by dataclasses.replace(model.config, ...)"
            )


def _agree(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], numbers: Tensor) -> bool:
    try:
        return torch.allclose(one(numbers.clone()), other(numbers.clone()), atol=1e-5)
    except RuntimeError:  # it takes no such numbers
        return False


def full_name(thing: object) -> str:
    """What class it is of and whose: `transformers.BertModel` is not ours."""
    package = type(thing).__module__.partition(".")[0]
    return type(thing).__name__ if package == "builtins" else f"{package}.{type(thing).__name__}"
