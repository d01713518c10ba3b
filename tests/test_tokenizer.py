"""Ids, masks and types equal AutoTokenizer's; loading, truncation, and what is refused."""

import json
import math
import random
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers import BertConfig as HFConfig
from transformers import BertModel as HFBertModel

from minibert import SentenceEncoder, Tokenizer
from weights import CheckpointError

HAND_PICKED = [
    "", " ", "\n\t \r", "a", "The quick brown fox jumps over the lazy dog.",
    "Ünïcödé àccénts ÀÉÎÕÜ ñ ç ß ø đ ł", "e\u0301 combining a\u0308", "İstanbul ı DŽ ﬁ ﬂ ﬀ", "ΣΊΣΥΦΟΣ σίσυφος ς",
    "你好世界", "日本語のテキスト カタカナ ｶﾀｶﾅ", "한국어 텍스트", "mixed 中文 and English中文words", "𠀀𪚥", "العربية نص", "עברית",
    "हिन्दी पाठ", "ภาษาไทย", "Привет, мир! Ёлка", "😀 😃👍🏽", "👨‍👩‍👧‍👦 family", "🏳️‍🌈", "a\u200db zero\u200bwidth\u2060joiner\ufeff",
    "\x00null", "\x07bell\x1b[0m", "soft\u00adhyphen", "\u202ertl override", "private \ue000 use", "replacement \ufffd char",
    "a" * 100, "a" * 101, "x" * 99 + " " + "y" * 250, "Donaudampfschifffahrtsgesellschaftskapitän",
    "!!!???...,,,;;;:::", "--- *** ### $$$ %%% ^^^ &&& ((( ))) ___ +++ === ~~~ ```", "don't can't won't I'm you're",
    "“quotes” ‘single’ «guillemets» – — … • ° © ® ™", "€ £ ¥ ₹ ₿ 100% #1 @user", "http://example.com/a?b=c&d=e#f",
    "user@example.com", "3.14159 1,000,000 1e-10 0x7f ½ ² ①", "CamelCaseWord snake_case_word kebab-case-word", "U.S.A. Ph.D. e.g. i.e.",
    "[MASK]", "The [MASK] sat on the [MASK].", "[CLS] inside [SEP] text [PAD] [UNK]", "[mask] [Mask] [MASK]s x[MASK]y [ MASK ]",
    "##ing ##s # #", "[unused0] [unused99]", "tab\tseparated\tvalues", "non\u00a0breaking\u2003em\u3000ideographic", "line\u2028separator\u2029para",
    "<b>html</b> &amp; <br/>", "{'json': [1, 2]}", "\\backslash \\n literal", "ﷺ", "Å Å", "ⅷ Ⅷ", "𝕱𝖗𝖆𝖐𝖙𝖚𝖗 𝒮𝒸𝓇𝒾𝓅𝓉",
]  # fmt: skip

PIECES = [
    *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789",
    *".,;:!?'\"-()[]{}<>/\\|@#$%^&*_+=~`",
    *" \t\n\r\u00a0\u2003\u3000\u200b\u200d\u00ad\ufeff\x00\x1f\x7f\x85\u2028",
    *"àéîõüñçßøđłžÀÉİıΩΣςЖё中文日本語한글अภ",
    *"😀👍🏽🏳🌈\ufe0f𠀀𝕱\u0301\u0308\u0327",
    " the ", " running", "ization", "un", "[MASK]", "[CLS]", "[SEP]", "##ed", "antidisestablishmentarianism",
]  # fmt: skip


