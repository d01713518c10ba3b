"""`encode`: shapes, order, batching, normalisation, saving; sentence-transformers as oracle."""

import io
import json
import random
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from heads import MLPHead, MultiTaskModel
from minibert import SentenceEncoder, Tokenizer, mean_pooling
from minibert.fast_inference import FastModel, run
from minibert.packing import PackedBatch
from minibert.sentence_encoder import POOLINGS
from tests.fast_reference import random_encoder
from weights import CheckpointError

WORDS = "a the cat sat on mat quick brown fox jumps over lazy dog sky blue unbelievable 2024 ! , .".split()


def sentences(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(0, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def encoder(minilm: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(minilm)


@pytest.fixture
def tiny_encoder(minilm: Path) -> SentenceEncoder:
    return random_encoder(minilm).train()


def test_equals_sentence_transformers(encoder: SentenceEncoder, minilm: Path) -> None:
    texts = [*sentences(70), "word " * 200]
    expected = SentenceTransformer(str(minilm), device="cpu").encode(texts)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=5e-7)


def test_the_limit_is_set_as_in_sentence_transformers(minilm: Path) -> None:
    encoder, theirs = SentenceEncoder.from_pretrained(minilm), SentenceTransformer(str(minilm), device="cpu")
    assert encoder.max_seq_length == theirs.max_seq_length == 256
    encoder.max_seq_length = theirs.max_seq_length = 11
    text = sentences(1, 40, seed=3)[0]
    with pytest.warns(UserWarning, match="1 of 1 texts cut to 11 tokens"):
        ours = encoder.encode(text)
    np.testing.assert_allclose(ours, theirs.encode(text), atol=5e-7)
    encoder.max_seq_length = 600  # more than there are positions
    with pytest.raises(ValueError, match="input_ids is 600 tokens long, this model has positions for 512"):
        encoder.encode(["word " * 600, "short"])


def test_the_order_is_kept(tiny_encoder: SentenceEncoder) -> None:
    texts = ["a b c", "a", "a b c d e", "a b"]
    alone = np.stack([tiny_encoder.encode(text) for text in texts])
    np.testing.assert_allclose(tiny_encoder.encode(texts, 3), alone, atol=1e-5)


def test_shapes_and_types(encoder: SentenceEncoder) -> None:
    one = encoder.encode("hello")
    assert isinstance(one, np.ndarray)
    assert (one.shape, one.dtype.name) == ((384,), "float32")
    many = encoder.encode(("hello", "two words"))
    assert (many.shape, many.dtype.name) == ((2, 384), "float32")
    none = encoder.encode([])
    assert (none.shape, none.dtype.name) == ((0, 384), "float32")
    tensor = encoder.encode("hello", convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(one))
    assert not tensor.requires_grad
    assert encoder.encode(iter(["hello"])).shape == (1, 384)
    assert encoder.encode(np.array(["hello", "x"])).shape == (2, 384)
    assert encoder.encode(np.array(["hello", "x"])[0]).shape == (384,)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "texts", [["a", "b c"], ["a"] * 4097, [], "a"], ids=["one block", "two", "none", "str"]
)
def test_heads_can_be_trained_on_what_is_given_back(
    tiny_encoder: SentenceEncoder, texts: str | list[str], normalize: bool
) -> None:
    """Also if it was called in inference mode, whose tensors cannot be saved for backward."""
    with torch.inference_mode():
        embeddings = tiny_encoder.encode(texts, normalize_embeddings=normalize, convert_to_tensor=True)
    assert not embeddings.is_inference()
    embeddings *= nn.Parameter(torch.ones(36))  # nor is it a view that was made there


def test_batches_are_cut_from_the_sorted_sentences(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []

    def noting(fast: FastModel, batch: PackedBatch, *, compiled: bool) -> Tensor:
        tokens.append(len(batch.input_ids))
        return run(fast, batch, compiled=compiled)

    monkeypatch.setattr("minibert.fast_inference.run", noting)
    encoder.encode(["a", "a b c d", "a b", "a b c", "a b c d e"], batch_size=2)
    encoder.encode(["a", "a b c d", "a b", "a b c", "a b c d e"])
    assert tokens == [7 + 6, 5 + 4, 3, 25]  # longest first, and nothing is padded


def test_what_would_be_lost_is_not_saved(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder = SentenceEncoder(tiny_encoder.model, tiny_encoder.tokenizer)
    encoder.dense = nn.Linear(36, 7)
    with pytest.raises(ValueError, match=r"dense.weight, dense.bias would be lost"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    encoder.save_pretrained(tmp_path / "saved", {"dense.safetensors": encoder.dense.state_dict()})
    assert (tmp_path / "saved" / "dense.safetensors").is_file()


def test_normalisation_is_the_checkpoints_unless_told(
    encoder: SentenceEncoder, tiny_encoder: SentenceEncoder
) -> None:
    texts = sentences(5)
    lengths = np.linalg.norm(encoder.encode(texts), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)  # MiniLM's modules.json says so
    raw = encoder.encode(texts, normalize_embeddings=False)
    assert (abs(np.linalg.norm(raw, axis=1) - 1) > 0.1).all()
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw, axis=1, keepdims=True), encoder.encode(texts), atol=1e-6
    )
    assert not tiny_encoder.normalize_embeddings  # a bare checkpoint


def test_training_mode_is_left_as_it_was(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.train()
    tiny_encoder.model.layers[0].eval()  # as a frozen layer would be
    modes = [module.training for module in tiny_encoder.modules()]
    first, second = (tiny_encoder.encode("no dropout here") for _ in range(2))
    assert (first == second).all()
    assert [module.training for module in tiny_encoder.modules()] == modes
    with pytest.raises(TypeError):
        tiny_encoder.encode([3])  # type: ignore[list-item]
    assert [module.training for module in tiny_encoder.modules()] == modes


def test_what_is_loaded_is_in_eval_mode(minilm: Path) -> None:
    assert not any(module.training for module in SentenceEncoder.from_pretrained(minilm).modules())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_from_pretrained_is_told(minilm: Path, dtype: torch.dtype | None) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm, attention="eager", dtype=dtype, compile=True)
    assert encoder.model.attention == "eager"
    with pytest.raises(ValueError, match="compile=True needs a GPU"):
        encoder.encode("one text")


def test_forward_can_be_trained(tiny_encoder: SentenceEncoder) -> None:
    batch = tiny_encoder.tokenizer(["a cat", "the dog sat"])
    embeddings = tiny_encoder(**batch)
    assert embeddings.shape == (2, 36)
    others = {**batch, "token_type_ids": torch.ones_like(batch["input_ids"])}
    tiny_encoder.eval()
    hidden = tiny_encoder.model(**others).last_hidden_state
    assert torch.equal(tiny_encoder(**others), mean_pooling(hidden, batch["attention_mask"]))
    embeddings.sum().backward()
    assert tiny_encoder.model.layers[0].attention.query.weight.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(minilm: Path, encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    texts = sentences(9)
    other = SentenceEncoder.from_pretrained(minilm, dtype=dtype)
    embeddings = other.encode(texts)
    assert embeddings.dtype == np.float32
    cosines = (embeddings * encoder.encode(texts)).sum(1)
    assert cosines.min() > 0.999
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert other.encode(texts, convert_to_tensor=True).dtype == wide


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False, np.True_])
def test_saved_encoder_loads_everywhere(minilm: Path, tmp_path: Path, pooling: str, normalize: bool) -> None:
    from transformers import AutoModel, AutoTokenizer

    encoder = SentenceEncoder.from_pretrained(minilm)
    encoder.pooling, encoder.normalize_embeddings = pooling, normalize
    encoder.save_pretrained(tmp_path / "saved")
    texts = sentences(13)
    expected = encoder.encode(texts)

    again = SentenceEncoder.from_pretrained(tmp_path / "saved")
    assert (again.pooling, again.normalize_embeddings, again.tokenizer.max_length) == (pooling, normalize, 256)
    np.testing.assert_array_equal(again.encode(texts), expected)

    theirs = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert theirs.max_seq_length == 256
    np.testing.assert_allclose(theirs.encode(texts), expected, atol=5e-7 * float(np.linalg.norm(expected[0])))

    assert not any(AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)[1].values())
    ids = AutoTokenizer.from_pretrained(tmp_path / "saved")(texts)["input_ids"]
    assert ids == encoder.tokenizer.token_ids(texts)


