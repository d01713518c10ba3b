"""The configuration of a BERT, under its published field names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from weights import CheckpointError, read_config, resolve

HIDDEN_ACTS = ("gelu", "relu", "gelu_new", "silu")

# Published fields that change what is computed; the encoder does only the value given here.
UNSUPPORTED_UNLESS = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}


@dataclass(frozen=True)
class BertConfig:
    """config.json of a BERT (Devlin et al. 2018, section 3); the defaults are bert-base-uncased's.

    `model_type` is the family the checkpoint is published in: "bert", or "distilbert" (Sanh et
    al. 2019), which has no token types, no pooler and no dropout after the attention output.

    Raises:
        ValueError: values with which no encoder can be built; the message names the fields.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        # only sound fields can be compared with each other
        if problems := self._field_problems() or self._contradictions():
            raise ValueError("; ".join(problems))

    def _field_problems(self) -> list[str]:
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "type_vocab_size" else 1
            if field.type is int and (type(value) is not int or value < least):
                problems.append(f"{field.name} is {value!r}, it must be an integer from {least} up")
            if field.type is float and (type(value) not in (int, float) or not 0 <= value < 1):
                problems.append(f"{field.name} is {value!r}, it must be a number from 0 to below 1")
        if self.pad_token_id is not None and type(self.pad_token_id) is not int:
            problems.append(f"pad_token_id is {self.pad_token_id!r}, it must be an integer or null")
        if self.hidden_act not in HIDDEN_ACTS:
            problems.append(f"hidden_act {self.hidden_act!r} is not supported, only {', '.join(HIDDEN_ACTS)}")
        if self.model_type not in ("bert", "distilbert"):
            problems.append(f"model_type {self.model_type!r} is not supported, only bert and distilbert")
        return problems

    def _contradictions(self) -> list[str]:
        problems = []
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size {self.hidden_size} cannot be split into {self.num_attention_heads} equal "
                "heads (num_attention_heads)"
            )
        if self.pad_token_id is not None and self.pad_token_id not in range(self.vocab_size):
            problems.append(f"pad_token_id {self.pad_token_id} is not in the vocabulary")
        if self.model_type == "distilbert" and (self.type_vocab_size, self.layer_norm_eps) != (0, 1e-12):
            problems.append("a distilbert has type_vocab_size 0 and layer_norm_eps 1e-12")
        return problems

    @property
    def head_size(self) -> int:
        """D, the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "bert-base-uncased") -> Self:
        """From a model's config.json.

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: config.json cannot be used; the message names the fields.
        """
        directory = resolve(name_or_path)
        published = read_config(directory)
        try:
            return cls.from_dict(published)
        except ValueError as error:
            raise CheckpointError(f"{directory / 'config.json'}: {error}") from error

    @classmethod
    def from_dict(cls, published: Mapping[str, Any]) -> Self:
        """From a config.json's fields, by BERT's names (`weights.read_config` translates DistilBERT's).

        Those that do not concern the encoder are left out.

        Raises:
            TypeError: no dict.
            ValueError: a value that the encoder does not support.
        """
        if not isinstance(published, Mapping):
            kind = type(published).__name__
            raise TypeError(f"a config is made of a dict, such as another's .to_dict(), not of a {kind}")
        unsupported = [
            f"{name} {published[name]!r} is not supported, only {supported!r}"
            for name, supported in UNSUPPORTED_UNLESS.items()
            if published.get(name) not in (None, supported)
        ]
        if unsupported:
            raise ValueError("; ".join(unsupported))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in published.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """The published fields, by BERT's names."""
        return asdict(self)