def generated(count: int) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        texts.append("".join(rng.choices(PIECES, k=rng.choice([1, 2, 5, 20, 80]))))
    # and code points from anywhere but the surrogates
    for _ in range(count // 4):
        points = [rng.randrange(1, rng.choice([0x300, 0x3000, 0x10000, 0x110000])) for _ in range(12)]
        texts.append("".join(chr(point) for point in points if not 0xD800 <= point < 0xE000))
    return texts


TEXTS = HAND_PICKED + generated(2000)


def layout(source: Path, directory: Path, files: list[str], **settings: Any) -> Path:
    """A model directory with only these tokenizer files, and this tokenizer_config.json."""
    directory.mkdir()
    for file in ["config.json", *files]:
        shutil.copy(source / file, directory)
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(
    params=[
        (["tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"], {}),
        (["tokenizer.json"], {}),
        (["tokenizer.json"], {"do_lower_case": False}),
        (["tokenizer.json"], {"strip_accents": False, "tokenize_chinese_chars": False}),
        (["vocab.txt"], {}),
        (["vocab.txt"], {"do_lower_case": False}),
        (["vocab.txt"], {"strip_accents": False, "do_lower_case": True}),
        (["vocab.txt"], {"tokenize_chinese_chars": False}),
        (["vocab.txt"], {"strip_accents": None, "model_max_length": None}),
    ],
    ids=str,
)
def directory(request: pytest.FixtureRequest, minilm: Path, tmp_path: Path) -> Path:
    files, settings = request.param
    return layout(minilm, tmp_path / "model", files, **settings)


def assert_same_ids(directory: Path, texts: list[str]) -> Any:
    """Of this directory's tokenizer as transformers and as we load it; returns them."""
    expected = AutoTokenizer.from_pretrained(directory)(texts)["input_ids"]
    assert Tokenizer.from_pretrained(directory).token_ids(texts) == expected
    return expected


def assert_same_ids_when_saved(directory: Path, texts: list[str]) -> Any:
    expected = assert_same_ids(directory, texts)
    Tokenizer.from_pretrained(directory).save_pretrained(directory)
    again = assert_same_ids(directory, texts)
    assert again == expected
    return expected


MASK = {"content": "[MASK]", "lstrip": True, "normalized": True, "single_word": True, "special": True}
ADDED = {"content": "[ENT]", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize(
    ("settings", "others"),
    [
        (
            {"tokenizer_class": "BertTokenizer"},
            {"added_tokens.json": {"[unused5]": 6, "[NEXT]": 30523, "[ENT]": 30522}},
        ),
        ({"added_tokens_decoder": {"30522": ADDED | {"special": True, "__type": "AddedToken"}}}, {}),
        ({"added_tokens_decoder": {"30522": {**ADDED, "special": False}}}, {"added_tokens.json": {"x": 30522}}),
        ({"additional_special_tokens": ["[unused5]", {**ADDED, "__type": "AddedToken"}]}, {}),
        ({"extra_special_tokens": ["[unused5]", "[ENT]"]}, {}),
        ({"extra_special_tokens": {}, "additional_special_tokens": ["[ENT]"]}, {}),
        ({"bos_token": "[BOS]", "additional_special_tokens": ["[ENT]"]}, {}),
        ({"pad_token": "[PAD]"}, {"special_tokens_map.json": {"pad_token": "[ENT]"}}),
        ({"mask_token": "<mask>"}, {}),
        ({"pad_token": "[unused5]"}, {}),
        ({"tokenizer_class": "ElectraTokenizerFast", "additional_special_tokens": ["foo"]}, {}),
        (
            {"extra_special_tokens": [ADDED | {"content": "foo", "single_word": True, "__type": "AddedToken"}]},
            {},
        ),
        ({"mask_token": {**MASK, "__type": "AddedToken"}}, {}),
        ({"added_tokens_decoder": {"103": MASK}}, {}),
        ({}, {"special_tokens_map.json": {"mask_token": MASK}}),
        ({}, {"special_tokens_map.json": {"additional_special_tokens": ["[unused5]"]}}),
        ({}, {"special_tokens_map.json": {"mask_token": "[MASK]"}, "added_tokens.json": {"[ENT]": 30522}}),
    ],
)
def test_added_tokens_are_autotokenizers(
    minilm: Path, tmp_path: Path, file: str, settings: dict[str, Any], others: dict[str, Any]
) -> None:
    directory = layout(minilm, tmp_path / "model", [file], **settings)
    for name, content in others.items():
        (directory / name).write_text(json.dumps(content))
    texts = [
        "Hello É [ENT] x",
        "[ent] [unused5] foo[unused5]bar",
        "naïve 中文 [ENT]y [MASK].",
        "a [mask] b[mask]",
        "<mask> [PAD]",
    ]
    assert_same_ids_when_saved(directory, texts)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {}, "extra_special_tokens": ["foo"]},
        {"added_tokens_decoder": {"103": MASK}, "mask_token": "[MASK]"},
        {"added_tokens_decoder": {"103": MASK}},
        {"mask_token": "[MASK]", "extra_special_tokens": ["foo"]},
        {"tokenizer_class": "BertTokenizerFast"},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
    ],
)
@pytest.mark.parametrize("older", [{}, {"foo": 29379}])
def test_whose_added_tokens_count(
    minilm: Path, tmp_path: Path, settings: dict[str, Any], older: dict[str, int]
) -> None:
    """Of a token that tokenizer.json and the files beside it add in two ways."""
    directory = layout(minilm, tmp_path / "model", ["tokenizer.json"], **settings)
    parts = json.loads((directory / "tokenizer.json").read_text())
    parts["added_tokens"] = [
        token | {"normalized": token["content"] == "[MASK]"} for token in parts["added_tokens"]
    ]
    parts["added_tokens"].append(ADDED | {"id": 30522, "content": "foo", "single_word": True, "special": False})
    parts["added_tokens"].append(ADDED | {"id": 30523, "content": "zzcov", "special": False})
    (directory / "tokenizer.json").write_text(json.dumps(parts))
    (directory / "added_tokens.json").write_text(json.dumps(older))
    assert_same_ids(directory, ["na\u00efve [MASK].", "a [mask] b[MASK]c", "foo xfoo", "zzcovid"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("added_tokens.json", {"[ENT]": 30600}, "token '[ENT]' should have the id 30600, but would have 30522"),
        ("added_tokens.json", {"[ENT]": math.inf}, "has added tokens that cannot be read: cannot convert"),
        ("added_tokens.json", {"[ENT]": "one"}, "has added tokens that cannot be read: invalid literal"),
        ("special_tokens_map.json", {"pad_token": 5}, "has added tokens that cannot be read: 5 is not a token"),
        ("special_tokens_map.json", {"cls_token": "[unused5]"}, "cls_token is '[unused5]', of a BertTokenizer"),
        ("special_tokens_map.json", {"additional_special_tokens": "[ENT]"}, "'[ENT]' is not a list of tokens"),
        ("special_tokens_map.json", {"pad_token": "<pad>"}, None),
    ],
)
def test_bad_added_tokens(
    minilm: Path, tmp_path: Path, file: str, content: dict[str, Any], message: str | None
) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    (directory / file).write_text(json.dumps(content))
    if message is None:  # a new token, which is what texts are padded with
        ours, theirs = Tokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
        assert ours(["a", "a b"])["input_ids"].tolist() == theirs(["a", "a b"], padding=True)["input_ids"]
        return
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_pretrained(directory)
    assert message in str(caught.value)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_another_kind_of_tokenizer_is_refused(minilm: Path, tmp_path: Path, where: str) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    settings = json.loads((directory / where).read_text()) if where == "config.json" else {}
    (directory / where).write_text(json.dumps(settings | {"tokenizer_class": "BertJapaneseTokenizer"}))
    with pytest.raises(CheckpointError, match="wants a BertJapaneseTokenizer, which is not supported without"):
        Tokenizer.from_pretrained(directory)


