"""WordPiece tokenizing, thin over the `tokenizers` library."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from minibert.config import BertConfig
from weights import CheckpointError, resolve
from weights.json_files import read_json, to_json

if TYPE_CHECKING:
    import tokenizers

# A backend is told its limit before each batch, so two threads must not do so at once.
TRUNCATION = threading.Lock()
SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
NAMED_TOKENS = ("bos_token", "eos_token", *SPECIAL_TOKENS)  # in the order in which they are added
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
# Which build their own normalizer, whatever tokenizer.json says; None: named nowhere.
BERT_CLASSES = (
    None,
    *("BertTokenizer", "BertTokenizerFast"),
    *("DistilBertTokenizer", "DistilBertTokenizerFast"),
    *("ElectraTokenizer", "ElectraTokenizerFast"),
)


class Tokenizer:
    """Text -> token ids (Devlin et al. 2018, section 3; WordPiece: Wu et al. 2016).

    `backend` is the `tokenizers.Tokenizer`, `max_length` the most tokens a text may become,
    [CLS] and [SEP] included, `token_types` whether the model wants `token_type_ids`, `special_tokens`
    what its special tokens are called where not as BERT's (`{"pad_token": "<pad>"}`).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        max_length: int = 512,
        token_types: bool = True,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
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
        special_tokens_map.json) as transformers does. The limit is the model's own: the smallest of
        max_position_embeddings (config.json), model_max_length (tokenizer_config.json) and max_seq_length
        (sentence_bert_config.json).

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: no tokenizer files there, damaged ones, or another kind of tokenizer.
        """
        import tokenizers

        directory = resolve(name_or_path)
        config = BertConfig.from_pretrained(directory)
        settings = _read_settings(directory / "tokenizer_config.json")
        sentence_settings = _read_settings(directory / "sentence_bert_config.json")
        kind = settings.get("tokenizer_class") or read_json(directory / "config.json").get("tokenizer_class")
        is_berts = kind in BERT_CLASSES
        if (directory / "tokenizer.json").is_file():
            backend = _from_tokenizer_json(directory / "tokenizer.json")
            is_berts = is_berts and isinstance(backend.model, tokenizers.models.WordPiece)
            if is_berts:
                _split_words(backend, settings)
        elif (directory / "vocab.txt").is_file():
            if not is_berts:
                raise CheckpointError(
                    f"{directory} wants a {kind}, which is not supported without tokenizer.json"
                )
            backend = _from_vocabulary(directory / "vocab.txt", settings)
        else:
            raise CheckpointError(f"{directory} has no tokenizer: neither tokenizer.json nor vocab.txt")
        special_tokens = _add_tokens(backend, directory, settings)
        for name in ("cls_token", "sep_token", "unk_token"):
            if is_berts and special_tokens.get(name, SPECIAL_TOKENS[name]) != SPECIAL_TOKENS[name]:
                raise CheckpointError(
                    f"{directory}: {name} is {special_tokens[name]!r}, of a BertTokenizer it must be BERT's own"
                )
        if sentence_settings.get("do_lower_case") and not getattr(backend.normalizer, "lowercase", False):
            raise CheckpointError(
                f"{directory / 'sentence_bert_config.json'} says do_lower_case but the tokenizer is cased, "
                "which is not supported: set it to false, or lower-case in tokenizer_config.json"
            )
        if settings.get("truncation_side", "right") != "right":
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: truncation_side is {settings['truncation_side']!r}, "
                "only 'right' is supported"
            )
        limits = (settings.get("model_max_length"), sentence_settings.get("max_seq_length"))
        max_length = min([config.max_position_embeddings, *(int(limit) for limit in limits if limit)])
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
            ValueError: nothing to tokenize, a lone surrogate, unequal numbers of texts and pairs.
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
        ids, cut = self.token_ids_and_cuts(as_list(texts), max_length=max_length)
        self.warn_if_cut(cut, len(ids), max_length)
        return ids

    def token_ids_and_cuts(
        self, texts: list[str], *, first: int = 0, max_length: int | None = None
    ) -> tuple[list[list[int]], int]:
        """The ids of each text, and how many texts were cut, without a warning: for texts in blocks.

        `first` is what the first of them is called in an error.
        """
        rows, cut = self._encode(texts, None, max_length, first)
        return [row.ids for row in rows], cut

    def warn_if_cut(self, cut: int, texts: int, max_length: int | None = None, stacklevel: int = 3) -> None:
        """One warning for all the texts that were too long, about the line so many calls up."""
        if cut:
            limit = self.max_length if max_length is None else max_length
            warnings.warn(f"{cut} of {texts} texts cut to {limit} tokens", stacklevel=stacklevel)

    def _encode(
        self, texts: list[str], pairs: list[str] | None, max_length: int | None, first: int = 0
    ) -> tuple[list[tokenizers.Encoding], int]:
        check_texts(texts, first)
        inputs: list[Any] = texts
        if pairs is not None:
            check_texts(pairs)
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
            self.backend.enable_truncation(limit)
            try:
                rows = self.backend.encode_batch_fast(inputs)
            finally:
                self.backend.no_truncation()
        return rows, sum(bool(row.overflowing) for row in rows)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json as transformers reads them, by name."""
        with TRUNCATION:
            serialised = self.backend.to_str(pretty=True)
        parts = json.loads(serialised)
        normalizer = parts["normalizer"] or {}
        # What transformers makes of the vocabulary and the three lines below, when it reads "BertTokenizer":
        is_berts = (
            normalizer.get("type") == "BertNormalizer"
            and normalizer["clean_text"]
            and parts["pre_tokenizer"] == {"type": "BertPreTokenizer"}
            and parts["post_processor"]
            and {key: parts["model"].get(key) for key in WORDPIECE} == WORDPIECE
        )
        settings = {
            "tokenizer_class": "BertTokenizer" if is_berts else "PreTrainedTokenizerFast",
            "do_lower_case": normalizer.get("lowercase", True),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
            "model_max_length": self.max_length,
            **{
                n: token
                for n, token in self.special_tokens.items()
                if self.backend.token_to_id(token) is not None
            },
        }
        return {
            "tokenizer.json": serialised.encode(),
            "tokenizer_config.json": to_json(settings),
        }


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of unequal length -> (B, T) int64, filled up with `value` on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def as_list(texts: str | Iterable[str]) -> list[str]:
    """One text or several -> a list. Raises TypeError for what is neither."""
    return list(as_iterable(texts))


