"""4 of 4: the whole encoder."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from minibert.attention import ATTENTION_FUNCTIONS, expand_mask
from minibert.config import BertConfig
from minibert.embeddings import Embeddings
from minibert.inputs import check_as_configured, check_config, check_dtype, check_inputs, checked_pair
from minibert.layers import EncoderLayer, Pooler
from minibert.meta_device import without_numbers
from minibert.packing import PaddedBatch
from weights import load_checkpoint, resolve, save_checkpoint
from weights.safetensors_files import check_same_save, last_save


class BertModelOutput(NamedTuple):
    """What the encoder computes.

    `last_hidden_state` (B, T, H). `pooler_output` (B, H), None without a pooler.
    `hidden_states`: L + 1 tensors (B, T, H), the embeddings' output first, if asked for.
    `attentions`: L tensors (B, N, T, T), after dropout as in transformers, if asked for (None where a layer
    or an attention function of your own gives none).
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


# torch.export.save refuses what has no such name
_register_namedtuple(BertModelOutput, serialized_type_name="minibert.BertModelOutput")


class BertModel(nn.Module):
    """The BERT encoder (Devlin et al. 2018, section 3), with random weights; see `from_pretrained`.

    `attention` is "sdpa" (fused), "eager" (written out, and can return its weights) or "packed" (layers
    take (tokens, H), without padding, where their outputs are 0: the fastest on a CPU, and equal up to
    rounding), or a name in `minibert.attention.ATTENTION_FUNCTIONS`.
    `add_pooling_layer`: with a `pooler` (a DistilBERT has none).

    Raises:
        TypeError: `config` is no `BertConfig`.
        ValueError: `attention` is none of these.
    """

    def __init__(self, config: BertConfig, *, attention: str = "sdpa", add_pooling_layer: bool = True) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.attention = attention
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        has_pooler = add_pooling_layer and config.model_type == "bert"
        self.pooler = Pooler(config) if has_pooler else None
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Normal weights, zero biases and zero padding vector (initializer_range), as in transformers."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
            elif module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx].detach())

    @property
    def attention(self) -> str:
        """How attention is computed. Raises ValueError for a name that is not known, or not in this process."""
        self._check_attention(self._attention)
        return self._attention

    @attention.setter
    def attention(self, attention: str) -> None:
        self._check_attention(attention)
        self._attention = attention

    @staticmethod
    def _check_attention(attention: str) -> None:
        if attention not in (*ATTENTION_FUNCTIONS, "packed"):
            names = ", ".join(ATTENTION_FUNCTIONS)
            raise ValueError(f"attention is {attention!r}, it must be {names} or packed")

    @property
    def device(self) -> torch.device:
        """Where the model is: the device of its first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: the dtype of its first parameter."""
        return next(self.parameters()).dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> BertModelOutput:
        """Encodes a batch of token ids.

        Args:
            input_ids: (B, T) integers from 0 to vocab_size - 1.
            attention_mask: (B, T), 1 or True for a token, 0 or False for padding; all ones if None.
            token_type_ids: (B, T) integers from 0 to type_vocab_size - 1; all zeros if None.
            output_hidden_states: also return the output of the embeddings and of every layer.
            output_attentions: also return every layer's attention weights; needs attention="eager", or a
                function of yours that gives them.

        Raises:
            TypeError: an argument is not a tensor of the right kind.
            ValueError: an argument has a wrong shape or value; the message says which and where.
        """
        check_inputs(self.config, input_ids, attention_mask, token_type_ids)
        if output_attentions and self.attention in ("sdpa", "packed"):
            raise ValueError(
                f'output_attentions needs attention="eager": {self.attention} never forms the weights'
            )
        embedded = hidden = self.embeddings(input_ids, token_type_ids)  # (B, T, H)
        hidden_states = [embedded]
        attentions: list[Any] = []
        for hidden, weights in self.run_layers(embedded, attention_mask):
            if output_hidden_states:
                hidden_states.append(hidden)
            if output_attentions:
                attentions.append(weights)
        return BertModelOutput(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def run_layers(
        self, hidden: Tensor, attention_mask: Tensor | None, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Layer by layer from `start` up to, not including, `stop`: its output and attention weights.

        `hidden` (B, T, H) is the output of the layer below `start`, of the embeddings for 0. Yields
        (B, T, H), and (B, N, T, T) or None: to be read, not changed. To go on from other states, call it
        again with `start`.
        """
        layers = list(self.layers)[start:stop]  # a slice of a ModuleList would be a new Module
        if self.attention == "packed":
            batch = PaddedBatch(hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask)
            packed = batch.pack(hidden)  # (tokens, H)
            for layer in layers:
                packed, _ = checked_pair("a layer", layer(packed, None, batch.attend))
                yield batch.unpack(packed), None
            return
        attend = ATTENTION_FUNCTIONS[self.attention]
        mask = expand_mask(attention_mask)  # (B, 1, T, T) or None
        for layer in layers:
            hidden, weights = checked_pair("a layer", layer(hidden, mask, attend))
            yield hidden, weights

    @classmethod
    @torch.inference_mode(False)  # otherwise a model loaded inside that mode could not be trained outside it
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bert-base-uncased",
        *,
        attention: str = "sdpa",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """The encoder with published weights, in eval mode.

        Args:
            name_or_path: a directory, a catalog name, or `org/name` on the hub.
            attention: as for the class.
            dtype: torch.float32, bfloat16, float16 or float64; as stored if None.

        The weights are memory-mapped: nothing is initialised or copied (unless converted). Without a pooler in
        the file the model has none.

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: config.json or the weights cannot be used.
            ValueError: `attention` or `dtype` is none of those.
        """
        check_dtype(dtype)
        directory = resolve(name_or_path)
        mark = last_save(directory)
        config = BertConfig.from_pretrained(directory)
        checkpoint = load_checkpoint(directory)
        check_same_save(directory, mark)
        has_pooler = any(name.startswith("pooler.") for name in checkpoint.tensors)
        with without_numbers():  # the file has them
            model = cls(config, attention=attention, add_pooling_layer=has_pooler)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.load_state_dict(checkpoint.tensors_for(shapes, dtype), assign=True)
        return model.eval()

    def save_pretrained(
        self,
        directory: str | Path,
        other_files: Mapping[str, bytes | Mapping[str, Tensor] | None] | None = None,
    ) -> None:
        """Writes config.json and model.safetensors with the published names.

        A new directory appears whole; in an existing one files are replaced one after another, each whole,
        config.json last: without it nothing loads them.

        `other_files` (name -> bytes, tensors for safetensors, or None to remove it) are written with them.

        Raises:
            CheckpointError: the directory cannot be written, or holds the heads of a MultiTaskModel.
            TypeError: another file is neither bytes nor tensors.
            ValueError: parameters that a BERT with this `config` does not have, or has in another shape;
                another activation, eps or head size than it says.
        """
        layers, configured = len(self.layers), self.config.num_hidden_layers
        if layers != configured:
            raise ValueError(
                f"the model has {layers} layers and its config says {configured}: correct it by "
                f"model.config = dataclasses.replace(model.config, num_hidden_layers={layers})"
            )
        with without_numbers():
            as_configured = BertModel(self.config, add_pooling_layer=self.pooler is not None)
        check_as_configured(self, as_configured)
        shapes = {name: parameter.shape for name, parameter in as_configured.named_parameters()}
        save_checkpoint(directory, self.config.to_dict(), self.state_dict(), shapes, other_files)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """What `.to(...)`, `.half()` and their like call: `encode`'s copy, in fast_inference.py, is dropped."""
        vars(self).pop("_kept", None)
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call,no-any-return]