def test_what_sentence_transformers_saves_loads_here(minilm: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(minilm), device="cpu")
    theirs.save_pretrained(str(tmp_path))
    ours = SentenceEncoder.from_pretrained(tmp_path)
    assert (ours.pooling, ours.normalize_embeddings, ours.tokenizer.max_length) == ("mean", True, 256)
    np.testing.assert_allclose(ours.encode(sentences(5)), theirs.encode(sentences(5)), atol=5e-7)


def test_nothing_is_left_of_a_model_that_was_there_before(minilm: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nother\n")
    (tmp_path / "added_tokens.json").write_text('{"sky": 30522}')
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["blue"]}')
    (tmp_path / "config_sentence_transformers.json").write_text(
        '{"prompts": {"query": "query: "}, "default_prompt_name": "query"}'
    )
    (tmp_path / "notes.txt").write_text("mine")
    encoder = SentenceEncoder.from_pretrained(minilm)
    encoder.save_pretrained(tmp_path)
    expected = encoder.encode(["the sky is blue"])
    np.testing.assert_array_equal(
        SentenceEncoder.from_pretrained(tmp_path).encode(["the sky is blue"]), expected
    )
    theirs = SentenceTransformer(str(tmp_path), device="cpu").encode(["the sky is blue"])
    np.testing.assert_allclose(theirs, expected, atol=5e-7)
    assert (tmp_path / "notes.txt").is_file()
    encoder.save_pretrained(tmp_path, {"special_tokens_map.json": b"{}"})
    assert (tmp_path / "special_tokens_map.json").read_bytes() == b"{}"


