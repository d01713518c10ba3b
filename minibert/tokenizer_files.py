"""A tokenizer's files <-> the `tokenizers` library's object: vocabulary, settings, added tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weights import CheckpointError
from weights.hub import TOKENIZER_FILES
from weights.json_files import read_json, to_json

if TYPE_CHECKING:
    import tokenizers

# BERT's, and in which order transformers adds those that a vocabulary lacks
SPECIAL_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
NAMED_TOKENS = ("bos_token", "eos_token", *SPECIAL_TOKENS)
WORDPIECE = {  # BERT's settings of it; no other model has all three
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
}
# Values of `tokenizer_class` for which transformers reads the vocabulary alone and builds a BertTokenizer by
# tokenizer_config.json, whatever else tokenizer.json holds. None: no value at all.
BERT_CLASSES = (
    None,
    *("BertTokenizer", "BertTokenizerFast"),
    *("DistilBertTokenizer", "DistilBertTokenizerFast"),
    *("ElectraTokenizer", "ElectraTokenizerFast"),
)


def read_settings(path: Path) -> dict[str, Any]:
    """Settings from a file that need not be there; those we use are checked. null is as good as absent."""
    published = read_json(path) if path.is_file() else {}
    settings: dict[str, Any] = {name: value for name, value in published.items() if value is not None}
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "split_special_tokens"):
        if type(settings.get(name, True)) is not bool:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}, it must be true, false or null")
    if settings.get("truncation_side", "right") != "right":
        raise CheckpointError(
            f"{path}: truncation_side is {settings['truncation_side']!r}, only 'right' is supported"
        )
    for name in ("model_max_length", "max_len", "max_seq_length"):
        limit = settings.get(name, 1)
        if type(limit) not in (int, float) or limit < 1 or limit % 1 != 0:
            raise CheckpointError(f"{path}: {name} is {limit!r}, it must be a number of tokens")
    return settings


def read_tokenizer(directory: Path, settings: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """From tokenizer.json or vocab.txt, tokenizer_config.json's settings, and the tokens added beside them.

    Also gives what the special tokens are called, where that is said (`{"pad_token": "<pad>"}`).

    Raises:
        CheckpointError: no such files, damaged ones, or another kind of tokenizer.
    """
    import tokenizers

    kind = settings.get("tokenizer_class") or read_json(directory / "config.json").get("tokenizer_class")
    is_bert = kind in BERT_CLASSES
    if "added_tokens_decoder" not in settings:  # which makes the two older files superfluous
        settings = {**settings, **read_settings(directory / "special_tokens_map.json")}
    path = next((directory / name for name in TOKENIZER_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{directory} has no tokenizer: neither tokenizer.json nor vocab.txt")
    if path.name == "tokenizer.json":
        backend = _from_tokenizer_json(path, settings)
        is_bert = is_bert and isinstance(backend.model, tokenizers.models.WordPiece)
    elif is_bert:
        backend = tokenizers.Tokenizer(_from_vocabulary(path))
    else:
        raise CheckpointError(f"{directory} wants a {kind}, which is not supported without tokenizer.json")
    published = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    if is_bert:
        if "added_tokens_decoder" in settings:  # which counts, and not what tokenizer.json adds
            published = {}
        backend = _bert_tokenizer(backend.model, path, settings)
        backend.add_tokens(list(published.values()))
    special_tokens = _add_tokens(backend, directory, settings, published.keys())
    backend.encode_special_tokens = settings.get("split_special_tokens", False)
    for name in ("cls_token", "sep_token", "unk_token"):
        if is_bert and special_tokens.get(name, SPECIAL_TOKENS[name]) != SPECIAL_TOKENS[name]:
            raise CheckpointError(
                f"{directory}: {name} is {special_tokens[name]!r}, of a BertTokenizer it must be BERT's own"
            )
    return backend, special_tokens


def _from_tokenizer_json(path: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer this can read: {error}") from error
    # the settings' `truncation_side`, already checked, counts for more
    if (backend.truncation or {}).get("direction") == "left" and "truncation_side" not in settings:
        raise CheckpointError(f"{path}: truncation from the left is not supported, only from the right")
    model = backend.model
    if isinstance(model, tokenizers.models.WordPiece) and model.token_to_id(model.unk_token) is None:
        raise CheckpointError(f"{path} lacks {model.unk_token} in its vocabulary, which unknown words become")
    return backend


def _from_vocabulary(path: Path) -> tokenizers.models.WordPiece:
    from tokenizers import models

    try:
        return models.WordPiece.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _bert_tokenizer(
    model: tokenizers.models.WordPiece, path: Path, settings: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """A BertTokenizer, of which only the vocabulary is given."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    ids: dict[str, Any] = {token: model.token_to_id(token) for token in ("[SEP]", "[PAD]", "[CLS]", "[UNK]")}
    if missing := [token for token, number in ids.items() if number is None]:
        raise CheckpointError(f"{path} lacks the tokens {', '.join(missing)}: it is not BERT's vocabulary")
    for name, value in WORDPIECE.items():
        setattr(model, name, value)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = _template(ids)
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(
        [t for name, t in SPECIAL_TOKENS.items() if _content(settings.get(name, t)) == t]
    )
    return backend


