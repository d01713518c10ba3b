"""Sentences -> vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, SupportsIndex, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.model import BertModel
from minibert.pooling import cls_pooling, mean_pooling
from minibert.sentence_transformers_files import module_files, read_modules
from minibert.tokenizer import Tokenizer, as_list, pad
from weights import resolve, save_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POOLINGS = {"mean": mean_pooling, "cls": cls_pooling}
DEFAULT_BATCH_SIZE = 32


class SentenceEncoder(nn.Module):
    """A BERT, its tokenizer and a pooling (Reimers & Gurevych 2019, section 3).

    `pooling` is "mean" or "cls"; `normalize_embeddings` whether `encode` scales each vector to
    length 1 when it is not told. An `nn.Module`: `.to("cuda")`, and `forward` can be trained.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        pooling: str = "mean",
        normalize_embeddings: bool = False,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, it must be {' or '.join(POOLINGS)}")
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize_embeddings = normalize_embeddings

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bert-base-uncased",
        *,
        attention: str = "sdpa",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """From a model directory, a catalog name or `org/name`; arguments as `BertModel.from_pretrained`.

        Pooling and normalisation are read from the directory's modules.json as
        sentence-transformers writes it; without one: mean, not normalised.

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: its files cannot be used.
        """
        directory = resolve(name_or_path)
        pooling, normalize = read_modules(directory)
        return cls(
            BertModel.from_pretrained(directory, attention=attention, dtype=dtype),
            Tokenizer.from_pretrained(directory),
            pooling=pooling,
            normalize_embeddings=normalize,
        )

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids, mask and types as `BertModel` takes them -> (B, H), pooled, not normalised."""
        hidden = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state  # (B, T, H)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        return POOLINGS[self.pooling](hidden, mask)

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        normalize_embeddings: bool | None = ...,
        convert_to_tensor: Literal[False] = ...,
        show_progress_bar: bool | None = ...,
    ) -> NDArray[np.float32]: ...
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        normalize_embeddings: bool | None = ...,
        *,
        convert_to_tensor: Literal[True],
        show_progress_bar: bool | None = ...,
    ) -> Tensor: ...
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = None,
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> NDArray[np.float32] | Tensor:
        """Embeds one sentence as (H,), several as (n, H) in the order given, none as (0, H).

        Args:
            sentences: a string, or any iterable of strings.
            batch_size: sentences per forward pass, 32 if None. Batches are cut from the sentences
                sorted by length, so little is padded.
            normalize_embeddings: scale each vector to length 1; as the checkpoint says if None.
            convert_to_tensor: return a tensor on the model's device instead of a numpy array.
            show_progress_bar: None shows one on a terminal, if there is more than one batch.

        Returns:
            A float32 numpy array, or a tensor: float32, or float64 of a float64 model.

        Raises:
            TypeError: not a string (which one is named).
            ValueError: a lone surrogate, or a batch_size below 1.
        """
        if batch_size is not None and (not isinstance(batch_size, SupportsIndex) or batch_size < 1):
            raise ValueError(f"batch_size is {batch_size!r}, it must be an integer from 1 up")
        texts = as_list(sentences)
        embeddings = self._embed(texts, batch_size or DEFAULT_BATCH_SIZE, show_progress_bar)  # (n, H)
        if self.normalize_embeddings if normalize_embeddings is None else normalize_embeddings:
            embeddings = F.normalize(embeddings, dim=1)
        result = embeddings[0] if isinstance(sentences, str) else embeddings
        return result if convert_to_tensor else result.float().cpu().numpy()

    def _embed(self, texts: list[str], batch_size: int, show_progress_bar: bool | None) -> Tensor:
        weight = self.model.embeddings.word.weight
        ids = self.tokenizer.token_ids(texts)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # stable; longest first
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        embeddings = torch.empty(
            len(texts),
            weight.shape[1],
            dtype=torch.promote_types(weight.dtype, torch.float32),
            device=weight.device,
        )
        with evaluating(self):
            for batch in _progress(batches, show_progress_bar):
                rows = [ids[i] for i in batch]
                input_ids = pad(rows, self.tokenizer.pad_token_id).to(weight.device)  # (B, T)
                mask = pad([[1] * len(row) for row in rows], 0).to(weight.device)  # (B, T)
                embeddings[batch] = self(input_ids, mask)
        return embeddings

    def save_pretrained(
        self, directory: str | Path, other_files: Mapping[str, bytes | Mapping[str, Tensor]] | None = None
    ) -> None:
        """Writes model, tokenizer and pooling as transformers and sentence-transformers read them.

        `other_files` (name -> bytes, or tensors as safetensors) are written with them, all or nothing.

        Raises:
            CheckpointError: the directory cannot be written.
        """
        files = module_files(
            self.pooling,
            self.normalize_embeddings,
            hidden_size=self.model.config.hidden_size,
            max_seq_length=self.tokenizer.max_length,
        )
        save_checkpoint(
            directory,
            self.model.config.to_dict(),
            self.model.state_dict(),
            self.tokenizer.files() | files | dict(other_files or {}),
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards every part is in the mode it was in."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _progress(batches: list[list[int]], show: bool | None) -> Iterable[list[int]]:
    if show is False or (show is None and len(batches) < 2):
        return batches
    from tqdm import tqdm

    on_a_terminal_only = None if show is None else False
    bar: Iterable[list[int]] = tqdm(batches, desc="encode", unit="batch", disable=on_a_terminal_only)
    return bar
