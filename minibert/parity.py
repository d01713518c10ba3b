"""Holds the encoder against transformers, piece by piece, to the last bit.

Imports transformers, as nothing else in the package does, and only when `run` is called.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minibert.config import BertConfig
from minibert.inputs import full_name
from minibert.model import BertModel
from weights import resolve
from weights.key_maps import FAMILIES


@dataclass(frozen=True)
class Difference:
    """Where two tensors of one piece differ most, and by how much there: in numbers and in ulps."""

    piece: str
    largest: float
    ulps: int
    index: tuple[int, ...]

    def __str__(self) -> str:
        if not self.ulps:
            return f"{self.piece}: all bits equal"
        return f"{self.piece}: differs by up to {self.largest:.3g} ({self.ulps} ulp) at {list(self.index)}"


def ulps_between(a: Tensor, b: Tensor) -> int:
    """How many representable numbers lie from `a` to `b`, two scalars (0: the same bits, or 0 and -0)."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]

    def ordinal(x: Tensor) -> int:
        bits = int(x.view(integer))
        return bits if bits >= 0 else torch.iinfo(integer).min - bits

    return abs(ordinal(a) - ordinal(b))


def difference(piece: str, ours: Tensor | NDArray[Any], reference: Tensor | NDArray[Any]) -> Difference:
    """Compares one piece, of tensors or arrays.

    Raises:
        ValueError: the shapes or dtypes differ.
    """
    a, b = (
        x.detach().cpu() if isinstance(x, Tensor) else torch.from_numpy(np.array(x)) for x in (ours, reference)
    )
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"{piece}: ours is {a.dtype} {tuple(a.shape)}, the reference {b.dtype} {tuple(b.shape)}"
        )
    if torch.equal(a, b):
        return Difference(piece, 0.0, 0, ())
    distances = (a.double() - b.double()).abs().masked_fill(a == b, 0)  # where both are infinite, too
    index = tuple(int(axis) for axis in torch.unravel_index(distances.argmax(), distances.shape))
    return Difference(piece, float(distances[index]), max(1, ulps_between(a[index], b[index])), index)


def differences(ours: Any, reference: Any) -> list[Difference]:
    """Compares two model outputs from the bottom up: embeddings, attention and state of each layer, pooler.

    `ours` and `reference` have `last_hidden_state`, `pooler_output`, `hidden_states`, `attentions`;
    what is None in ours is left out.

    Raises:
        ValueError: ours has none of them, or the reference lacks one; or shapes or dtypes differ.
    """
    hidden, maps = (_both(name, ours, reference) for name in ("hidden_states", "attentions"))
    states = [(f"layer {i - 1}" if i else "embeddings", *pair) for i, pair in enumerate(hidden)]
    weights = [(f"attention map {i}", *pair) for i, pair in enumerate(maps)]
    pieces = [*filter(None, chain(*zip_longest(states, weights)))]  # embeddings, map 0, layer 0, map 1, ...
    for name in ("last_hidden_state", "pooler_output"):
        pieces += [(name, *pair) for pair in _both(name, ours, reference)]
    if not pieces:
        raise ValueError(f"ours, a {full_name(ours)}, has no last_hidden_state or other piece to compare")
    return [difference(*piece) for piece in pieces]


def _both(name: str, ours: Any, reference: Any) -> list[tuple[Tensor, Tensor]]:
    """Our tensors of this name and the reference's."""
    values = (getattr(output, name, None) for output in (ours, reference))
    a, b = (() if value is None else value if isinstance(value, tuple | list) else (value,) for value in values)
    if a and len(a) != len(b):
        raise ValueError(f"{name}: ours are {len(a)}, the reference's {len(b)}")
    return list(zip(a, b, strict=False))  # nothing, if ours has none


def random_inputs(config: BertConfig, seed: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Named batches that differ in shape, mask and token types: (name, arguments of the forward pass)."""
    generator = torch.Generator().manual_seed(seed)
    longest = config.max_position_embeddings
    short = min(13, longest)
    lengths = torch.randint(1, max(2, short), (3, 1), generator=generator)  # (3, 1)
    places = torch.arange(short)  # (T,)
    holes = torch.rand(3, short, generator=generator) < 0.6  # (3, T)
    cases: list[tuple[str, tuple[int, int], Tensor | None]] = [
        ("no mask", (3, short), None),
        ("all ones", (3, short), torch.ones(3, short, dtype=torch.int64)),
        ("right-padded", (3, short), (places < lengths).long()),
        ("left-padded", (3, short), (places >= short - lengths).long()),
        ("random holes", (3, short), holes),
        ("nothing but holes", (2, short), torch.zeros(2, short, dtype=torch.int64)),
        ("batch of 1", (1, short), None),
        ("1 token", (3, 1), None),
        ("1 token alone", (1, 1), None),
        ("full length", (2, longest), None),
    ]
    for name, shape, mask in cases:
        inputs = {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}
        if mask is not None:
            inputs["attention_mask"] = mask
        yield name, inputs
        if config.type_vocab_size > 1:
            types = torch.randint(config.type_vocab_size, shape, generator=generator)
            yield f"{name}, mixed token types", {**inputs, "token_type_ids": types}


def run(name_or_path: str) -> int:
    """Prints a line for every batch and attention function; 0 if all bits are equal, 1 if not.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError("parity needs transformers: `pip install transformers`") from error
    directory = resolve(name_or_path)
    all_equal = True
    for attention in ("eager", "sdpa"):
        ours = BertModel.from_pretrained(directory, attention=attention)
        family = getattr(transformers, FAMILIES[ours.config.model_type].architecture)
        reference = family.from_pretrained(directory, attn_implementation=attention, dtype=ours.dtype).eval()
        asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        for name, inputs in random_inputs(ours.config):
            with torch.no_grad():
                found = differences(ours(**inputs, **asked), reference(**inputs, **asked))
            first = next((d for d in found if d.ulps), None)
            all_equal &= first is None
            verdict = f"{len(found)} tensors, all bits equal" if first is None else f"first {first}"
            print(f"{attention:5}  {name:36}  {verdict}")
    return 0 if all_equal else 1