@pytest.mark.parametrize("kind", [None, "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("cased", [True, False, None])
def test_whose_normalizer_counts(minilm: Path, tmp_path: Path, kind: str | None, cased: bool | None) -> None:
    """tokenizer_config.json's of a BertTokenizer, tokenizer.json's of any other class."""
    settings: dict[str, Any] = {"tokenizer_class": kind} if kind else {}
    if cased is not None:
        settings["do_lower_case"] = not cased
    for number, normalizer in enumerate(
        [None, {"lowercase": False, "strip_accents": False}, {"lowercase": True}]
    ):
        directory = layout(minilm, tmp_path / str(number), ["tokenizer.json"], **settings)
        published = json.loads((directory / "tokenizer.json").read_text())
        published["normalizer"] = normalizer and published["normalizer"] | normalizer
        (directory / "tokenizer.json").write_text(json.dumps(published))
        assert_same_ids(directory, ["Hello É 中文 World"])


def other_parts() -> dict[str, Callable[[Any], Any]]:
    """Of a tokenizer.json whose vocabulary is all that a BertTokenizer takes."""
    return {
        "no template": lambda parts: parts.update(post_processor=None),
        "other template": lambda parts: parts["post_processor"]["single"].pop(),
        "other unknown": lambda parts: parts["model"].update(unk_token="[unused5]"),
        "other prefix": lambda parts: parts["model"].update(continuing_subword_prefix="@@"),
        "longest word": lambda parts: parts["model"].update(max_input_chars_per_word=9),
        "no added tokens": lambda parts: parts.update(added_tokens=[]),
        "no [MASK]": lambda parts: parts["added_tokens"].pop() and parts["model"]["vocab"].pop("[MASK]"),
        "no decoder": lambda parts: parts.update(decoder=None),
    }


@pytest.mark.parametrize("kind", [None, "BertTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("part", other_parts())
def test_whose_parts_count(minilm: Path, tmp_path: Path, kind: str | None, part: str) -> None:
    names = {name: f"[{name[:-6].upper()}]" for name in ("cls_token", "sep_token", "pad_token", "unk_token")}
    directory = layout(minilm, tmp_path / "model", [], **({"tokenizer_class": kind} if kind else {}), **names)
    parts = json.loads((minilm / "tokenizer.json").read_text())
    other_parts()[part](parts)
    (directory / "tokenizer.json").write_text(json.dumps(parts))
    texts = ["Hello uncharacteristically [MASK] \u4e2d\U0001f600", "", "word " * 20 + "[CLS]"]
    assert_same_ids_when_saved(directory, texts)


@pytest.mark.parametrize("split", [True, False])
def test_special_tokens_in_texts(minilm: Path, tmp_path: Path, split: bool) -> None:
    directory = layout(minilm, tmp_path / "model", ["tokenizer.json"], split_special_tokens=split)
    ids = assert_same_ids_when_saved(directory, ["Hello [SEP] World caf\u00e9 [MASK] x", "[CLS]"])
    assert (103 in ids[0]) != split


@pytest.mark.parametrize("end", [" ", "\t", "\u00a0", "\r", "\x0c", "\x1c"])
def test_white_space_behind_a_token(minilm: Path, tmp_path: Path, end: str) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    lines = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
    lines[lines.index("hello")] += end
    (directory / "vocab.txt").write_text("\n".join(lines), encoding="utf-8", newline="")
    assert_same_ids(directory, ["hello"])


def test_truncation_from_the_left_is_refused(minilm: Path, tmp_path: Path) -> None:
    directory = layout(minilm, tmp_path / "model", ["tokenizer.json"])
    parts = json.loads((directory / "tokenizer.json").read_text())
    parts["truncation"]["direction"] = "Left"
    (directory / "tokenizer.json").write_text(json.dumps(parts))
    with pytest.raises(CheckpointError, match="truncation from the left is not supported"):
        Tokenizer.from_pretrained(directory)
    (directory / "tokenizer_config.json").write_text('{"truncation_side": "right"}')
    assert Tokenizer.from_pretrained(directory).token_ids(["hello"]) == [[101, 7592, 102]]


@pytest.mark.parametrize("part", ["pre_tokenizer", "clean_text", "longest", "none"])
def test_a_tokenizer_of_ones_own_is_saved_as_it_is(minilm: Path, tmp_path: Path, part: str) -> None:
    parts = json.loads((minilm / "tokenizer.json").read_text())
    if part == "pre_tokenizer":
        parts["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    elif part == "clean_text":
        parts["normalizer"]["clean_text"] = False
    elif part == "longest":
        parts["model"]["max_input_chars_per_word"] = 9
    directory = layout(minilm, tmp_path / "model", [])
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(parts)))
    tokenizer.save_pretrained(directory)
    texts = ["it's a well-known case", "un\u0007known uncharacteristically"]
    expected = tokenizer.token_ids(texts)
    assert (expected == Tokenizer.from_pretrained(minilm).token_ids(texts)) == (part == "none")
    saved = assert_same_ids(directory, texts)
    assert saved == expected


def test_the_tokens_of_multilingual_models(tmp_path: Path) -> None:
    """BERTs with XLM-R's tokenizer: <s>, </s>, <pad>, and SentencePiece's unigrams."""
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁hello", -3.0), ("▁world", -3.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz▁"]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"cls_token": "<s>", "pad_token": "<pad>", "sep_token": "</s>", "unk_token": "<unk>"}
    backend.add_special_tokens([*names.values(), "<mask>"])
    directory = tmp_path / "model"
    config = HFConfig(
        vocab_size=34, hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=7
    )
    HFBertModel(config).save_pretrained(directory)
    mask = ADDED | {"content": "<mask>", "lstrip": True, "__type": "AddedToken"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "mask_token": mask}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    backend.save(str(directory / "tokenizer.json"))
    texts = ["hello world", "a <mask> hello", "ü"]
    expected = AutoTokenizer.from_pretrained(directory)(texts, padding=True)["input_ids"]
    encoder = SentenceEncoder.from_pretrained(directory)
    assert encoder.tokenizer(texts)["input_ids"].tolist() == expected
    encoder.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts, padding=True)["input_ids"] == expected
    assert np.array_equal(
        SentenceEncoder.from_pretrained(tmp_path / "again").encode(texts), encoder.encode(texts)
    )


