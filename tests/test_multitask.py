"""The multi-task model, its losses and its metrics."""

import json
import math
import pkgutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils import prune

from heads import MISSING, MLPHead, MultiTaskLoss, MultiTaskModel
from heads.evaluation import score
from heads.metrics import TaskMetrics, macro_f1, majority
from heads.multitask import MultiTaskOutput
from minibert import BertConfig, BertModel, SentenceEncoder, Tokenizer
from minibert.freezing import FreezePlan, named_groups
from minibert.modes import evaluating
from weights import CheckpointError

LABELS = {"type": ("news", "question", "statement"), "sentiment": ("bad", "good")}
SENTENCES = ["Does it rain?", "", "A much longer sentence than the others, it is about nothing.", "Fine."]


def build(directory: Path, **changes: Any) -> MultiTaskModel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"labels": LABELS, "tokenizer": Tokenizer.from_pretrained(directory)}
    heads = {"type": MLPHead(36, 13, 3), "sentiment": MLPHead(36, 7, 2)}
    return MultiTaskModel(BertModel.from_pretrained(directory), heads, **arguments | changes).eval()


# ------------------------------------------------------------------------------------------------ model


def test_one_pass_mean_pooling_and_every_head(small: Path) -> None:
    model = build(small)
    batch = Tokenizer.from_pretrained(small)(SENTENCES)
    calls: list[object] = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    output = model(**batch)
    assert len(calls) == 1
    expected = SentenceEncoder.from_pretrained(small)(batch["input_ids"], batch["attention_mask"])
    assert torch.equal(output.embeddings, expected)
    assert {name: tuple(logits.shape) for name, logits in output.logits.items()} == {
        "type": (4, 3),
        "sentiment": (4, 2),
    }
    head = {name: tensor.double() for name, tensor in model.heads["type"].named_parameters()}
    hidden = (expected.double() @ head["hidden.weight"].T + head["hidden.bias"]).clamp(min=0)
    by_hand = hidden @ head["out.weight"].T + head["out.bias"]
    torch.testing.assert_close(output.logits["type"].double(), by_hand, rtol=1e-5, atol=1e-5)
    alone = model(batch["input_ids"][:1, : batch["attention_mask"][0].sum()])  # no mask: nothing is padding
    torch.testing.assert_close(alone.embeddings, expected[:1], rtol=1e-5, atol=1e-6)


def test_exported_with_its_heads(small: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(small)
    heads = {"topic": MLPHead(36, 13, 3), "mood": MLPHead(36, 7, 2)}  # torch.export takes none named "type"
    model = MultiTaskModel(BertModel.from_pretrained(small), heads).eval()
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in tokenizer(["a"])}
    program = torch.export.export(model, (), tokenizer(["two", "texts"]), dynamic_shapes=shapes)
    batch = tokenizer(SENTENCES)
    output, expected = program.module()(**batch), model(**batch)
    assert all(torch.equal(output.logits[task], expected.logits[task]) for task in heads)