def test_float16_in_bfloat16(minilm: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    encoder.half().save_pretrained(tmp_path)
    expected = SentenceEncoder.from_pretrained(tmp_path, dtype=torch.float32).encode(["the sky is blue"])
    narrow = SentenceEncoder.from_pretrained(tmp_path, dtype=torch.bfloat16).encode(["the sky is blue"])
    assert 0.9999 < (narrow * expected).sum() < 1.0001


def test_a_cased_tokenizer_survives_saving(minilm: Path, tmp_path: Path) -> None:
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        tmp_path.joinpath("cased").mkdir(exist_ok=True)
        shutil.copy(minilm / name, tmp_path / "cased")
    (tmp_path / "cased" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    encoder = SentenceEncoder.from_pretrained(tmp_path / "cased")
    encoder.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.token_ids(["Hello hello É"]) == encoder.tokenizer.token_ids(["Hello hello É"])


def test_an_unusual_normalizer_survives_saving(minilm: Path, tmp_path: Path) -> None:
    from tokenizers.normalizers import NFC
    from transformers import AutoTokenizer

    encoder = SentenceEncoder.from_pretrained(minilm)
    encoder.tokenizer.backend.normalizer = NFC()
    encoder.save_pretrained(tmp_path)
    expected = encoder.tokenizer.token_ids(["Hello e\u0301 world"])
    assert Tokenizer.from_pretrained(tmp_path).token_ids(["Hello e\u0301 world"]) == expected
    assert AutoTokenizer.from_pretrained(tmp_path)(["Hello e\u0301 world"])["input_ids"] == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sentences": ["a", 3]}, TypeError, "text 1 is int (3), it must be a string"),
        ({"sentences": 3}, TypeError, "the texts are int, they must be a string or several"),
        (
            {"sentences": np.array([["a", "b"]])},
            TypeError,
            "the texts are numpy.ndarray of shape (1, 2), they must be a string or",
        ),
        (
            {"sentences": np.array("a")},
            TypeError,
            "the texts are numpy.ndarray of shape (), they must be a string",
        ),
        ({"sentences": b"abc"}, TypeError, "the texts are bytes"),
        ({"sentences": ["a", "\udc00"]}, ValueError, "text 1 is not valid Unicode"),
        ({"sentences": ["a"], "batch_size": 0}, ValueError, "batch_size is 0, it must be an integer from 1 up"),
        ({"sentences": ["a"], "batch_size": -1}, ValueError, "batch_size is -1"),
        ({"sentences": ["a"], "batch_size": 2.5}, ValueError, "batch_size is 2.5"),
    ],
)
def test_bad_arguments(
    tiny_encoder: SentenceEncoder, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        tiny_encoder.encode(**arguments)
    assert message in str(caught.value)


def test_a_dtype_wider_than_the_models_is_refused(tiny_encoder: SentenceEncoder) -> None:
    wide = SentenceEncoder(tiny_encoder.model, tiny_encoder.tokenizer, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dtype is torch.float64 and the model torch.float32, which cannot"):
        wide.encode("a")
    with pytest.raises(
        ValueError, match=r"dtype is 'bfloat16', it must be torch.float32, bfloat16, float16 or"
    ):
        SentenceEncoder(tiny_encoder.model, tiny_encoder.tokenizer, dtype="bfloat16")  # type: ignore[arg-type]


def test_a_pooling_of_ones_own_is_not_saved_as_another(
    tiny_encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POOLINGS, "max", lambda hidden, mask: hidden.amax(1))
    encoder = SentenceEncoder(tiny_encoder.model, tiny_encoder.tokenizer, pooling="max")
    with pytest.raises(ValueError, match="pooling by 'max' cannot be saved, only by mean or cls"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"word_embedding_dimension": 384}, "mean"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True}, "cls"),
    ],
)
def test_poolings_as_sentence_transformers_reads_them(
    minilm: Path, tmp_path: Path, settings: dict[str, Any], pooling: str
) -> None:
    directory = shutil.copytree(minilm, tmp_path / "model")
    settings = {"word_embedding_dimension": 384, **settings}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    (ours, theirs) = (
        SentenceEncoder.from_pretrained(directory),
        SentenceTransformer(str(directory), device="cpu"),
    )
    assert ours.pooling == pooling
    np.testing.assert_allclose(ours.encode("a text"), theirs.encode("a text"), atol=5e-7)