def _template(ids: Mapping[str, int]) -> tokenizers.processors.TemplateProcessing:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )


def _add_tokens(
    backend: tokenizers.Tokenizer, directory: Path, settings: Mapping[str, Any], published: Collection[str]
) -> dict[str, str]:
    """Adds what the files beside the vocabulary add to it; returns what BERT's special tokens are called here.

    As transformers: what tokenizer.json has `published` stays as it is.
    """
    from tokenizers import AddedToken

    path = directory / "added_tokens.json"
    older = read_json(path) if "added_tokens_decoder" not in settings and path.is_file() else {}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    try:
        named = {name: _special(settings[name]) for name in NAMED_TOKENS if name in settings}
        if not isinstance(extra, list | dict):
            raise TypeError(f"{extra!r} is not a list of tokens")
        special = [*named.values(), *map(_special, extra.values() if isinstance(extra, dict) else extra)]
        contents = [token.content for token in special]
        added = {
            int(number): AddedToken(**_flags(token))
            for number, token in settings.get("added_tokens_decoder", {}).items()
        } | {
            int(number): AddedToken(token, special=token in contents, normalized=token not in contents)
            for token, number in older.items()
            if token not in published
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{directory} has added tokens that cannot be read: {error}") from error
    backend.add_tokens([token for _, token in sorted(added.items())])
    for number, token in added.items():
        if (given := backend.token_to_id(token.content)) != number:
            raise CheckpointError(
                f"{directory}: the added token {token.content!r} should have the id {number}, "
                f"but would have {given}"
            )
    known = {*published, *(token.content for token in added.values())}
    backend.add_tokens([token for token in special if token.content not in known])
    return {name: token.content for name, token in named.items() if name in SPECIAL_TOKENS}


def _special(published: Any) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    if not isinstance(published, str | dict):
        raise TypeError(f"{published!r} is not a token")
    flags = {"content": published} if isinstance(published, str) else _flags(published)
    return AddedToken(**flags | {"special": True})


def _content(published: Any) -> Any:
    return published.get("content") if isinstance(published, dict) else published


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in token.items() if name != "__type"}


def tokenizer_files(
    backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], max_length: int
) -> dict[str, bytes]:
    """The inverse of `read_tokenizer`: file name -> contents."""
    serialised = backend.to_str(pretty=True)
    parts = json.loads(serialised)
    normalizer = parts["normalizer"] or {}
    added = {token["content"]: token["id"] for token in parts["added_tokens"]}
    # What transformers makes of the vocabulary and the three settings, when it reads "BertTokenizer":
    is_bert = (
        normalizer.get("type") == "BertNormalizer"
        and normalizer["clean_text"]
        and parts["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and {key: parts["model"].get(key) for key in WORDPIECE} == WORDPIECE
        and added.keys() >= {*SPECIAL_TOKENS.values()}
        and parts["post_processor"] == json.loads(_template(added).__getstate__())
    )
    settings = {
        "tokenizer_class": "BertTokenizer" if is_bert else "PreTrainedTokenizerFast",
        "do_lower_case": normalizer.get("lowercase", True),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        "model_max_length": max_length,
        "split_special_tokens": backend.encode_special_tokens,  # in text, which then cannot hold any
        # One that is not added yet would be, by transformers, and found in texts; but it must know what pads.
        **{name: token for name, token in special_tokens.items() if token in added or name == "pad_token"},
    }
    return {"tokenizer.json": serialised.encode(), "tokenizer_config.json": to_json(settings)}
