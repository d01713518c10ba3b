"""`encode` of a model that was changed, added to or taken apart: what `forward` gives then."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from minibert import BertConfig, BertModel, SentenceEncoder, Tokenizer, fast_inference, sentence_encoder
from minibert.attention import ATTENTION_FUNCTIONS
from minibert.fast_dropout import use_fast_dropout
from minibert.fast_inference import fast_copy
from tests.fast_reference import random_encoder, reference, relative, text


class Louder(nn.Module):
    """Around the embeddings."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return self.inner(*inputs) * torch.arange(36)  # type: ignore[no-any-return]


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def uniform_attention(
    _: object, __: object, value: Tensor, mask: Tensor | None, ___: object
) -> tuple[Tensor, None]:
    if mask is None:
        mask = torch.ones(len(value), 1, value.shape[2], value.shape[2])
    weights = mask.float() / mask.sum(-1, keepdim=True)  # (B, 1, T, T)
    return weights.expand(-1, value.shape[1], -1, -1) @ value, None


def changes() -> list[Callable[[BertModel], None]]:
    def in_place(model: BertModel) -> None:
        with torch.no_grad():
            model.get_parameter("layers.1.feed_forward.down.weight").mul_(1.5)

    def a_step(model: BertModel) -> None:
        model(torch.tensor([[5, 6, 7]])).last_hidden_state[..., 0].sum().backward()
        torch.optim.Adam(model.parameters(), lr=0.1).step()

    def a_fused_step(model: BertModel) -> None:
        """Of one row only: few numbers are compared, so what tells of it is the optimizer."""
        weight = model.get_parameter("layers.0.feed_forward.up.weight")
        weight.grad = torch.zeros_like(weight)
        weight.grad[3] = torch.randn(36)
        torch.optim.SGD([weight], lr=5, fused=True).step()

    def new_data(model: BertModel) -> None:
        weight = model.get_parameter("layers.0.attention.value.weight")
        weight.data = weight.data * 1.5

    def told(model: BertModel) -> None:
        model.get_parameter("layers.1.feed_forward.up.weight").detach().numpy()[:] *= 1.5
        torch.autograd.graph.increment_version(model.parameters())

    def new_parameters(model: BertModel) -> None:
        value = model.layers[0].attention.value  # type: ignore[union-attr]
        for seed in range(3):  # the last of which may lie where the first did
            torch.manual_seed(seed)
            value.weight = nn.Parameter(torch.randn(36, 36))  # type: ignore[union-attr]

    def pruned(model: BertModel) -> None:
        prune.l1_unstructured(model.get_submodule("layers.1.feed_forward.up"), "weight", amount=0.5)  # type: ignore[no-untyped-call]

    def other_forward(model: BertModel) -> None:
        value = model.get_submodule("layers.0.attention.value")
        forward = value.forward
        value.forward = lambda x: 2 * forward(x)

    def other_class(model: BertModel) -> None:
        model.get_submodule("layers.0.attention.value").__class__ = Doubled

    def new_module(model: BertModel) -> None:
        model.layers[0].attention.value = nn.Linear(36, 36)  # type: ignore[union-attr]

    def adapter(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        attention.value = nn.Sequential(attention.get_submodule("value"), nn.Linear(36, 36))

    def table_adapter(model: BertModel) -> None:
        table = model.get_submodule("embeddings.word")
        model.embeddings.word = nn.Sequential(table, nn.Linear(36, 36))  # type: ignore[assignment]

    def no_bias(model: BertModel) -> None:
        model.layers[1].feed_forward.down = nn.Linear(37, 36, bias=False)  # type: ignore[union-attr]

    def other_embeddings(model: BertModel) -> None:
        model.embeddings = Louder(model.embeddings)  # type: ignore[assignment]

    def outside_hook(model: BertModel) -> None:
        model.register_forward_hook(
            lambda _, __, output: output._replace(last_hidden_state=output.last_hidden_state * torch.arange(36))
        )

    def outside_forward(model: BertModel) -> None:
        forward = model.forward
        model.forward = lambda *inputs: forward(*inputs)._replace(  # type: ignore[method-assign]
            last_hidden_state=forward(*inputs).last_hidden_state * torch.arange(36)
        )

    def activation(model: BertModel) -> None:
        model.get_submodule("layers.0.feed_forward").activation = nn.ReLU()

    class OnlyScaled(nn.Module):
        def forward(self, hidden: Tensor, mask: object, attend: object) -> tuple[Tensor, None]:
            return hidden * torch.arange(36), None

    def other_layer(model: BertModel) -> None:
        model.get_submodule("layers")[1] = OnlyScaled()  # type: ignore[operator]

    def merged(model: BertModel) -> None:  # as peft does
        for layer in model.layers:
            value = layer.get_submodule("attention.value")
            value.get_parameter("weight").data += 0.01 * torch.randn(36, 2) @ torch.randn(2, 36)

    def biases(model: BertModel) -> None:  # as torch_ema does
        model.get_parameter("layers.1.feed_forward.up.bias").data.copy_(torch.randn(37))

    def plain_tensor(model: BertModel) -> None:
        value = model.get_submodule("layers.1.attention.value")
        del value.weight
        value.weight = torch.randn(36, 36)

    def without_cls(model: BertModel) -> None:
        def ablate(_: nn.Module, __: object, output: tuple[Tensor, None]) -> tuple[Tensor, None]:
            hidden = output[0].clone()
            hidden[:, 0] = 0
            return hidden, None

        model.layers[0].register_forward_hook(ablate)

    def before_a_layer(model: BertModel) -> None:
        model.layers[1].register_forward_pre_hook(lambda _, inputs: (inputs[0] * torch.arange(36), *inputs[1:]))

    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.cumsum(1))  # of a text's tokens, from the left

    def mixes_tokens(model: BertModel) -> None:
        model.layers[0].feed_forward.up = Mixing(36, 37)  # type: ignore[union-attr]

    def own_function(model: BertModel) -> None:
        attention: Any = model.get_submodule("layers.1.attention")
        project = attention.project
        attention.project = lambda hidden: [2 * states for states in project(hidden)]

    def one_key_for_all_heads(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        attention.key, attention.value = nn.Linear(36, 12), nn.Linear(36, 12)

    def one_value_for_all_heads(model: BertModel) -> None:
        model.get_submodule("layers.1.attention").value = nn.Linear(36, 12)

    def no_layers(model: BertModel) -> None:
        model.layers = nn.ModuleList()

    def limited_table(model: BertModel) -> None:
        model.embeddings.position = nn.Embedding(512, 36, max_norm=0.01)

    def own_attention(model: BertModel) -> None:
        model.attention = "uniform"

    def fewer_heads(model: BertModel) -> None:
        attention = model.get_submodule("layers.0.attention")
        for name in ("query", "key", "value"):
            setattr(attention, name, nn.Linear(36, 24))
        attention.output = nn.Linear(24, 36)

    def fewer_inner_numbers(model: BertModel) -> None:
        up, down = (model.get_submodule(f"layers.0.feed_forward.{name}") for name in ("up", "down"))
        up.weight, up.bias = nn.Parameter(torch.randn(9, 36)), nn.Parameter(torch.randn(9))
        down.weight = nn.Parameter(torch.randn(36, 9))  # in_features stay what they were

    def the_first_inner_numbers(model: BertModel) -> None:
        """What is left lies where it lay, and no version tells."""
        up, down = (model.get_submodule(f"layers.0.feed_forward.{name}") for name in ("up", "down"))
        for parameter in up.parameters():
            parameter.data = parameter.data[:29]
        down.weight.data = down.get_parameter("weight").data[:, :29]

    def transposed(model: BertModel) -> None:
        weight = model.get_parameter("layers.0.attention.value.weight")
        weight.data = weight.data.T

    def a_fused_step_that_leaves_no_gradient(model: BertModel) -> None:
        weight = model.get_parameter("layers.0.feed_forward.up.weight")
        weight.grad = torch.zeros_like(weight)
        weight.grad[3] = torch.randn(36)
        optimizer = torch.optim.SGD([weight], lr=5, fused=True)
        optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        optimizer.step()

    def norm(model: BertModel) -> None:
        with torch.no_grad():
            model.get_parameter("layers.1.feed_forward_norm.weight").mul_(1.5)

    def other_eps(model: BertModel) -> None:
        model.layers[0].attention_norm.eps = 1.0  # type: ignore[union-attr]

    def other_head_size(model: BertModel) -> None:
        model.layers[0].attention.head_size = 18  # type: ignore[union-attr]

    def other_activation(model: BertModel) -> None:
        model.layers[0].feed_forward.activation = F.relu  # type: ignore[union-attr]

    def own_activation(model: BertModel) -> None:
        model.layers[0].feed_forward.activation = torch.sin  # type: ignore[union-attr]

    def other_method(model: BertModel) -> None:
        run_layers: Any = model.run_layers

        def twice(*inputs: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
            return ((2 * hidden, weights) for hidden, weights in run_layers(*inputs))

        model.run_layers = twice  # type: ignore[method-assign, assignment]

    class TwiceTheNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def other_norm(model: BertModel) -> None:
        model.layers[1].feed_forward_norm = TwiceTheNorm(36)

    return [
        *(biases, in_place, a_step, a_fused_step, new_data, told, new_parameters, pruned, norm),
        *(merged, plain_tensor, without_cls, mixes_tokens, fewer_heads, fewer_inner_numbers, own_attention),
        *(own_function, one_key_for_all_heads, one_value_for_all_heads, no_layers, limited_table),
        *(the_first_inner_numbers, transposed, a_fused_step_that_leaves_no_gradient, before_a_layer),
        *(no_bias, activation, other_forward, outside_forward, outside_hook),
        *(new_module, other_class, adapter, table_adapter, other_embeddings, other_layer, other_norm),
        *(other_eps, other_head_size, other_activation, own_activation, other_method),
    ]


@pytest.fixture
def encoder(minilm: Path) -> SentenceEncoder:
    return random_encoder(minilm)


TEXTS = ["one text", "and another one"]


def encode(encoder: SentenceEncoder) -> Tensor:
    return encoder.encode(TEXTS, convert_to_tensor=True)


def encode_and_compare(encoder: SentenceEncoder) -> Tensor:
    """With `forward`."""
    vectors = encode(encoder)
    assert relative(vectors, reference(encoder, TEXTS)) < 1e-6
    return vectors


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
def test_a_change_is_seen(
    encoder: SentenceEncoder, change: Callable[[BertModel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "uniform", uniform_attention)
    before = encode(encoder)
    change(encoder.model)
    assert relative(encode_and_compare(encoder), before) > 1e-3


def test_an_old_copy_is_freed_before_its_successor_takes_as_much(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.encode("one text")
    old = weakref.ref(vars(encoder.model)["_kept"].copy)
    make, was_there = fast_inference._Kept, []

    def noting(*arguments: Any) -> Any:
        was_there.append(old() is not None)
        return make(*arguments)

    monkeypatch.setattr(fast_inference, "_Kept", noting)
    nn.init.ones_(encoder.model.get_parameter("layers.0.feed_forward.up.bias"))
    encoder.encode("one text")
    assert was_there == [False]


def test_another_function_under_the_same_name(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = encode(encoder)
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "sdpa", uniform_attention)
    assert relative(encode_and_compare(encoder), before) > 1e-3


def test_new_data_where_the_old_was(minilm: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=12, num_attention_heads=3, num_hidden_layers=1, intermediate_size=70_000)
    encoder = SentenceEncoder(BertModel(config).eval(), Tokenizer.from_pretrained(minilm))
    bias = encoder.model.get_parameter("layers.0.feed_forward.up.bias")
    old = bias.data
    bias.data = torch.randn(70_000)
    encoder.encode("one text")
    seen = bias.data_ptr()
    bias.data = old  # whose memory is the other's now?
    others = [torch.randn(70_000) for _ in range(99)]
    bias.data = next((data for data in others if data.data_ptr() == seen), others[0])
    encode_and_compare(encoder)


def test_a_norm_in_the_place_of_a_dropout_counts(minilm: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=36,
        num_attention_heads=3,
        num_hidden_layers=1,
        intermediate_size=2048,
        initializer_range=0.2,
    )
    model = BertModel(config).eval()
    norm = nn.LayerNorm(36)
    nn.init.normal_(norm.bias, std=3.0)
    model.layers[0].feed_forward.dropout = norm  # type: ignore[union-attr]
    encoder = SentenceEncoder(model, Tokenizer.from_pretrained(minilm), dtype=torch.bfloat16)
    assert relative(encode(encoder), reference(encoder, TEXTS)) < 0.02


def test_inference_tensors_are_taken_as_they_are(minilm: Path) -> None:
    with torch.inference_mode():
        encoder = random_encoder(minilm)
        before = encode(encoder)
        for parameter in encoder.model.parameters():
            parameter.mul_(1.5)
        assert relative(encode_and_compare(encoder), before) > 1e-3
        loaded = BertModel.from_pretrained(minilm)
    loaded(torch.tensor([[5, 6, 7]])).last_hidden_state.sum().backward()  # can be trained


def test_an_encoder_with_a_forward_of_its_own(encoder: SentenceEncoder) -> None:
    class Shifted(SentenceEncoder):
        def forward(
            self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
        ) -> Tensor:
            shift = F.dropout(torch.arange(36.0), 0.5, self.training)
            return super().forward(input_ids, attention_mask, token_type_ids) + shift

    shifted = Shifted(encoder.model, encoder.tokenizer, dtype=torch.bfloat16).train()
    texts = ["a b c", "", "d e f", "one more, which is longer", "g h i"]
    expected = encoder.encode(texts, convert_to_tensor=True) + torch.arange(36)
    for batch_size in (None, 2):
        assert relative(shifted.encode(texts, batch_size, convert_to_tensor=True), expected) < 1e-6
    assert shifted.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_encoder_whose_vectors_are_others(encoder: SentenceEncoder, dtype: torch.dtype) -> None:
    class Dense(SentenceEncoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
            hidden = self.model(input_ids, attention_mask).last_hidden_state  # (B, T, H)
            return hidden.masked_fill(attention_mask[..., None] == 0, -9).amax(1)[:, :7].to(dtype)  # type: ignore[no-any-return]

    dense, texts = Dense(encoder.model, encoder.tokenizer), [text(n, n) for n in (1, 5, 5, 0)] + 4100 * ["one"]
    vectors = dense.encode(texts, convert_to_tensor=True)
    assert vectors.shape == (4104, 7)
    assert vectors.dtype == torch.promote_types(dtype, torch.float32)
    with torch.no_grad():
        expected = dense(**{k: v for k, v in dense.tokenizer(texts[:5]).items() if k != "token_type_ids"})
    assert relative(vectors[:5], expected.to(vectors.dtype)) < (0.01 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("how", ["hook on the encoder", "function of the encoder", "hook on a compiled model"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # on importing the compiler
def test_what_is_put_around_the_model(encoder: SentenceEncoder, how: str) -> None:
    before = encode(encoder)
    if how == "hook on the encoder":
        encoder.register_forward_hook(lambda _, __, output: output * torch.arange(36))
    elif how == "function of the encoder":
        forward = encoder.forward
        encoder.forward = lambda *inputs, **named: forward(*inputs, **named) * torch.arange(36)  # type: ignore[method-assign]
    else:
        encoder.model = torch.compile(encoder.model, backend="eager")  # type: ignore[assignment]
        encoder.model.register_forward_hook(
            lambda _, __, output: output._replace(last_hidden_state=output.last_hidden_state * torch.arange(36))
        )
    assert relative(encode(encoder), before * torch.arange(36)) < 1e-6


def test_a_module_around_the_model(encoder: SentenceEncoder, tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self, inner: BertModel) -> None:
            super().__init__()
            self.inner, self.config, self.device, self.dtype = inner, inner.config, inner.device, inner.dtype

        def forward(self, *inputs: Tensor | None) -> Any:
            output = self.inner(*inputs)
            return output._replace(last_hidden_state=2 * output.last_hidden_state)

    expected = 2 * encode(encoder)
    encoder = SentenceEncoder(Around(encoder.model), encoder.tokenizer)  # type: ignore[arg-type]
    assert relative(encode(encoder), expected) < 1e-6
    with pytest.raises(ValueError, match=r"a tests.Around cannot be saved, only a minibert.BertModel: put"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_subclass_of_the_model(encoder: SentenceEncoder) -> None:
    class Doubled(BertModel):
        def forward(self, *inputs: Any, **named: Any) -> Any:
            output = super().forward(*inputs, **named)
            return output._replace(last_hidden_state=2 * output.last_hidden_state)

    model = Doubled(encoder.model.config).eval()
    model.load_state_dict(encoder.model.state_dict())
    assert relative(encode(SentenceEncoder(model, encoder.tokenizer)), 2 * encode(encoder)) < 1e-6


def test_cheaper_dropout_is_ours(encoder: SentenceEncoder) -> None:
    use_fast_dropout(encoder.model)
    assert fast_copy(encoder.model) is not None


def test_a_pooling_of_ones_own(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def max_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1)

    monkeypatch.setitem(sentence_encoder.POOLINGS, "max", max_pooling)
    encoder.pooling = "max"
    encode_and_compare(encoder)


class Merging(nn.Linear):
    """As loralib's: `train` merges and unmerges."""

    merged = False

    def train(self, mode: bool = True) -> Self:
        self.merged = not mode
        return super().train(mode)


def test_a_part_is_told_when_it_is_in_training_again(encoder: SentenceEncoder) -> None:
    part = Merging(36, 36)
    encoder.model.get_submodule("layers.0.attention").value = part
    encoder.train()
    encoder.model.layers[1].eval()
    before = [module.training for module in encoder.modules()]
    encoder.encode("one text")
    assert [module.training for module in encoder.modules()] == before
    assert not part.merged


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # on importing the compiler
def test_a_compiled_model_is_left_as_it_is(encoder: SentenceEncoder, tmp_path: Path) -> None:
    expected = encoder.encode(["one text"])
    compiled = SentenceEncoder(torch.compile(encoder.model), encoder.tokenizer)  # type: ignore[arg-type]
    np.testing.assert_array_equal(compiled.encode(["one text"]), expected)
    assert relative(reference(encoder, ["one text"]), torch.tensor(expected)) < 1e-6
    compiled.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(
        SentenceEncoder.from_pretrained(tmp_path / "saved").encode(["one text"]), expected
    )


def test_the_copy_dies_with_its_model(minilm: Path) -> None:
    encoder = random_encoder(minilm)
    encoder.model.layers[0].register_forward_hook(lambda *_, holds=encoder: None)
    encoder.encode("one text")
    model = weakref.ref(encoder.model)
    assert vars(copy.deepcopy(encoder.model))["_kept"] is None  # it would take the memory twice
    del encoder
    gc.collect()
    assert model() is None


def test_old_weights_go_when_the_model_is_converted(encoder: SentenceEncoder) -> None:
    encoder.encode("one text")
    kept = weakref.ref(vars(encoder.model)["_kept"])  # the packed ones, too
    encoder.half()
    assert kept() is None
    encoder.float()
    encode_and_compare(encoder)


def test_a_larger_vocabulary_counts_once_the_config_says_so(encoder: SentenceEncoder) -> None:
    encoder.tokenizer.backend.add_tokens(["zzqq"])
    table = encoder.model.embeddings.word.weight
    encoder.model.embeddings.word = nn.Embedding(30523, 36, _weight=torch.cat([table, 2 * table[:1]]).detach())
    with pytest.raises(ValueError, match=r"input_ids\[7\] is 30522, it must be from 0 to 30521"):
        encoder.encode(["a b c", "a zzqq"])
    encoder.model.config = replace(encoder.model.config, vocab_size=30523)
    vector = encoder.encode(["a zzqq"], convert_to_tensor=True)
    assert relative(vector, reference(encoder, ["a zzqq"])) < 1e-6


class Scaled(nn.Module):
    """An adapter."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = 2.0
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.dropout(self.inner(x)) + self.shift  # type: ignore[no-any-return]


def test_what_an_adapter_keeps_counts(encoder: SentenceEncoder) -> None:
    attention = encoder.model.get_submodule("layers.1.attention")
    adapter = Scaled(attention.get_submodule("value"))
    attention.value = adapter
    encoder.train()  # which encode is not
    seen = []
    for adapter.scale, shift in ((2.0, 1.0), (0.5, 1.0), (0.5, 3.0)):
        adapter.get_buffer("shift").fill_(shift)
        seen.append(encode(encoder))
        assert all(module.training for module in encoder.modules())
    encoder.eval()
    assert relative(seen[-1], reference(encoder, TEXTS)) < 1e-6
    adapter.train()  # as one that was put into a loaded model
    assert torch.equal(encode(encoder), seen[-1])
    assert adapter.training
    assert relative(seen[0], seen[1]) > 1e-3
    assert relative(seen[1], seen[2]) > 1e-3


def test_hooks_see_what_they_see_in_forward(encoder: SentenceEncoder) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[nn.Module, tuple[int, ...]]] = []

        def note(self, part: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            self.seen.append((part, tuple(inputs[0].shape)))

    method, bound = Recorder(), Recorder()
    first, second = encoder.model.layers
    first.register_forward_hook(method.note)
    second.register_forward_hook(partial(Recorder.note, bound))
    encoder.encode(["one text", "two text"])
    assert method.seen == [(first, (2, 4, 36))]
    assert bound.seen == [(second, (2, 4, 36))]


PARTS = """embeddings embeddings.position embeddings.norm layers.1 layers.0.attention layers.1.attention.key
layers.0.attention.dropout layers.1.attention_norm layers.0.feed_forward layers.1.feed_forward.up"""


@pytest.mark.parametrize("name", PARTS.split())
def test_hooks_are_called(encoder: SentenceEncoder, name: str) -> None:
    """Whenever they are put there, and what they return counts, as in the reference."""
    before = encode(encoder)

    def negate(_: nn.Module, inputs: object, output: Any) -> Any:
        return (-output[0], output[1]) if isinstance(output, tuple) else -output

    hook = encoder.model.get_submodule(name).register_forward_hook(negate)
    assert relative(encode_and_compare(encoder), before) > 1e-3
    hook.remove()
    assert torch.equal(encode(encoder), before)


def test_a_part_that_was_taken_out(minilm: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(minilm)
    expected = encoder.encode("one text")
    encoder.model.pooler = None
    np.testing.assert_array_equal(encoder.encode("one text"), expected)