def test_unknown_pooling_is_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="pooling is 'max', it must be mean or cls"):
        SentenceEncoder(tiny_encoder.model, tiny_encoder.tokenizer, pooling="max")
    with pytest.raises(ValueError, match="pooling is 'Mean', it must be mean or cls"):
        tiny_encoder.pooling = "Mean"


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        ([("Transformer", ""), ("Dense", "2_Dense")], {}, "has modules that are not supported: Dense"),
        ([("Transformer", "0_Transformer")], {}, "keeps the encoder in 0_Transformer/: load that directory"),
        (
            [("Pooling", "p")],
            {"pooling_mode_max_tokens": True},
            "asks for pooling by ['pooling_mode_max_tokens']",
        ),
        ([("Normalize", "n"), ("Pooling", "p")], {}, "in another order than Transformer, Pooling, Normalize"),
        ([("Pooling", "p")], {"pooling_mode": "lasttoken"}, "asks for pooling by ['lasttoken']"),
        (
            [("Pooling", "p")],
            {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
            "only mean or cls is supported",
        ),
    ],
)
def test_steps_it_does_not_do_are_refused(
    minilm: Path, tmp_path: Path, modules: list[tuple[str, str]], pooling: dict[str, Any], message: str
) -> None:
    listed = [
        {"idx": i, "type": f"sentence_transformers.models.{m}", "path": p} for i, (m, p) in enumerate(modules)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text(json.dumps(pooling))
    shutil.copy(minilm / "config.json", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        SentenceEncoder.from_pretrained(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize("setting", [{"default_prompt_name": "query"}, {"truncate_dim": 100}])
def test_prompts_and_truncation_are_refused(minilm: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    shutil.copy(minilm / "config.json", tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(setting))
    with pytest.raises(CheckpointError, match=f"{next(iter(setting))} .* is not supported, only null"):
        SentenceEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"modality_config": {"text": {"method_output_name": ["hidden_states", -2]}}},
            r"asks for \['hidden_states', -2\]",
        ),
        ({"processing_kwargs": {"text": {"max_length": 8}}}, "processing_kwargs .* are not supported"),
        *(
            ({name: {"x": 16}}, f"{name} .* are not supported")
            for name in ("tokenizer_args", "processor_kwargs", "config_kwargs", "config_args")
        ),
        ({"transformer_task": "fill-mask"}, "transformer_task 'fill-mask' is not supported, only 'feature-ext"),
    ],
)
def test_other_states_are_refused(minilm: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """As sentence-transformers 6 writes them."""
    shutil.copy(minilm / "config.json", tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        SentenceEncoder.from_pretrained(tmp_path)


def test_a_warning_names_the_line_that_cut(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MultiTaskModel(tiny_encoder.model, {"a": MLPHead(36, 5, 2)}, tokenizer=tiny_encoder.tokenizer)
    for call in (
        tiny_encoder.tokenizer,
        tiny_encoder.tokenizer.token_ids,
        tiny_encoder.encode,
        lambda text: list(tiny_encoder.encode_blocks(text)),
        model.predict,
    ):
        with pytest.warns(UserWarning, match="1 of 1 texts cut to ") as caught:
            call("a " * 600)
        assert [warning.filename for warning in caught] == [__file__]
    monkeypatch.setattr("minibert.sentence_encoder.BLOCK_SENTENCES", 2)
    with pytest.warns(UserWarning, match="2 of 5 texts cut to ") as caught:  # of all blocks
        tiny_encoder.encode(["a " * 600, "b", "c", "d " * 600, "e"])
    assert len(caught) == 1


@pytest.mark.parametrize("hooked", [False, True])
def test_a_text_without_tokens_is_zero(tiny_encoder: SentenceEncoder, hooked: bool) -> None:
    only_text = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    tiny_encoder.tokenizer.backend.post_processor = only_text
    if hooked:
        tiny_encoder.model.register_forward_hook(lambda *_: None)
    assert tiny_encoder.encode(["", "a", ""]).any(1).tolist() == [False, True, False]
    assert tiny_encoder.encode("").tolist() == [0.0] * 36


class Stream(list[str]):
    """Like a DataLoader of an IterableDataset."""

    def __len__(self) -> int:
        raise TypeError("object of type 'IterableDataset' has no len()")


def test_texts_whose_number_is_unknown(tiny_encoder: SentenceEncoder) -> None:
    assert np.array_equal(tiny_encoder.encode(Stream(["a", "b"])), tiny_encoder.encode(["a", "b"]))


class Log(io.StringIO):
    """What a service may put in the place of standard error."""

    @property
    def isatty(self) -> Any:
        raise AttributeError("'Log' object has no attribute 'isatty'")


@pytest.mark.parametrize("kind", ["log", "closed", "none"])
def test_any_standard_error_will_do(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    stream = {"log": Log(), "closed": io.StringIO(), "none": None}[kind]  # none: without a console
    if stream is not None and kind == "closed":
        stream.close()
    expected = tiny_encoder.encode(["a", "b"])
    monkeypatch.setattr(sys, "stderr", stream)
    assert np.array_equal(tiny_encoder.encode(["a", "b"]), expected)
    if kind == "none":
        assert np.array_equal(tiny_encoder.encode(["a", "b"], show_progress_bar=True), expected)


def test_cut_layers_are_not_saved_under_the_old_number(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder = deepcopy(tiny_encoder)
    encoder.model.layers = encoder.model.layers[:1]
    for part in (encoder, encoder.model):
        with pytest.raises(ValueError, match="the model has 1 layers and its config says"):
            part.save_pretrained(tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    encoder.model.config = replace(encoder.model.config, num_hidden_layers=1)  # as it says
    encoder.save_pretrained(tmp_path / "cut")
    again = SentenceEncoder.from_pretrained(tmp_path / "cut")
    assert np.array_equal(again.encode("a b c"), encoder.encode("a b c"))


class Skip(nn.Module):
    """A layer without parameters."""

    def forward(self, hidden: Tensor, mask: Tensor | None, attend: object) -> tuple[Tensor, None]:
        return hidden, None


@pytest.mark.parametrize("index", [0, -1])
def test_a_layer_of_another_kind_is_not_left_out_of_what_is_saved(
    tiny_encoder: SentenceEncoder, index: int, tmp_path: Path
) -> None:
    encoder = deepcopy(tiny_encoder)
    encoder.model.layers[index] = Skip()
    number = range(len(encoder.model.layers))[index]
    with pytest.raises(ValueError, match=rf"layers.{number}.attention.query.weight is nowhere, by the config"):
        encoder.save_pretrained(tmp_path / "cut")


def test_a_parametrized_model_is_not_saved_as_published(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder = deepcopy(tiny_encoder)
    nn.utils.parametrizations.weight_norm(encoder.model.get_submodule("layers.0.attention.value"))
    with pytest.raises(ValueError, match="is not a parameter of BERT's encoder, and has no published name"):
        encoder.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