def test_predict(small: Path) -> None:
    model = build(small)
    model.train()
    FreezePlan.parse("layers:1").apply(model)
    modes = [module.training for module in model.modules()]
    predictions = model.predict(SENTENCES)
    assert [module.training for module in model.modules()] == modes
    tokenizer = Tokenizer.from_pretrained(small)
    model.eval()
    for sentence, prediction in zip(SENTENCES, predictions, strict=True):
        logits = model(**tokenizer([sentence])).logits
        assert prediction.keys() == LABELS.keys()
        for task, names in LABELS.items():
            probabilities = logits[task][0].detach().softmax(0)
            assert prediction[task]["label"] == names[int(probabilities.argmax())]
            assert prediction[task]["probability"] == pytest.approx(float(probabilities.max()), rel=1e-5)
    assert model.predict("Does it rain?") == model.predict(["Does it rain?"])
    assert model.predict([]) == []
    model.heads["type"] = nn.Sequential(nn.Linear(36, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"head 'type' gives \(3,\), for `predict` it must be \(B, classes\)"):
        model.predict(SENTENCES[:3])


def test_predict_by_a_forward_of_ones_own(small: Path) -> None:
    class Longest(MultiTaskModel):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, token_type_ids: Any = None) -> Any:
            hidden = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state
            return self.classify(hidden.masked_fill(attention_mask[..., None] == 0, -1e9).amax(1))

    usual = build(small)
    assert usual.tokenizer is not None
    model = Longest(usual.encoder, dict(usual.heads.items()), labels=LABELS, tokenizer=usual.tokenizer)
    expected = model.eval()(**usual.tokenizer(SENTENCES)).logits["type"].softmax(-1).amax(-1)
    model.train()  # but predictions are without dropout
    for size in (None, 3):
        found = [prediction["type"]["probability"] for prediction in model.predict(iter(SENTENCES), size)]
        assert found == pytest.approx(expected.tolist(), rel=1e-5)
    assert found != pytest.approx([p["type"]["probability"] for p in usual.predict(SENTENCES)], rel=1e-3)
    for either in (usual, model):
        with pytest.raises(ValueError, match="batch_size is -1, it must be an integer from 1 up"):
            either.predict(SENTENCES, -1)
    usual.forward = model.forward  # type: ignore[method-assign]
    assert usual.predict(SENTENCES) == model.predict(SENTENCES)
    assert model.predict([]) == []
    model.heads["type"] = nn.Sequential(nn.Linear(36, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=r"head 'type' gives \(3,\), for `predict` it must be \(B, classes\)"):
        model.predict(SENTENCES[:3])


def test_predict_calls_hooks_around_the_model(small: Path) -> None:
    model = build(small)
    assert {p["type"]["label"] for p in model.predict(SENTENCES)} != {"statement"}

    def louder(_: nn.Module, __: Any, output: MultiTaskOutput) -> MultiTaskOutput:
        return output._replace(logits=output.logits | {"type": output.logits["type"] + torch.arange(3) * 99})

    model.register_forward_hook(louder)
    assert {p["type"]["label"] for p in model.predict(SENTENCES)} == {"statement"}


def test_predict_gives_no_label_of_nan(small: Path) -> None:
    model = build(small)
    assert model.tokenizer is not None
    ids = model.tokenizer.token_ids(SENTENCES)
    index, token = next((i, t) for i, row in enumerate(ids) for t in row if i and sum(t in r for r in ids) == 1)
    with torch.no_grad():
        model.encoder.embeddings.word.weight[token, 0] = torch.nan
    with pytest.raises(ValueError, match=f"head 'type' gives nan for text {index}: a weight is not finite"):
        model.predict(SENTENCES)
    assert len(model.predict([s for i, s in enumerate(SENTENCES) if i != index])) == len(SENTENCES) - 1


def test_predict_leaves_the_encoder_in_its_mode(small: Path) -> None:
    """Another thread may be training it; the heads alone are in eval mode, for as long as they compute."""
    model = build(small).train()
    modes = []
    model.heads["type"].register_forward_hook(
        lambda head, *_: modes.append((head.training, [part.training for part in model.encoder.modules()]))
    )
    model.predict(SENTENCES)
    assert modes == [(False, [True] * len(list(model.encoder.modules())))]
    assert all(part.training for part in model.modules())


def test_modes_after_an_interrupt(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that comes before all parts are in eval mode."""
    model = build(small).train()
    model.encoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):  # nothing is left of the first for the second
        with monkeypatch.context() as patch:
            patch.setattr(
                type(model.encoder.layers[0]), "eval", interrupted := Mock(side_effect=KeyboardInterrupt)
            )
            patch.setattr(type(model), "eval", lambda self: [child.eval() for child in self.encoder.layers])
            with pytest.raises(KeyboardInterrupt), evaluating(model):
                pass
        interrupted.assert_called_once()
        assert [module.training for module in model.modules()] == modes


def test_modes_of_a_shared_encoder_are_restored_when_the_last_model_is_done(small: Path) -> None:
    """Two models over one encoder, in either order: meanwhile neither may get the dropout of training."""
    one, other = build(small).train(), build(small).train()
    other.encoder = one.encoder
    one.encoder.layers[1].eval()
    modes = [module.training for model in (one, other) for module in model.modules()]
    for first, last in ((one, other), (other, one)):
        a, b = evaluating(first), evaluating(last)
        with (
            torch.no_grad()
        ):  # each thread has that of its own; crossed in one thread, a and b would leave it on
            a.__enter__()
            b.__enter__()
            a.__exit__(None, None, None)
            assert not any(module.training for module in last.modules())
            assert first.training
            assert all(head.training for head in first.heads.modules())
            b.__exit__(None, None, None)
        assert [module.training for model in (one, other) for module in model.modules()] == modes


def test_modes_are_restored_when_the_last_thread_is_done(small: Path) -> None:
    model = build(small).train()
    model.encoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    begun, first_is_done = threading.Barrier(2), threading.Event()

    def first() -> None:
        with evaluating(model):
            begun.wait(60)
        first_is_done.set()

    def second() -> list[bool]:
        with evaluating(model):
            begun.wait(60)
            first_is_done.wait(60)
            return [module.training for module in model.modules()]

    with ThreadPoolExecutor(2) as threads:
        threads.submit(first)
        assert not any(threads.submit(second).result())
    assert [module.training for module in model.modules()] == modes


def test_round_trip(small: Path, tmp_path: Path) -> None:
    model = build(small)
    model.save_pretrained(tmp_path / "saved")
    again = MultiTaskModel.from_pretrained(tmp_path / "saved")
    assert again.labels == LABELS
    assert not again.training
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert again.predict(SENTENCES) == model.predict(SENTENCES)
    again.save_pretrained(tmp_path / "twice")
    for path in (tmp_path / "saved").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "twice" / path.relative_to(tmp_path / "saved")).read_bytes()


def test_the_encoder_is_saved_as_published(small: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    model = build(small)
    model.save_pretrained(tmp_path)
    batch = Tokenizer.from_pretrained(tmp_path)(SENTENCES)
    reference, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = reference.eval()(**batch).last_hidden_state
    assert torch.equal(model.encoder(**batch).last_hidden_state, expected)
    embeddings = SentenceTransformer(str(tmp_path), device="cpu").encode(SENTENCES)
    ours = SentenceEncoder.from_pretrained(tmp_path).encode(SENTENCES)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(embeddings), rtol=1e-5, atol=1e-6)


def test_without_a_tokenizer_the_mean_is_saved_too(small: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(small)
    encoder.pooling, encoder.normalize_embeddings = "cls", True
    encoder.save_pretrained(tmp_path)
    MultiTaskModel(BertModel.from_pretrained(tmp_path), {"type": MLPHead(36, 5, 4)}).save_pretrained(tmp_path)
    again = SentenceEncoder.from_pretrained(tmp_path)
    assert (again.pooling, again.normalize_embeddings) == ("mean", False)


def test_no_other_encoder_is_saved_under_the_heads(small: Path, tmp_path: Path) -> None:
    model = build(small)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for encoder in (BertModel.from_pretrained(small), SentenceEncoder.from_pretrained(small)):
        with pytest.raises(CheckpointError, match="holds heads of another encoder: give another directory"):
            encoder.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    model.save_pretrained(tmp_path)


def test_a_class_without_a_label_is_said(small: Path) -> None:
    encoder, tokenizer = BertModel.from_pretrained(small), Tokenizer.from_pretrained(small)
    head = nn.Linear(encoder.config.hidden_size, 3)
    nn.init.constant_(head.weight, 0)
    head.bias.data = torch.tensor([0.0, 0.0, 1.0])
    model = MultiTaskModel(encoder, {"a": nn.Sequential(head)}, labels={"a": ["x", "y"]}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="head a says class 2, and has only 2 labels"):
        model.predict("a text")


def test_a_head_that_is_false(small: Path, tmp_path: Path) -> None:
    encoder = BertModel.from_pretrained(small)
    MultiTaskModel(encoder, {"all": nn.Sequential()}).save_pretrained(tmp_path / "saved")
    model = MultiTaskModel.from_pretrained(tmp_path / "saved", heads={"all": nn.Sequential()})
    assert model(torch.tensor([[5, 6]])).logits["all"].shape == (1, encoder.config.hidden_size)


def test_without_tokenizer_and_labels(tiny: Path, tmp_path: Path) -> None:
    model = MultiTaskModel(BertModel.from_pretrained(tiny), {"topic": MLPHead(36, 5, 11)})
    assert model.labels == {"topic": tuple(map(str, range(11)))}
    model.save_pretrained(tmp_path)
    again = MultiTaskModel.from_pretrained(tmp_path)
    assert again.tokenizer is None
    ids = torch.arange(14).view(2, 7)
    assert torch.equal(again(ids).logits["topic"], model.eval()(ids).logits["topic"])
    with pytest.raises(ValueError, match="predict needs a tokenizer"):
        again.predict("x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(small: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    expected = build(small).predict(SENTENCES)
    whole = build(small).to(dtype)
    whole.save_pretrained(tmp_path)
    for model in (
        whole,
        MultiTaskModel.from_pretrained(tmp_path),
        MultiTaskModel.from_pretrained(tmp_path, dtype=dtype),
    ):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        for parameter in model.parameters():  # MKL's float64 depends on where in a mapped file a matrix begins
            parameter.data = parameter.data.clone()
        assert model.predict(SENTENCES) == whole.predict(SENTENCES)
        for ours, theirs in zip(model.predict(SENTENCES), expected, strict=True):
            assert ours["type"]["probability"] == pytest.approx(theirs["type"]["probability"], abs=0.02)


def test_what_a_head_ties_stays_tied(small: Path, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(36, 36), nn.Linear(36, 36)
            self.second.weight = self.first.weight

        def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(embeddings))  # type: ignore[no-any-return]

    model = MultiTaskModel(BertModel.from_pretrained(small), {"tied": Tied()}).double()
    model.save_pretrained(tmp_path)
    head = Tied()
    MultiTaskModel.from_pretrained(tmp_path, heads={"tied": head})
    assert head.first.weight is head.second.weight
    assert torch.equal(head.first.weight, model.heads["tied"].get_parameter("first.weight"))


def test_a_head_is_found_by_a_name_that_modules_have(small: Path) -> None:
    model = build(small)
    assert model.get_submodule("heads.type") is model.heads["type"]
    ids = torch.tensor([[2, 5, 7, 3]])
    doubled = {name: 2 * parameter for name, parameter in model.heads["type"].named_parameters()}
    called = torch.func.functional_call(model, {f"heads.type.{n}": t for n, t in doubled.items()}, (ids,))
    embedding = model(ids).embeddings
    expected = torch.func.functional_call(model.heads["type"], doubled, (embedding,))
    torch.testing.assert_close(called.logits["type"], expected)
    assert model.double().get_parameter("heads.type.out.weight").dtype == torch.float64


def test_a_compiled_encoder_has_groups(small: Path, tmp_path: Path) -> None:
    model = build(small)
    names = list(named_groups(model))
    model.encoder = torch.compile(model.encoder, backend="eager")  # type: ignore[assignment]
    assert list(named_groups(model.train())) == names
    model.save_pretrained(tmp_path / "saved")
    again = MultiTaskModel.from_pretrained(tmp_path / "saved")
    assert again.predict("x") == model.eval().predict("x")


class Tanh(MLPHead):
    """A head whose sizes do not say what it computes."""

    def forward(self, embeddings: Tensor) -> Tensor:
        return cast(Tensor, self.out(self.hidden(embeddings).tanh()))


@pytest.mark.parametrize(
    ("kind", "read_first"),
    [
        (MultiTaskModel, "heads.multitask.read_json"),
        (SentenceEncoder, "minibert.sentence_encoder.read_modules"),
        (BertModel, "minibert.model.BertConfig.from_pretrained"),
    ],
)
def test_nothing_loads_half_of_one_model_and_half_of_another(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, read_first: str
) -> None:
    model = build(small)
    model.save_pretrained(tmp_path)
    read = pkgutil.resolve_name(read_first)

    def and_saved_by_another_process(path: Path) -> Any:
        contents = read(path)
        model.save_pretrained(tmp_path)
        return contents

    with monkeypatch.context() as patch:
        patch.setattr(read_first, and_saved_by_another_process)
        with pytest.raises(CheckpointError, match="was saved to while it was read: load it again"):
            kind.from_pretrained(tmp_path)
    kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("changed", ["class", "bias", "part", "weights", "buffer"])
def test_a_head_that_is_no_longer_an_mlphead(small: Path, tmp_path: Path, changed: str) -> None:
    def head() -> MLPHead:
        head = Tanh(36, 8, 3) if changed == "class" else MLPHead(36, 8, 3)
        if changed == "bias":
            head.out = nn.Linear(8, 3, bias=False)
        if changed == "part":
            head.hidden = nn.Sequential(nn.Linear(36, 8), nn.Identity())  # type: ignore[assignment]
        if changed == "weights":
            prune.l1_unstructured(head.out, "weight", 0.5)  # type: ignore[no-untyped-call]
        if changed == "buffer":
            head.register_buffer("temperature", torch.ones(()))
        return head

    encoder, tokenizer = BertModel.from_pretrained(small), Tokenizer.from_pretrained(small)
    model = MultiTaskModel(encoder, {"a": head()}, tokenizer=tokenizer).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"head a is not an MLPHead: pass it as from_pretrained"):
        MultiTaskModel.from_pretrained(tmp_path)
    assert MultiTaskModel.from_pretrained(tmp_path, heads={"a": head()}).predict("x") == model.predict("x")


def test_an_attention_that_is_none_is_no_fault_of_the_files(small: Path, tmp_path: Path) -> None:
    build(small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^attention is 'flash'"):
        MultiTaskModel.from_pretrained(tmp_path, attention="flash")


def test_a_head_of_ones_own(small: Path, tmp_path: Path) -> None:
    model = build(small, labels=None)
    labels = {"line": None}  # as good as none given
    model = MultiTaskModel(model.encoder, {"line": nn.Linear(36, 4)}, labels=labels, tokenizer=model.tokenizer)
    model.eval()
    assert model.predict("x")[0]["line"]["label"] in "0123"
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"head line is not an MLPHead: pass it as from_pretrained"):
        MultiTaskModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no head 'lime', it has: line"):
        MultiTaskModel.from_pretrained(tmp_path, heads={"lime": nn.Linear(36, 4)})
    again = MultiTaskModel.from_pretrained(tmp_path, heads={"line": nn.Linear(36, 4)})
    assert again.predict(SENTENCES) == model.predict(SENTENCES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": {"a.b": MLPHead(36, 5, 3)}}, "'a.b' cannot be the name of a task"),
        ({"heads": {"": MLPHead(36, 5, 3)}}, "'' cannot be the name of a task"),
        ({"heads": {"training": MLPHead(36, 5, 3)}}, "'training' cannot be the name of a task"),
        ({"heads": {"a": MLPHead(37, 5, 3)}}, "head a takes 37 numbers, the encoder gives 36"),
        ({"heads": {"a": nn.Linear(37, 3)}}, "head a takes 37 numbers, the encoder gives 36"),
        ({"heads": {"a": nn.Linear(36, 3)}, "labels": {"a": ["x"]}}, "head a has 3 classes but 1 labels"),
        ({"labels": {"type": ["x", "y"]}}, "head type has 3 classes but 2 labels"),
        ({"labels": {"type": "xyz"}}, "the labels of type are 'xyz', they must be a list of different strings"),
        ({"labels": {"other": ["x"]}}, "labels are given for 'other', the heads are: type"),
        ({"heads": {"type": F.relu}}, "head type is function, it must be a torch.nn.Module"),
    ],
)
def test_what_cannot_be_built(tiny: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        MultiTaskModel(BertModel.from_pretrained(tiny), **{"heads": {"type": MLPHead(36, 5, 3)}, **arguments})
    assert message in str(caught.value)


def test_a_head_put_in_later_is_checked_before_it_is_saved(tiny: Path, tmp_path: Path) -> None:
    model = MultiTaskModel(BertModel.from_pretrained(tiny), {"type": MLPHead(36, 5, 3)})
    model.heads["type"] = MLPHead(36, 5, 4)
    with pytest.raises(ValueError, match="head type has 4 classes but 3 labels"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_statistics_of_a_head_have_the_dtype_of_its_weights(
    tiny: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    def head() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(36), nn.Linear(36, 4))

    model = MultiTaskModel(BertModel.from_pretrained(tiny), {"type": head()})
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    model.train()(ids)  # moves the running statistics
    saved = model.to(torch.float64 if dtype is None else torch.float32).eval()
    saved.save_pretrained(tmp_path)
    loaded = MultiTaskModel.from_pretrained(tmp_path, heads={"type": head()}, dtype=dtype)
    expected = saved.double()(ids).logits["type"]
    assert torch.allclose(loaded(ids).logits["type"], expected, atol=1e-12)
    assert loaded.heads.state_dict()["type.0.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("heads.json", None, "has no heads.json"),
        ("heads.json", "{}", "heads.json has no `heads`"),
        ("heads.json", "[1]", "holds a JSON list"),
        ("heads.json", '{"heads": {"type": {"hidden": 36}}}', "head type is not an MLPHead"),
        (
            "heads.json",
            '{"heads": {"a": {"hidden": 36, "width": -1, "classes": 3}}}',
            "head a is not an MLPHead",
        ),
        (
            "heads.json",
            '{"heads": {"a": {"hidden": 36, "width": "4", "classes": 3}}}',
            "head a is not an MLPHead",
        ),
        (
            "heads.json",
            '{"heads": {"a": {"hidden": 36, "width": 4, "classes": 3, "labels": 5}}}',
            "the labels of a",
        ),
        (
            "heads.json",
            '{"heads": {"type": {"hidden": 36, "width": 9, "classes": 3}}}',
            "does not fit heads.json",
        ),
        ("heads.safetensors", None, "heads.safetensors"),
        ("heads.safetensors", "nonsense", "not a whole safetensors file"),
    ],
)
def test_damaged_files(small: Path, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    build(small).save_pretrained(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        MultiTaskModel.from_pretrained(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- losses


def random_batch(seed: int, missing: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits, labels = {}, {}
    for task, classes in (("a", 3), ("b", 7)):
        logits[task] = torch.randn((13, classes), generator=generator).requires_grad_()
        labels[task] = torch.randint(classes, (13,), generator=generator)
        labels[task][torch.rand(13, generator=generator) < missing] = MISSING
    return logits, labels


def cross_entropy(logits: Tensor, labels: Tensor) -> float:
    """By the formula, in float64, over the labels present."""
    losses = [
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True)
        if label != MISSING
    ]
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("missing", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_the_mean_is_over_the_labels_present(seed: int, missing: float) -> None:
    logits, labels = random_batch(seed, missing)
    total, losses = MultiTaskLoss(["a", "b"])(logits, labels)
    expected = {task: cross_entropy(logits[task].detach(), labels[task]) for task in logits}
    for task in logits:
        assert float(losses[task].detach()) == pytest.approx(expected[task], rel=1e-6, abs=1e-12)
    assert float(total.detach()) == pytest.approx(sum(expected.values()), rel=1e-6)
    weighted, _ = MultiTaskLoss(["a", "b"], weights={"b": 0.25})(logits, labels)
    assert float(weighted.detach()) == pytest.approx(expected["a"] + 0.25 * expected["b"], rel=1e-6)
    # as each of several processes divides, whose part of a common count may be below one
    sums = {task: losses[task] * int((labels[task] != MISSING).sum()) for task in losses}
    _, parts = MultiTaskLoss(["a", "b"])(logits, labels, {"a": 0.25, "b": 4.0})
    assert float(parts["a"].detach()) == pytest.approx(4 * float(sums["a"].detach()), rel=1e-6)
    assert float(parts["b"].detach()) == pytest.approx(float(sums["b"].detach()) / 4, rel=1e-6)


def test_a_full_batch_gives_pytorchs_own_bits() -> None:
    logits, labels = random_batch(0, 0.0)
    total, _ = MultiTaskLoss(["a", "b"])(logits, labels)
    bytes_of = {task: classes.to(torch.uint8) for task, classes in labels.items()}
    assert torch.equal(MultiTaskLoss(["a", "b"])(logits, bytes_of)[0], total)
    many, classes = torch.randn(4, 200), torch.tensor([3, 156, 156, 199])  # 156 is MISSING in 8 bits
    expected = F.cross_entropy(many, classes)
    assert MultiTaskLoss(["a"])({"a": many}, {"a": classes.to(torch.uint8)})[0] == expected
    assert torch.equal(
        total, F.cross_entropy(logits["a"], labels["a"]) + F.cross_entropy(logits["b"], labels["b"])
    )


@pytest.mark.parametrize("uncertainty", [False, True])
def test_a_task_without_a_label_contributes_exactly_nothing(uncertainty: bool) -> None:
    logits, labels = random_batch(0, 0.0)
    labels["b"][:] = MISSING
    loss = MultiTaskLoss(["a", "b"], uncertainty=uncertainty)
    if loss.log_variance is not None:
        loss.log_variance.data += torch.tensor([0.3, -0.7])
    total, losses = loss(logits, labels)
    torch.autograd.backward(total)
    assert losses["b"] == 0
    assert logits["b"].grad is not None
    assert not logits["b"].grad.any()
    alone = MultiTaskLoss(["a"], uncertainty=uncertainty)
    if loss.log_variance is not None and alone.log_variance is not None:
        alone.log_variance.data += 0.3
        assert loss.log_variance.grad is not None
        assert loss.log_variance.grad[1] == 0
    assert torch.equal(total, alone(logits, labels)[0])
    labels["a"][:] = MISSING
    nothing, _ = loss(logits, labels)
    torch.autograd.backward(nothing)
    assert nothing == 0


@pytest.mark.parametrize("kind", ["logits", "labels", "counts"])
def test_a_task_that_is_left_out_is_said(kind: str) -> None:
    logits, labels = random_batch(0, 0.0)
    given: dict[str, Any] = {"logits": logits, "labels": labels, "counts": {"a": 13.0, "b": 13.0}}
    given[kind] = {"a": given[kind]["a"]}
    with pytest.raises(ValueError, match=f"there are no {kind} for b"):
        MultiTaskLoss(["a", "b"])(**given)


def test_an_encoder_of_another_kind(small: Path, tmp_path: Path) -> None:
    from transformers import BertModel as TheirBertModel

    encoder: Any = SentenceEncoder.from_pretrained(small)
    other: Any = TheirBertModel.from_pretrained(small)
    with pytest.raises(TypeError, match=r"a transformers.BertModel, it must be a minibert.BertModel$"):
        MultiTaskModel(other, {})
    with pytest.raises(
        ValueError, match=r"a transformers.BertModel cannot be saved, only a minibert.BertModel"
    ):
        SentenceEncoder(other, encoder.tokenizer).save_pretrained(tmp_path / "saved")
    with pytest.raises(
        TypeError, match=r"a minibert.SentenceEncoder, it must be a minibert.BertModel: its \.model"
    ):
        MultiTaskModel(encoder, {})
    around: Any = nn.Sequential(encoder.model)
    with pytest.raises(TypeError, match=r"a torch.Sequential, it must be a minibert.BertModel$"):
        MultiTaskModel(around, {})
    whole: Any = MultiTaskModel(encoder.model, {})
    with pytest.raises(TypeError, match=r"model is a heads.MultiTaskModel, it must be a minibert.BertModel"):
        SentenceEncoder(whole, encoder.tokenizer)
    theirs: Any = encoder.tokenizer.backend
    for with_tokenizer in (partial(SentenceEncoder, encoder.model), partial(MultiTaskModel, encoder.model, {})):
        with pytest.raises(
            TypeError, match=r"tokenizer is a tokenizers.Tokenizer, it must be what minibert.Tokenizer"
        ):
            with_tokenizer(tokenizer=theirs)


def test_labels_that_are_none() -> None:
    logits, labels = random_batch(0, 0.0)
    with pytest.raises(TypeError, match="labels of b must be a tensor of class indices"):
        MultiTaskLoss(["a", "b"])(logits, {**labels, "b": ["x"] * 13})
    with pytest.raises(TypeError, match="labels of b must be a tensor of class indices, int64"):
        MultiTaskLoss(["a", "b"])(logits, {**labels, "b": labels["b"].int()})
    classes = logits["a"].shape[1]
    with pytest.raises(ValueError, match=rf"a: labels \(13, 1\) and logits \(13, {classes}\) must be \(B,\)"):
        MultiTaskLoss(["a", "b"])(logits, {**labels, "a": labels["a"][:, None]})
    with pytest.raises(ValueError, match=rf"and logits \(13, {classes}, 1\) must be \(B,\) and \(B, classes\)"):
        MultiTaskLoss(["a", "b"])({**logits, "a": logits["a"][..., None]}, labels)
    labels["a"][3] = classes
    with pytest.raises(ValueError, match=f"labels of a: one is neither from 0 to {classes - 1} nor MISSING"):
        MultiTaskLoss(["a", "b"])(logits, labels)


def test_uncertainty_is_kendalls_formula() -> None:
    logits, labels = random_batch(1, 0.3)
    loss = MultiTaskLoss(["a", "b"], uncertainty=True)
    assert loss.log_variance is not None
    loss.log_variance.data = torch.tensor([0.3, -0.7])
    total, losses = loss(logits, labels)
    a, b = float(losses["a"].detach()), float(losses["b"].detach())
    assert float(total.detach()) == pytest.approx(
        math.exp(-0.3) * a + 0.15 + math.exp(0.7) * b - 0.35, rel=1e-6
    )
    torch.autograd.backward(total)
    assert loss.log_variance.grad is not None
    expected = [-math.exp(-0.3) * a + 0.5, -math.exp(0.7) * b + 0.5]
    assert loss.log_variance.grad.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"c": 1.0}}, "a loss weight is given for 'c', the tasks are: a, b"),
        ({"weights": {"a": -1.0}}, "the loss weight of a is -1.0"),
        ({"weights": {"a": math.nan}}, "the loss weight of a is nan"),
        ({"weights": {"a": None}}, "the loss weight of a is None, it must be 0 or a positive number"),
        ({"weights": {"a": torch.ones(3)}}, "the loss weight of a is tensor"),
        ({"weights": {"a": 2.0}, "uncertainty": True}, "choose one"),
    ],
)
def test_weights_that_cannot_be(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiTaskLoss(["a", "b"], **arguments)
    assert MultiTaskLoss(["a", "b"], weights={"a": np.float32(0.5)}).weights == {"a": 0.5, "b": 1.0}  # type: ignore[dict-item]


@pytest.mark.parametrize("tasks", [[], "type", ["a", "b", "a"]])
def test_tasks_that_cannot_be(tasks: Any) -> None:
    with pytest.raises(ValueError, match="it must be a list of different names, one or more"):
        MultiTaskLoss(tasks)
    assert MultiTaskLoss(iter(["a", "b"]), uncertainty=True).weights == {"a": 1, "b": 1}  # type: ignore[arg-type]


def test_lists_in_place_of_dicts_and_tensors(small: Path) -> None:
    encoder, head = BertModel.from_pretrained(small), MLPHead(36, 13, 3)
    for arguments, message in [
        ((encoder, head), "heads must be a dict, task -> value, not a heads.MLPHead"),
        ((encoder, [head]), "heads must be a dict, task -> value, not a list"),
        ((BertConfig(), {"type": head}), "encoder is a minibert.BertConfig, it must be a minibert.BertModel"),
    ]:
        with pytest.raises(TypeError, match=message):
            MultiTaskModel(*arguments)  # type: ignore[arg-type]
    model = MultiTaskModel(encoder, {"type": head})
    with pytest.raises(TypeError, match="labels must be a dict, task -> value, not a list"):
        MultiTaskModel(encoder, {"type": head}, labels=["a", "b", "c"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"embeddings is a numpy.ndarray, it .*: encode gives one with convert"):
        model.classify(np.zeros((2, 36), np.float32))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weights must be a dict, task -> value, not a list"):
        MultiTaskLoss(["a"], weights=[1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits of a must be a tensor, not a list"):
        MultiTaskLoss(["a"])({"a": [[0.1, 0.2]]}, {"a": torch.tensor([1])})


def test_an_output_in_place_of_its_logits(small: Path) -> None:
    output = build(small)(torch.tensor([[2, 5, 3]]))
    with pytest.raises(TypeError, match=r"not a heads.MultiTaskOutput: give its"):
        MultiTaskLoss(["type"])(output, {"type": torch.tensor([0])})
    with pytest.raises(TypeError, match=r"labels must be a dict, task -> value, not a torch.Tensor"):
        MultiTaskLoss(["type"])(output.logits, torch.tensor([0]))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_gradients_of_parts_are_averaged(parts: int) -> None:
    """Each part divides by its share of the count of all, as `counts` says."""
    generator = torch.Generator().manual_seed(parts)
    whole = torch.randn((10, 3), generator=generator, requires_grad=True)
    labels = torch.randint(3, (10,), generator=generator)
    labels[[1, 4, 8]] = MISSING
    gradients = []
    for some, counts in ((1, None), (parts, {"a": 7 / parts})):
        loss = MultiTaskLoss(["a"], uncertainty=True)
        for logits, chunk in zip(whole.chunk(some), labels.chunk(some), strict=True):
            torch.autograd.backward(loss({"a": logits}, {"a": chunk}, counts)[0] / some)
        gradients.append([whole.grad, *(parameter.grad for parameter in loss.parameters())])
        whole.grad = None
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("seed", range(8))
def test_metrics_are_scikit_learns(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((40, 5), generator=generator)
    logits[:, 3] -= 9 * (seed % 2)  # a class that is never predicted
    labels = torch.randint(4 - seed // 4, (40,), generator=generator)  # and classes that never occur
    labels[::7] = MISSING
    metrics = TaskMetrics.of(logits, labels)
    known = labels != MISSING
    true, predicted = labels[known].tolist(), logits[known].argmax(1).tolist()
    assert metrics.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert metrics.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    assert metrics.confusion == confusion_matrix(true, predicted, labels=range(5)).tolist()
    expected = log_loss(true, logits[known].double().softmax(1).numpy(), labels=range(5))
    assert metrics.loss == pytest.approx(expected, rel=1e-5)
    half = logits.bfloat16()  # as under autocast
    assert TaskMetrics.of(half, labels) == TaskMetrics.of(half.float(), labels)


def test_a_class_that_occurs_once_and_is_never_predicted_counts() -> None:
    assert macro_f1(torch.tensor([[2, 0], [1, 0]])) == pytest.approx(
        f1_score([0, 0, 1], [0, 0, 0], average="macro")
    )


def test_metrics_without_labels() -> None:
    metrics = TaskMetrics.of(torch.randn(4, 3), torch.full((4,), MISSING))
    assert (metrics.loss, metrics.accuracy, metrics.macro_f1) == (None, None, None)
    json.dumps(metrics.confusion)


def test_what_checkpoints_are_compared_by() -> None:
    """Larger is better; a task without labels does not count."""
    metrics = {"a": TaskMetrics(0.5, 0.75, 0.25, []), "b": TaskMetrics(1.5, 0.25, 0.75, [])}
    metrics["c"] = TaskMetrics(None, None, None, [])
    scores = {"loss": -1.0, "accuracy": 0.5, "macro_f1": 0.5, "a.loss": -0.5, "b.macro_f1": 0.75}
    assert {name: score(metrics, name) for name in scores} == scores


def test_majority() -> None:
    train = torch.tensor([0, 1, 1, MISSING, 1, 2])
    assert majority(train, torch.tensor([1, 1, 0, MISSING])) == pytest.approx(2 / 3)
    assert majority(train, torch.tensor([MISSING])) is None
