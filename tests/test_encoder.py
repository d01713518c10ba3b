"""The encoder without transformers: PyTorch's own layer as oracle, behaviour, and every bad input."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

from minibert import BertConfig, BertModel, BertModelOutput, cls_pooling, inputs, mean_pooling
from minibert.attention import ATTENTION_FUNCTIONS, expand_mask, sdpa_attention
from minibert.config import HIDDEN_ACTS
from minibert.layers import ACTIVATIONS, EncoderLayer
from tests.conftest import TINY

CONFIG = BertConfig(**TINY)  # type: ignore[arg-type]


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest) -> BertModel:
    torch.manual_seed(0)
    return BertModel(CONFIG, attention=request.param).eval()


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


IDS = random_ids(2, 5)


def test_layer_equals_pytorchs_own() -> None:
    torch.manual_seed(0)
    ours = EncoderLayer(CONFIG).double().eval()
    theirs = nn.TransformerEncoderLayer(
        CONFIG.hidden_size, CONFIG.num_attention_heads, CONFIG.intermediate_size,
        activation="gelu", layer_norm_eps=CONFIG.layer_norm_eps, batch_first=True, dtype=torch.float64,
    ).eval()  # fmt: skip
    qkv = (ours.attention.query, ours.attention.key, ours.attention.value)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in qkv]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in qkv]))
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (theirs.self_attn.out_proj, ours.attention.output),
        (theirs.norm1, ours.attention_norm),
        (theirs.linear1, ours.feed_forward.up),
        (theirs.linear2, ours.feed_forward.down),
        (theirs.norm2, ours.feed_forward_norm),
    ]
    for target, source in pairs:
        target.load_state_dict(source.state_dict())
    hidden = torch.randn(3, 13, 36, dtype=torch.float64)
    mask = torch.rand(3, 13) < 0.7
    mask[:, 0] = True
    expected = theirs(hidden, src_key_padding_mask=~mask)
    output, _ = ours(hidden, expand_mask(mask), sdpa_attention)
    torch.testing.assert_close(output[mask], expected[mask], rtol=1e-12, atol=1e-12)


def test_padding_does_not_change_the_tokens(model: BertModel) -> None:
    model.double()
    ids = random_ids(2, 7)
    padded = torch.cat([ids, random_ids(2, 6, seed=1)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 6] * 2)
    alone, among = model(ids).last_hidden_state, model(padded, mask).last_hidden_state
    torch.testing.assert_close(among[:, :7], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_without_tokens_is_finite_and_pools_to_zero(model: BertModel, dtype: torch.dtype) -> None:
    model.to(dtype)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]])
    hidden = model(random_ids(2, 4), mask).last_hidden_state
    assert hidden.isfinite().all()
    pooled = mean_pooling(hidden, mask)
    assert (pooled[1] == 0).all()
    assert (pooled[0] != 0).any()


def test_poolings_by_formula() -> None:
    hidden = torch.randn(3, 5, 7, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 0, 1], [1, 0, 0, 0, 0]])
    expected = torch.stack([hidden[0].mean(0), (hidden[1, 2] + hidden[1, 4]) / 2, hidden[2, 0]])
    torch.testing.assert_close(mean_pooling(hidden, mask), expected)
    assert torch.equal(cls_pooling(hidden, mask), torch.stack([hidden[0, 0], hidden[1, 2], hidden[2, 0]]))
    half = hidden.bfloat16()  # is summed in float32
    for pooling in (mean_pooling, cls_pooling):
        assert torch.equal(pooling(half, mask), pooling(half.float(), mask))
        assert pooling(half, mask).dtype == torch.float32


@pytest.mark.parametrize("pooling", [mean_pooling, cls_pooling])
def test_poolings_refuse_a_bad_mask(pooling: Any) -> None:
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1\), it must be \(2, 5\)"):
        pooling(torch.ones(2, 5, 7), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"attention_mask\[0, 0\] is -1.0, it must be 1 for a token"):
        pooling(torch.ones(2, 5, 7), -torch.ones(2, 5))


@pytest.mark.parametrize("pooling", [mean_pooling, cls_pooling])
def test_poolings_refuse_what_is_no_last_hidden_state(model: BertModel, pooling: Any) -> None:
    output = model(IDS)
    with pytest.raises(TypeError, match=r"is a minibert.BertModelOutput, .*: give its .last_hidden_state$"):
        pooling(output, torch.ones_like(IDS))
    with pytest.raises(TypeError, match=r"last_hidden_state is a tuple, it must be a tensor$"):
        pooling((output.last_hidden_state,), torch.ones_like(IDS))
    with pytest.raises(ValueError, match=r"last_hidden_state has shape .*, it must be \(batch, tokens, hidden"):
        pooling(output.pooler_output, torch.ones_like(IDS))


@pytest.mark.parametrize("config", ["all-MiniLM-L6-v2", {"hidden_size": 36}, None])
def test_a_model_is_made_of_a_config(config: Any) -> None:
    kind = type(config).__name__
    with pytest.raises(
        TypeError, match=f"config is a {kind}, it must be a minibert.BertConfig: from_dict makes"
    ):
        BertModel(config)
    if not isinstance(config, dict):
        with pytest.raises(TypeError, match=rf"such as another's .to_dict\(\), not of a {kind}"):
            BertConfig.from_dict(config)


def test_outputs_asked_for_and_not(model: BertModel) -> None:
    plain = model(random_ids(3, 13))
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert plain.last_hidden_state.shape == (3, 13, 36)
    assert plain.pooler_output.shape == (3, 36)
    full = model(random_ids(3, 13), output_hidden_states=True)
    assert [h.shape for h in full.hidden_states] == [(3, 13, 36)] * 3
    assert full.hidden_states[-1] is full.last_hidden_state


def test_torch_sees_what_is_in_an_output(model: BertModel) -> None:
    ids = random_ids(3, 7)
    leaves = tree_leaves(model(ids, output_hidden_states=True))
    assert sum(isinstance(leaf, Tensor) for leaf in leaves) == 2 + len(model.layers) + 1
    hidden, pooled, *rest = model(ids)
    assert ((hidden.shape, pooled.shape), rest) == (((3, 7, 36), (3, 36)), [None, None])
    doubled = tree_map(lambda leaf: leaf if leaf is None else 2 * leaf, model(ids))
    assert torch.equal(doubled.last_hidden_state, 2 * model(ids).last_hidden_state)


class LastHiddenState(nn.Module):
    """What torch.jit.trace can give back."""

    def __init__(self, model: BertModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output: BertModelOutput = self.model(input_ids, attention_mask)
        return output.last_hidden_state


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_a_trace_serves_other_masks(model: BertModel) -> None:
    ids, mask, whole = random_ids(3, 7), torch.ones(3, 7, dtype=torch.int64), LastHiddenState(model)
    traced = torch.jit.trace(whole, (ids, mask))  # type: ignore[no-untyped-call]
    mask[0, 4:] = 0
    torch.testing.assert_close(traced(ids, mask), whole(ids, mask))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # in PyTorch 2.12
def test_an_exported_graph_serves_other_batches(model: BertModel, tmp_path: Path) -> None:
    given = {"input_ids": random_ids(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in given}
    torch.export.save(torch.export.export(model, (), given, dynamic_shapes=shapes), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    ids, mask = random_ids(5, 13), random_ids(5, 13) % 2
    expected, output = model(ids, mask), exported(input_ids=ids, attention_mask=mask)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.pooler_output, expected.pooler_output)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # on importing the compiler
def test_compiled_it_is_one_graph(model: BertModel) -> None:
    graphs: list[object] = []

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=note, fullgraph=True)
    for mask in (torch.ones(5, 13), random_ids(5, 13) % 2):
        output = compiled(random_ids(5, 13), mask.long())
        assert torch.equal(output.last_hidden_state, model(random_ids(5, 13), mask.long()).last_hidden_state)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of sdpa under vmap
def test_gradients_of_each_text(model: BertModel) -> None:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0

    def total(weights: dict[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
        output: BertModelOutput = functional_call(model, weights, (ids[None], mask[None]))
        return output.last_hidden_state.square().sum()

    together = vmap(grad(total), in_dims=(None, 0, 0))(weights, ids, mask)
    for row in range(3):
        for name, gradient in grad(total)(weights, ids[row], mask[row]).items():
            torch.testing.assert_close(together[name][row], gradient, rtol=1e-4, atol=1e-4)


def test_shapes_without_numbers() -> None:
    model = BertModel(CONFIG).to("meta")
    output = model(random_ids(3, 7).to("meta"), torch.ones(3, 7, device="meta"))
    assert (output.last_hidden_state.shape, output.pooler_output.shape) == ((3, 7, 36), (3, 36))


def test_attention_maps_are_distributions_over_the_tokens() -> None:
    model = BertModel(CONFIG, attention="eager").eval()
    mask = torch.tensor([[1] * 9 + [0] * 4, [1] * 13])
    maps = model(random_ids(2, 13), mask, output_attentions=True).attentions
    assert [m.shape for m in maps] == [(2, 3, 13, 13)] * 2
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 3, 13))
    assert (maps[0][0, :, :, 9:] == 0).all()


def test_an_attention_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_but_itself(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        weights = torch.eye(query.shape[2]).expand(*query.shape[:3], -1)  # (B, N, T, T)
        return weights @ value, weights

    monkeypatch.setitem(ATTENTION_FUNCTIONS, "itself", nothing_but_itself)
    model = BertModel(CONFIG, attention="itself").eval()
    ids = random_ids(2, 13)
    output = model(ids, output_attentions=True)
    assert output.attentions[1][1, 2].equal(torch.eye(13))
    ids[:, 1:] = 5  # each token is encoded as if it were alone, so the first is not changed
    assert model(ids).last_hidden_state[:, 0].allclose(output.last_hidden_state[:, 0], atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "packed"])
@pytest.mark.parametrize("part", ["layers.1", "layers.0.attention"])
def test_a_part_that_gives_no_pair_is_refused(attention: str, part: str) -> None:
    model = BertModel(CONFIG, attention=attention).eval()
    model.get_submodule(part).register_forward_hook(lambda module, inputs, output: output[0])
    kind = "a layer" if part == "layers.1" else "an attention"
    with pytest.raises(TypeError, match=f"{kind} gave a Tensor, it must give a pair: its states, and the att"):
        model(random_ids(2, 5))  # two texts, which could be taken for two outputs


def test_a_part_that_gives_one_in_a_tuple_is_refused() -> None:
    model = BertModel(CONFIG).eval()
    model.layers[1].register_forward_hook(lambda module, inputs, output: output[:1])
    with pytest.raises(TypeError, match="a layer gave a tuple of 1, it must give a pair: its states, and"):
        model(random_ids(2, 5))
    model.layers[1] = nn.Identity()
    model.layers[1].forward = lambda *_: None  # a forgotten `return`
    with pytest.raises(TypeError, match="a layer gave a NoneType, it must give a pair: its states, and"):
        model(random_ids(2, 5))


def test_an_attention_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that unpickles a model and has not registered its attention."""
    monkeypatch.setitem(ATTENTION_FUNCTIONS, "mine", sdpa_attention)
    pickled = pickle.dumps(BertModel(CONFIG, attention="mine"))
    monkeypatch.delitem(ATTENTION_FUNCTIONS, "mine")
    with pytest.raises(ValueError, match="attention is 'mine', it must be eager, sdpa or packed"):
        pickle.loads(pickled)(random_ids(2, 5))