def test_ids_equal_autotokenizers(directory: Path) -> None:
    assert len(TEXTS) > 2000
    ours = Tokenizer.from_pretrained(directory).token_ids(TEXTS, max_length=512)
    expected = AutoTokenizer.from_pretrained(directory)(TEXTS, truncation=True, max_length=512)["input_ids"]
    different = [text for text, a, b in zip(TEXTS, ours, expected, strict=True) if a != b]
    assert not different, f"{len(different)} texts differ, the first is {different[0]!a}"


@pytest.mark.filterwarnings("ignore:.*texts cut to")
@pytest.mark.parametrize("max_length", [512, 16, 5])
def test_batches_equal_autotokenizers(minilm: Path, max_length: int) -> None:
    ours = Tokenizer.from_pretrained(minilm)
    reference = AutoTokenizer.from_pretrained(minilm)
    rng = random.Random(1)
    texts = TEXTS if max_length > 5 else TEXTS[::5]  # cut to so little each leaves much over, which takes time
    pairs = rng.sample(texts, len(texts))
    for start in range(0, len(texts), 37):
        firsts, seconds = texts[start : start + 37], pairs[start : start + 37]
        for arguments in ((firsts,), (firsts, seconds)):
            expected = reference(
                *arguments, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
            )
            batch = ours(*arguments, max_length=max_length)
            assert batch.keys() == expected.keys()
            for name in batch:
                assert batch[name].dtype == expected[name].dtype
                assert torch.equal(batch[name], expected[name]), name


