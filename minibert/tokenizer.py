"""WordPiece tokenizing, thin over the `tokenizers` library."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.inputs import full_name
from minibert.tokenizer_files import SPECIAL_TOKENS, read_settings, read_tokenizer, tokenizer_files
from weights import CheckpointError, resolve
from weights.hub import LENGTH_FILES, TOKENIZER_FILES, TOKENIZER_SETTINGS
from weights.safetensors_files import as_directory, write_directory

if TYPE_CHECKING:
    import tokenizers

# A backend is told its limit before each batch, so two threads must not do so at once.
TRUNCATION = threading.Lock()


class Tokenizer:
    """Text -> token ids (Devlin et al. 2018, section 3; WordPiece: Wu et al. 2016).

    `backend` is the `tokenizers.Tokenizer`, `max_length` the most tokens a text may become,
    [CLS] and [SEP] included, `token_types` whether the model wants `token_type_ids`, `special_tokens`
    what its special tokens are called where not as BERT's (`{"pad_token": "<pad>"}`).

    Raises:
        TypeError: `backend` is something else.
        ValueError: the vocabulary has no padding token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        max_length: int = 512,
        token_types: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        if not hasattr(backend, "encode_batch_fast"):
            raise TypeError(
                f"backend is a {full_name(backend)}, it must be a tokenizers.Tokenizer (of transformers' its "
                ".backend_tokenizer); Tokenizer.from_pretrained takes a model's name"
            )
        self.special_tokens = SPECIAL_TOKENS | dict(special_tokens or {})
        pad_token_id = backend.token_to_id(self.special_tokens["pad_token"])
        if pad_token_id is None:
            raise ValueError(f"the vocabulary has no {self.special_tokens['pad_token']} token")
        # A tokenizer.json may carry the padding and truncation of whoever saved it.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.token_types = token_types

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path = "bert-base-uncased") -> Self:
        """From a model's tokenizer.json, or its vocab.txt and the `do_lower_case` beside it.

        Reads these and the tokens added beside them (tokenizer_config.json, added_tokens.json,
        special_tokens_map.json) as transformers does. The limit is the model's own, as for
        sentence-transformers: max_seq_length (sentence_bert_config.json) or else model_max_length
        (tokenizer_config.json), but at most max_position_embeddings (config.json).

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: no tokenizer files there, damaged ones, or another kind of tokenizer.
        """
        directory = resolve(name_or_path)
        config = BertConfig.from_pretrained(directory)
        settings = read_settings(directory / "tokenizer_config.json")
        candidates = [directory / name for name in LENGTH_FILES]
        sentence_path = next(filter(Path.is_file, candidates), candidates[0])
        sentence_settings = read_settings(sentence_path)
        backend, special_tokens = read_tokenizer(directory, settings)
        if sentence_settings.get("do_lower_case") and not getattr(backend.normalizer, "lowercase", False):
            raise CheckpointError(
                f"{sentence_path} says do_lower_case but the tokenizer is cased, "
                "which is not supported: set it to false, or lower-case in tokenizer_config.json"
            )
        limit = settings.get("model_max_length", settings.get("max_len"))  # which it was called before
        limit = sentence_settings.get("max_seq_length", limit) or config.max_position_embeddings
        max_length = min(int(limit), config.max_position_embeddings)
        try:
            return cls(
                backend,
                max_length=max_length,
                token_types=config.type_vocab_size > 0,
                special_tokens=special_tokens,
            )
        except ValueError as error:
            raise CheckpointError(f"{directory}: {error}") from error

    def __call__(
        self,
        texts: str | Sequence[str],
        text_pairs: str | Sequence[str] | None = None,
        *,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Tokenizes a batch, padded on the right to its longest; `model(**tokenizer(texts))` works.

        Args:
            texts: one text or several; an empty text is just [CLS] [SEP].
            text_pairs: a second text for each, of token type 1.
            max_length: cut to this many tokens instead of the model's limit; of a pair, the longer
                text is cut first. Cutting warns, once per call.

        Returns:
            `input_ids`, `attention_mask` and, if the model has them, `token_type_ids`: (B, T) int64.

        Raises:
            TypeError: not a string (which one is named).
            ValueError: nothing to tokenize, a lone surrogate, unequal numbers of texts and pairs, a
                max_length that is no integer or leaves no room for the special tokens.
        """
        firsts = as_list(texts)
        if not firsts:
            raise ValueError("no texts to tokenize: the batch is empty")
        rows, cut = self._encode(firsts, None if text_pairs is None else as_list(text_pairs), max_length)
        self.warn_if_cut(cut, len(rows), max_length)
        batch = {
            "input_ids": pad([row.ids for row in rows], self.pad_token_id),
            "attention_mask": pad([row.attention_mask for row in rows], 0),
        }
        if self.token_types:
            batch["token_type_ids"] = pad([row.type_ids for row in rows], 0)
        return batch

    def token_ids(self, texts: str | Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """The ids of each text, cut but not padded. Raises as `__call__`, but takes an empty list."""
        rows, cut = self._encode(as_list(texts), None, max_length)
        self.warn_if_cut(cut, len(rows), max_length)
        return [row.ids for row in rows]

    def token_ids_and_cuts(self, texts: list[str], *, first: int) -> tuple[list[list[int]], int]:
        """The ids of each text, and how many texts were cut, without a warning: for texts in blocks.

        `first` is what the first of them is called in an error.
        """
        rows, cut = self._encode(texts, None, None, first)
        return [row.ids for row in rows], cut

    def warn_if_cut(self, cut: int, texts: int, max_length: int | None = None) -> None:
        """One warning for all the texts that were too long, about the line that called us."""
        if cut:
            limit = self.max_length if max_length is None else max_length
            level, frame = 1, inspect.currentframe()
            while frame and str(frame.f_globals.get("__name__")).partition(".")[0] in ("minibert", "heads"):
                level, frame = level + 1, frame.f_back
            warnings.warn(f"{cut} of {texts} texts cut to {limit} tokens", stacklevel=level)

    def _encode(
        self, texts: list[str], pairs: list[str] | None, max_length: int | None, first: int = 0
    ) -> tuple[list[tokenizers.Encoding], int]:
        check_texts(texts, first)
        inputs: list[Any] = texts
        if pairs is not None:
            check_texts(pairs, kind="text pair")
            if len(pairs) != len(texts):
                raise ValueError(f"{len(texts)} texts but {len(pairs)} text_pairs: there must be as many")
            inputs = list(zip(texts, pairs, strict=True))
        limit = self.max_length if max_length is None else max_length
        special = self.backend.num_special_tokens_to_add(pairs is not None)
        if type(limit) is not int or limit < special:
            raise ValueError(
                f"max_length is {limit!r}, it must be an integer from {special} (special tokens) up"
            )
        with TRUNCATION:
            self.backend.no_padding()  # which somebody may have turned on
            self.backend.enable_truncation(limit)
            try:
                rows = self.backend.encode_batch_fast(inputs)
            finally:
                self.backend.no_truncation()
        return rows, sum(bool(row.overflowing) for row in rows)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `files()` beside a model's config.json, without which nothing loads them.

        (Where there is a sentence_bert_config.json, too, its limit counts for more.)

        Raises:
            CheckpointError, ValueError: the directory cannot be written, or names none.
        """
        of_another = dict.fromkeys((*TOKENIZER_FILES, *TOKENIZER_SETTINGS))  # that was here before
        write_directory(as_directory(directory), {**of_another, **self.files()})

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json as transformers reads them, by name."""
        with TRUNCATION:
            return tokenizer_files(self.backend, self.special_tokens, self.max_length)


def check_tokenizer(tokenizer: object) -> None:
    """Raises TypeError unless it is a `Tokenizer`."""
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer is a {full_name(tokenizer)}, it must be what minibert.Tokenizer.from_pretrained gives"
        )


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length -> (B, T) int64, filled up with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64)


def as_list(texts: str | Iterable[str]) -> list[str]:
    """One text or several -> a list. Raises TypeError for what is neither."""
    return list(as_iterable(texts))


def as_iterable(texts: str | Iterable[str]) -> Iterable[str]:
    """One text -> a list of it; several as they are. Raises TypeError for what is neither."""
    if isinstance(texts, str):
        return [texts]
    not_a_row = getattr(texts, "ndim", 1) != 1  # a table would give the names of its columns
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable) or not_a_row:
        shape = f" of shape {tuple(texts.shape)}" if hasattr(texts, "shape") else ""
        raise TypeError(f"the texts are {full_name(texts)}{shape}, they must be a string or several")
    return texts


def check_texts(texts: Sequence[object], first: int = 0, kind: str = "text") -> None:
    """Raises TypeError or ValueError, naming the index (from `first`), unless all are valid Unicode text."""
    for index, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise TypeError(f"{kind} {index} is {type(text).__name__} ({text!r:.60}), it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{kind} {index} is not valid Unicode: character {error.start} is a lone surrogate "
                f"({text[error.start]!a})"
            ) from error
