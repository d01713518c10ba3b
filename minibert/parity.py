"""Holds the encoder against transformers, piece by piece, to the last bit.

Imports transformers, as nothing else in the package does, and only when `run` is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.model import BertModel
from weights import resolve
from weights.key_maps import FAMILIES


@dataclass(frozen=True)
class Difference:
    """How two tensors of one piece differ: by how much at most, in numbers and in ulps, and where."""

    piece: str
    largest: float
    ulps: int
    index: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.piece}: differs by up to {self.largest:.3g} ({self.ulps} ulp) at {list(self.index)}"


def ulps_between(a: Tensor, b: Tensor) -> Tensor:
    """For each element, how many representable numbers lie from `a` to `b` (0: the same bits, or 0 and -0)."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]

    def ordinal(x: Tensor) -> Tensor:
        bits = x.contiguous().view(integer).to(torch.int64)
        return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)

    return (ordinal(a) - ordinal(b)).abs()


def difference(piece: str, ours: Tensor, reference: Tensor) -> Difference:
    """Compares one piece.

    Raises:
        ValueError: the shapes or dtypes differ.
    """
    if ours.shape != reference.shape or ours.dtype != reference.dtype:
        raise ValueError(
            f"{piece}: ours is {ours.dtype} {tuple(ours.shape)}, "
            f"the reference {reference.dtype} {tuple(reference.shape)}"
        )
    ours, reference = ours.detach(), reference.detach()
    if torch.equal(ours, reference):
        return Difference(piece, 0.0, 0, ())
    ulps = ulps_between(ours, reference)
    largest = (ours.double() - reference.double()).abs()
    index = torch.unravel_index(largest.argmax(), largest.shape)
    return Difference(piece, float(largest.max()), max(1, int(ulps.max())), tuple(int(axis) for axis in index))


def differences(ours: Any, reference: Any) -> list[Difference]:
    """Compares two model outputs from the bottom up: embeddings, each layer, attentions, pooler.

    `ours` and `reference` have `last_hidden_state`, `pooler_output`, `hidden_states`, `attentions`;
    what is None in ours is left out.
    """
    found = []
    for i, hidden in enumerate(ours.hidden_states or ()):
        if i and ours.attentions is not None:
            name = f"attention map {i - 1}"
            found.append(difference(name, ours.attentions[i - 1], reference.attentions[i - 1]))
        name = f"layer {i - 1}" if i else "embeddings"
        found.append(difference(name, hidden, reference.hidden_states[i]))
    found.append(difference("last_hidden_state", ours.last_hidden_state, reference.last_hidden_state))
    if ours.pooler_output is not None:
        found.append(difference("pooler_output", ours.pooler_output, reference.pooler_output))
    return found


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