def test_single_text_is_a_batch_of_one(minilm: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(minilm)
    assert tokenizer("hello")["input_ids"].tolist() == [[101, 7592, 102]]
    pair = tokenizer("hello", "world")
    assert pair["input_ids"].tolist() == [[101, 7592, 102, 2088, 102]]
    assert pair["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


def test_baked_in_padding_and_truncation_are_ignored(minilm: Path) -> None:
    baked = json.loads((minilm / "tokenizer.json").read_text())
    assert baked["truncation"]["max_length"] == 128
    assert baked["padding"]["strategy"] == {"Fixed": 128}
    batch = Tokenizer.from_pretrained(minilm)(["a " * 200, "b"])
    assert batch["input_ids"].shape == (2, 202)


def test_around_a_backend_of_ones_own() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 2}, "[UNK]"))
    batch = Tokenizer(backend)(["a", ""])
    assert batch["input_ids"].tolist() == [[1], [2]]
    assert batch["token_type_ids"].tolist() == [[0], [0]]
    with pytest.raises(ValueError, match=r"the vocabulary has no <pad> token"):
        Tokenizer(backend, special_tokens={"pad_token": "<pad>"})
    tokenizer = Tokenizer(backend, special_tokens={"pad_token": "a"})
    assert json.loads(tokenizer.files()["tokenizer_config.json"])["pad_token"] == "a"  # or none could load it