def test_a_layer_without_attention_weights_keeps_its_place() -> None:
    model = BertModel(CONFIG, attention="eager").eval()
    whole = model(random_ids(2, 5), output_attentions=True).attentions
    model.layers[0].register_forward_hook(lambda module, inputs, output: (output[0], None))
    without = model(random_ids(2, 5), output_attentions=True).attentions
    assert without[0] is None
    assert without[1].equal(whole[1])


def test_fresh_weights_are_berts() -> None:
    model = BertModel(BertConfig(vocab_size=997, hidden_size=60, num_attention_heads=5, num_hidden_layers=1))
    words = model.embeddings.word.weight
    assert (words[0] == 0).all()
    assert 0.019 < words[1:].std() < 0.021
    assert 0.019 < model.layers[0].feed_forward.up.weight.std() < 0.021  # type: ignore[union-attr, operator]
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    assert all((p == 1).all() for n, p in model.named_parameters() if n.endswith("norm.weight"))


def test_every_supported_activation_is_there() -> None:
    assert tuple(ACTIVATIONS) == HIDDEN_ACTS


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids is list, it must be a tensor of int64 or int32"),
        ({"input_ids": {"input_ids": IDS}}, TypeError, "input_ids is dict, it must be a tensor of int64 or int32: call model(**batch)"),
        ({"input_ids": torch.ones(2, 5)}, TypeError, "input_ids is torch.float32, it must be a tensor of int64"),
        ({"input_ids": IDS[0]}, ValueError, "input_ids has shape (5,), it must be (batch, tokens)"),
        ({"input_ids": IDS[:0]}, ValueError, "input_ids has shape (0, 5), it must be (batch, tokens) and not empty"),
        ({"input_ids": IDS[:, :0]}, ValueError, "input_ids has shape (2, 0)"),
        ({"input_ids": torch.tensor([[1, 2], [3, 97]])}, ValueError, "input_ids[1, 1] is 97, it must be from 0 to 96"),
        ({"input_ids": torch.tensor([[1, -1]])}, ValueError, "input_ids[0, 1] is -1"),
        ({"input_ids": random_ids(1, 20)}, ValueError, "input_ids is 20 tokens long, this model has positions for 19"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, "attention_mask has shape (2, 4), it must be (2, 5)"),
        ({"attention_mask": torch.ones(2, 1, 1, 5)}, ValueError, "attention_mask has shape (2, 1, 1, 5)"),
        ({"attention_mask": torch.full((2, 5), 2)}, ValueError, "attention_mask[0, 0] is 2, it must be 1 for a token"),
        ({"attention_mask": torch.full((2, 5), -1e4)}, ValueError, "attention_mask[0, 0] is -10000.0"),
        ({"attention_mask": torch.full((2, 5), torch.nan)}, ValueError, "attention_mask[0, 0] is nan"),
        ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask is list"),
        ({"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "token_type_ids has shape (2, 4)"),
        ({"token_type_ids": torch.full((2, 5), 3)}, ValueError, "token_type_ids[0, 0] is 3, it must be from 0 to 2"),
        ({"token_type_ids": [[0] * 5] * 2}, TypeError, "token_type_ids is list"),
    ],
)  # fmt: skip
def test_bad_inputs(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = BertModel(CONFIG)
    with pytest.raises(error) as caught:
        model(**{"input_ids": IDS, **arguments})
    assert message in str(caught.value)


def test_attention_weights_of_sdpa_are_refused() -> None:
    with pytest.raises(ValueError, match='output_attentions needs attention="eager"'):
        BertModel(CONFIG)(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="attention is 'flash', it must be eager, sdpa or packed"):
        BertModel(CONFIG, attention="flash")
    model = BertModel(CONFIG)
    with pytest.raises(ValueError, match="attention is 'flash', it must be eager, sdpa or packed"):
        model.attention = "flash"


def test_model_without_token_types_refuses_them() -> None:
    model = BertModel(BertConfig(**(TINY | {"type_vocab_size": 0})))  # type: ignore[arg-type]
    assert model(IDS).last_hidden_state.shape == (2, 5, 36)
    with pytest.raises(ValueError, match="has no token types"):
        model(IDS, token_type_ids=torch.zeros_like(IDS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported, only gelu, relu, gelu_new, silu"),
        ({"num_attention_heads": 5}, "hidden_size 768 cannot be split into 5 equal heads"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, it must be an integer from 1 up"),
        ({"vocab_size": "many"}, "vocab_size is 'many', it must be an integer from 1 up"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5, it must be a number from 0 to below 1"),
        ({"pad_token_id": 0.0}, "pad_token_id is 0.0, it must be an integer or null"),
        ({"pad_token_id": True}, "pad_token_id is True"),
        ({"pad_token_id": 30522}, "pad_token_id 30522 is not in the vocabulary"),
        (
            {"position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not supported",
        ),
        ({"is_decoder": True}, "is_decoder True is not supported, only False"),
        ({"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads {'0': [1]} is not supported"),
        ({"model_type": "roberta"}, "model_type 'roberta' is not supported"),
        ({"model_type": "distilbert"}, "a distilbert has type_vocab_size 0"),
    ],
)
def test_bad_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        BertConfig.from_dict(fields)
    assert message in str(caught.value)


def test_config_round_trip() -> None:
    assert BertConfig.from_dict(CONFIG.to_dict()) == CONFIG
    assert BertConfig.from_dict({"use_cache": True, "position_embedding_type": "absolute"}) == BertConfig()
    assert BertConfig().head_size == 64


def test_while_a_cuda_graph_is_captured_no_number_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

        def __bool__(self) -> bool:
            assert not torch.cuda.is_current_stream_capturing()
            return True

    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda value=capturing: value)
        assert inputs.holds(OnGpu()) is not capturing