def as_iterable(texts: str | Iterable[str]) -> Iterable[str]:
    """One text -> a list of it; several as they are. Raises TypeError for what is neither."""
    if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"the texts are {type(texts).__name__}, they must be a string or several")
    return [texts] if isinstance(texts, str) else texts


def check_texts(texts: Sequence[object], first: int = 0) -> None:
    """Raises TypeError or ValueError, naming the index (from `first`), unless all are valid Unicode text."""
    for index, text in enumerate(texts, start=first):
        if not isinstance(text, str):
            raise TypeError(f"text {index} is {type(text).__name__} ({text!r:.60}), it must be a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {index} is not valid Unicode: character {error.start} is a lone surrogate "
                f"({text[error.start]!a})"
            ) from error


def _read_settings(path: Path) -> dict[str, Any]:
    """A file of settings that need not be there, those we use checked; null is as good as absent."""
    published = read_json(path) if path.is_file() else {}
    settings: dict[str, Any] = {name: value for name, value in published.items() if value is not None}
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if type(settings.get(name, True)) is not bool:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}, it must be true, false or null")
    for name in ("model_max_length", "max_seq_length"):
        limit = settings.get(name, 1)
        if type(limit) not in (int, float) or limit < 1 or limit % 1 != 0:
            raise CheckpointError(f"{path}: {name} is {limit!r}, it must be a number of tokens")
    return settings


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer this can read: {error}") from error


def _split_words(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> None:
    """As a BertTokenizer does, by tokenizer_config.json alone."""
    from tokenizers import normalizers, pre_tokenizers

    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()


def _from_vocabulary(path: Path, settings: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, processors

    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error
    vocabulary = {token: index for index, token in enumerate(lines)}
    if missing := [token for token in SPECIAL_TOKENS.values() if token not in vocabulary]:
        raise CheckpointError(f"{path} lacks the tokens {', '.join(missing)}: it is not BERT's vocabulary")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    _split_words(backend, settings)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL_TOKENS.values()))
    return backend


def _add_tokens(backend: tokenizers.Tokenizer, directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Adds what the files beside the vocabulary add to it; returns what BERT's special tokens are called here.

    As transformers: `added_tokens_decoder` makes the two older files superfluous.
    """
    from tokenizers import AddedToken

    numbered = settings.get("added_tokens_decoder")
    if numbered is None:
        settings = settings | _read_settings(directory / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    try:
        named = {name: _special(settings[name]) for name in NAMED_TOKENS if name in settings}
        if not isinstance(extra, list | dict):
            raise TypeError(f"{extra!r} is not a list of tokens")
        special = [*named.values(), *map(_special, extra.values() if isinstance(extra, dict) else extra)]
        contents = [token.content for token in special]
        if numbered is not None:
            added = {int(number): AddedToken(**_flags(token)) for number, token in numbered.items()}
        else:
            older = _read_settings(directory / "added_tokens.json")
            added = {
                number: AddedToken(token, special=token in contents, normalized=token not in contents)
                for token, number in older.items()
            }
        for number, token in sorted(added.items()):
            backend.add_tokens([token])
            if (given := backend.token_to_id(token.content)) != number:
                raise CheckpointError(
                    f"{directory}: the added token {token.content!r} should have the id {number}, "
                    f"but would have {given}"
                )
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_tokens([token for token in special if token.content not in known])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{directory} has added tokens that cannot be read: {error}") from error
    return {name: token.content for name, token in named.items() if name in SPECIAL_TOKENS}


def _special(published: Any) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if not isinstance(published, str | dict):
        raise TypeError(f"{published!r} is not a token")
    return AddedToken(
        **_flags({"content": published} if isinstance(published, str) else published) | {"special": True}
    )


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in token.items() if name != "__type"}