@pytest.mark.parametrize("kind", ["a name", "transformers'"])
def test_a_tokenizer_in_place_of_a_backend(minilm: Path, kind: str) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(minilm) if kind == "transformers'" else "bert-base-uncased"
    with pytest.raises(
        TypeError, match=r"backend is a .*, it must be a tokenizers.Tokenizer \(of transformers'"
    ):
        Tokenizer(theirs)
    if kind == "transformers'":
        assert Tokenizer(theirs.backend_tokenizer).token_ids("hello") == [[101, 7592, 102]]


@pytest.mark.filterwarnings("ignore:.*texts cut to")
def test_saved_beside_a_model(minilm: Path, tmp_path: Path) -> None:
    """In place of all files of another one that was there."""
    directory = layout(
        minilm, tmp_path / "model", ["vocab.txt", "special_tokens_map.json"], do_lower_case=False
    )
    (directory / "added_tokens.json").write_text('{"<old>": 30522}')
    tokenizer = Tokenizer.from_pretrained(minilm)
    tokenizer.backend.add_tokens(["<new>"])
    tokenizer.max_length = 77
    tokenizer.save_pretrained(directory)
    texts = [*TEXTS[:50], "<new> and <old>"]
    reference = AutoTokenizer.from_pretrained(directory)
    assert reference.model_max_length == 77
    again = Tokenizer.from_pretrained(directory)
    assert again.max_length == 77
    expected = reference(texts, truncation=True)["input_ids"]
    assert tokenizer.token_ids(texts) == again.token_ids(texts) == expected
    assert 30522 in expected[-1]
    assert not any((directory / name).exists() for name in ("vocab.txt", "added_tokens.json"))


@pytest.mark.parametrize("setting", ["do_lower_case", "strip_accents", "tokenize_chinese_chars"])
def test_settings_are_saved(minilm: Path, tmp_path: Path, setting: str) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"], **{setting: False})
    assert_same_ids_when_saved(directory, ["Caf\u00e9 na\u00efve \u4e2d\u6587"])


