"""Published key <-> our key, one reversible table per family.

The encoder has readable names of its own (`layers.3.attention.query.weight`); files on disk keep
the published ones (`encoder.layer.3.attention.self.query.weight`). A table row names a module on
each side, `{}` stands for the layer's number, and `.weight` / `.bias` carry over unchanged.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one family of checkpoints writes the same encoder down.

    `modules`: our module -> published module. `fields`: BERT's config field -> the family's.
    `implied`: config fields the family does not write because they never vary; `defaults`: those whose
    default is another than BERT's.
    """

    architecture: str
    prefix: str  # of the encoder inside a checkpoint that also has heads
    modules: Mapping[str, str]
    fields: Mapping[str, str] = field(default_factory=dict)
    implied: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def to_ours(self, published: str) -> str | None:
        """Our key, or None when the table has no such key. Both `bert.x` and bare `x` map."""
        key = published.removeprefix(self.prefix)
        for legacy, current in LEGACY_NAMES.items():
            key = key.replace(legacy, current)
        return _rename(key, {theirs: ours for ours, theirs in self.modules.items()})

    def to_published(self, ours: str) -> str:
        """The published key, without the prefix: what transformers writes for a bare encoder.

        Raises ValueError for what is not the encoder's, as in a compiled or parametrized one.
        """
        published = _rename(ours, self.modules)
        if published is None:
            raise ValueError(f"{ours} is not a parameter of BERT's encoder, and has no published name")
        return published

    def config_to_bert(self, published: Mapping[str, Any]) -> dict[str, Any]:
        """A published config.json in BERT's field names; where it has both, the family's own counts."""
        own = {ours: published[theirs] for ours, theirs in self.fields.items() if theirs in published}
        others = {k: v for k, v in published.items() if k not in self.fields.values()}
        return {**self.defaults, **others, **own, **self.implied}

    def config_to_published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The inverse of `config_to_bert`."""
        return {self.fields.get(k, k): v for k, v in config.items() if k not in self.implied}


def _rename(key: str, modules: Mapping[str, str]) -> str | None:
    module, _, parameter = key.rpartition(".")
    number = re.search(r"\.(\d+)\.", module)
    template = modules.get(re.sub(r"\.\d+\.", ".{}.", module, count=1))
    if template is None or parameter not in ("weight", "bias"):
        return None
    return f"{template.format(number.group(1) if number else '')}.{parameter}"


# The names TensorFlow's LayerNorm left behind in the first published files.
LEGACY_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

# Left out on purpose: they are not part of the encoder.
IGNORED = (
    r"cls\..*",  # BERT's masked-language-model and next-sentence heads
    r"vocab_(transform|layer_norm|projector)\..*",  # DistilBERT's masked-language-model head
    r"(pre_classifier|classifier|qa_outputs)\..*",  # transformers' task heads
    r"(.*\.)?embeddings\.(position_ids|token_type_ids)",  # constants that old versions saved
)


def is_ignored(published: str) -> bool:
    """Whether this key is left out on purpose (see `IGNORED`)."""
    return any(re.fullmatch(pattern, published) for pattern in IGNORED)


FAMILIES: Mapping[str, Family] = {
    "bert": Family(
        architecture="BertModel",
        prefix="bert.",
        modules={
            "embeddings.word": "embeddings.word_embeddings",
            "embeddings.position": "embeddings.position_embeddings",
            "embeddings.token_type": "embeddings.token_type_embeddings",
            "embeddings.norm": "embeddings.LayerNorm",
            "layers.{}.attention.query": "encoder.layer.{}.attention.self.query",
            "layers.{}.attention.key": "encoder.layer.{}.attention.self.key",
            "layers.{}.attention.value": "encoder.layer.{}.attention.self.value",
            "layers.{}.attention.output": "encoder.layer.{}.attention.output.dense",
            "layers.{}.attention_norm": "encoder.layer.{}.attention.output.LayerNorm",
            "layers.{}.feed_forward.up": "encoder.layer.{}.intermediate.dense",
            "layers.{}.feed_forward.down": "encoder.layer.{}.output.dense",
            "layers.{}.feed_forward_norm": "encoder.layer.{}.output.LayerNorm",
            "pooler.dense": "pooler.dense",
        },
    ),
    "distilbert": Family(
        architecture="DistilBertModel",
        prefix="distilbert.",
        modules={
            "embeddings.word": "embeddings.word_embeddings",
            "embeddings.position": "embeddings.position_embeddings",
            "embeddings.norm": "embeddings.LayerNorm",
            "layers.{}.attention.query": "transformer.layer.{}.attention.q_lin",
            "layers.{}.attention.key": "transformer.layer.{}.attention.k_lin",
            "layers.{}.attention.value": "transformer.layer.{}.attention.v_lin",
            "layers.{}.attention.output": "transformer.layer.{}.attention.out_lin",
            "layers.{}.attention_norm": "transformer.layer.{}.sa_layer_norm",
            "layers.{}.feed_forward.up": "transformer.layer.{}.ffn.lin1",
            "layers.{}.feed_forward.down": "transformer.layer.{}.ffn.lin2",
            "layers.{}.feed_forward_norm": "transformer.layer.{}.output_layer_norm",
        },
        fields={
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
            "hidden_dropout_prob": "dropout",
            "attention_probs_dropout_prob": "attention_dropout",
        },
        implied={"type_vocab_size": 0, "layer_norm_eps": 1e-12},
        defaults={"num_hidden_layers": 6},
    ),
}