def test_padding_of_the_backend_is_not_encoded(minilm: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(minilm)
    tokenizer.backend.enable_padding(length=40)
    assert tokenizer.token_ids(["hello"]) == [[101, 7592, 102]]
    assert tokenizer(["hello"])["input_ids"].shape == (1, 3)


def test_limit_is_the_models_own(minilm: Path, tmp_path: Path) -> None:
    assert Tokenizer.from_pretrained(minilm).max_length == 256  # sentence_bert_config.json
    bare = layout(minilm, tmp_path / "a", ["vocab.txt"])
    assert Tokenizer.from_pretrained(bare).max_length == 512  # config.json
    shorter = layout(minilm, tmp_path / "b", ["vocab.txt"], model_max_length=99)
    assert Tokenizer.from_pretrained(shorter).max_length == 99
    older = layout(minilm, tmp_path / "d", ["vocab.txt"], max_len=98)
    assert Tokenizer.from_pretrained(older).max_length == AutoTokenizer.from_pretrained(older).model_max_length
    unlimited = layout(minilm, tmp_path / "c", ["vocab.txt"], model_max_length=int(1e30))
    assert Tokenizer.from_pretrained(unlimited).max_length == 512
    longer = layout(minilm, tmp_path / "e", ["vocab.txt", "sentence_bert_config.json"], model_max_length=99)
    assert Tokenizer.from_pretrained(longer).max_length == 256
    # as sentence-transformers called it for a DistilBERT, before it had one name for all
    (unlimited / "sentence_distilbert_config.json").write_text('{"max_seq_length": 128}')
    assert Tokenizer.from_pretrained(unlimited).max_length == 128


def test_cut_texts_are_counted_once_per_call(minilm: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(minilm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tokenizer(["word " * 300, "short", "word " * 254, "word " * 255])["input_ids"].shape == (4, 256)
    assert [str(w.message) for w in caught] == ["2 of 4 texts cut to 256 tokens"]
    with pytest.warns(UserWarning, match="1 of 1 texts cut to 4 tokens"):
        tokenizer("one two three four five six", max_length=4)
    with pytest.warns(UserWarning, match="1 of 1 texts cut to 2 tokens"):
        assert tokenizer.token_ids("one", max_length=2) == [[101, 102]]
    assert len(tokenizer.backend.encode("word " * 300).ids) == 302  # which cuts nothing by itself


def test_distilbert_has_no_token_types(minilm: Path, tmp_path: Path) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    (directory / "config.json").write_text(
        json.dumps({"model_type": "distilbert", "max_position_embeddings": 64})
    )
    tokenizer = Tokenizer.from_pretrained(directory)
    assert list(tokenizer("a")) == ["input_ids", "attention_mask"]
    assert tokenizer.max_length == 64


def test_null_is_as_good_as_absent(minilm: Path, tmp_path: Path) -> None:
    nothing = dict.fromkeys(("do_lower_case", "strip_accents", "tokenize_chinese_chars", "model_max_length"))
    for files in (["vocab.txt"], ["tokenizer.json"]):
        directory = layout(minilm, tmp_path / files[0], files, **nothing)
        assert Tokenizer.from_pretrained(directory)("Héllo")["input_ids"].tolist() == [[101, 7592, 102]]


def test_windows_line_ends_in_a_vocabulary(minilm: Path, tmp_path: Path) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    (directory / "vocab.txt").write_bytes((directory / "vocab.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(directory)("hello")["input_ids"].tolist() == [[101, 7592, 102]]


@pytest.mark.parametrize(
    ("texts", "pairs", "options", "error", "message"),
    [
        ([], None, {}, ValueError, "no texts to tokenize: the batch is empty"),
        (["a", 3], None, {}, TypeError, "text 1 is int (3), it must be a string"),
        (["a", None], None, {}, TypeError, "text 1 is NoneType (None)"),
        ([b"bytes"], None, {}, TypeError, "text 0 is bytes"),
        (["a"], [5], {}, TypeError, "text pair 0 is int"),
        (
            ["ok", "bad \ud800 one"],
            None,
            {},
            ValueError,
            "text 1 is not valid Unicode: character 4 is a lone surrogate ('\\ud800')",
        ),
        (["a", "b"], ["c"], {}, ValueError, "2 texts but 1 text_pairs"),
        (
            ["a"],
            None,
            {"max_length": 1},
            ValueError,
            "max_length is 1, it must be an integer from 2 (special tokens) up",
        ),
        (
            ["a"],
            ["b"],
            {"max_length": 2},
            ValueError,
            "max_length is 2, it must be an integer from 3 (special tokens) up",
        ),
        (["a"], None, {"max_length": -1}, ValueError, "max_length is -1"),
        (["a"], None, {"max_length": 5.5}, ValueError, "max_length is 5.5"),
        (5, None, {}, TypeError, "the texts are int, they must be a string or several"),
        ({"a": "b"}, None, {}, TypeError, "the texts are dict"),
    ],
)
def test_bad_texts(
    minilm: Path, texts: Any, pairs: Any, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        Tokenizer.from_pretrained(minilm)(texts, pairs, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        (
            "tokenizer_config.json",
            {"model_max_length": "x"},
            "model_max_length is 'x', it must be a number of tokens",
        ),
        ("tokenizer_config.json", {"model_max_length": float("inf")}, "model_max_length is inf"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side is 'left', only 'right' is"),
        (
            "tokenizer_config.json",
            {"do_lower_case": "yes"},
            "do_lower_case is 'yes', it must be true, false or null",
        ),
        ("tokenizer_config.json", {"strip_accents": 0}, "strip_accents is 0, it must be true, false or null"),
        ("sentence_bert_config.json", {"max_seq_length": -5}, "max_seq_length is -5"),
        ("sentence_bert_config.json", {"max_seq_length": 64.5}, "max_seq_length is 64.5"),
        ("config.json", {"type_vocab_size": None}, "type_vocab_size is None, it must be an integer from 0 up"),
    ],
)
def test_bad_settings(minilm: Path, tmp_path: Path, file: str, settings: dict[str, Any], message: str) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    (directory / file).write_text(json.dumps(settings))
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_pretrained(directory)
    assert f"{directory / file}: {message}" in str(caught.value)


def test_sentence_transformers_lower_casing(minilm: Path, tmp_path: Path) -> None:
    directory = layout(minilm, tmp_path / "model", ["vocab.txt"])
    (directory / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    Tokenizer.from_pretrained(directory)  # it lower-cases anyway
    (directory / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    with pytest.raises(CheckpointError, match="says do_lower_case but the tokenizer is cased"):
        Tokenizer.from_pretrained(directory)
    parts = json.loads((minilm / "tokenizer.json").read_text())
    parts["normalizer"]["lowercase"] = False  # which counts where the class is not BERT's
    (directory / "tokenizer.json").write_text(json.dumps(parts))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="says do_lower_case but the tokenizer is cased"):
        Tokenizer.from_pretrained(directory)


class Slow:
    """A backend that gives other threads time to come in between."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def enable_truncation(self, limit: int) -> None:
        self.backend.enable_truncation(limit)
        time.sleep(0.01)


@pytest.mark.filterwarnings("ignore:.*texts cut to")
def test_threads_do_not_disturb_each_other(minilm: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(minilm)
    tokenizer.backend = Slow(tokenizer.backend)  # type: ignore[assignment]
    limits, files = [16, 32, 64, 128] * 6, tokenizer.files()

    def longest(limit: int) -> int:
        return len(tokenizer.token_ids("word " * 300, max_length=limit)[0])

    with ThreadPoolExecutor(4) as pool:
        lengths = pool.map(longest, limits)
        assert tokenizer.files() == files  # which do not say what limit another thread is at
        assert list(lengths) == limits


def test_a_backend_that_fails_cuts_nothing_afterwards(minilm: Path) -> None:
    class Failing:
        def pre_tokenize(self, _: object) -> None:
            raise LookupError("of the user's own")

    tokenizer = Tokenizer.from_pretrained(minilm)
    part = tokenizer.backend.pre_tokenizer
    tokenizer.backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Failing())
    with pytest.raises(Exception, match="of the user's own"):
        tokenizer.token_ids(["one", "two"], max_length=3)
    tokenizer.backend.pre_tokenizer = part
    assert tokenizer.backend.truncation is None


def test_bad_files(minilm: Path, tmp_path: Path) -> None:
    directory = layout(minilm, tmp_path / "model", [])
    with pytest.raises(CheckpointError, match=r"has no tokenizer: neither tokenizer.json nor vocab.txt"):
        Tokenizer.from_pretrained(directory)
    (directory / "vocab.txt").write_text("[PAD]\n[CLS]\nhello\n")
    with pytest.raises(CheckpointError, match=r"vocab.txt lacks the tokens \[SEP\], \[UNK\]: it is"):
        Tokenizer.from_pretrained(directory)
    (directory / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"vocab.txt cannot be read as UTF-8 text"):
        Tokenizer.from_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not a tokenizer this can read"):
        Tokenizer.from_pretrained(directory)
    published = json.loads((minilm / "tokenizer.json").read_text())
    del published["model"]["vocab"]["[UNK]"]
    (directory / "tokenizer.json").write_text(json.dumps(published))
    with pytest.raises(CheckpointError, match=r"tokenizer.json lacks \[UNK\] in its vocabulary"):
        Tokenizer.from_pretrained(directory)
