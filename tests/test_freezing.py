"""Frozen is frozen: what no plan trains keeps every bit, gets no dropout and costs no memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from heads import MLPHead, MultiTaskLoss, MultiTaskModel
from minibert import BertConfig, BertModel, SentenceEncoder
from minibert.freezing import FreezePlan, named_groups, set_groups
from tests.conftest import TINY

EMBEDDINGS = ["embeddings"]
LAYERS = ["layers.0", "layers.1", "layers.2"]
HEADS = ["heads.type", "heads.sentiment"]
EVERYTHING = EMBEDDINGS + LAYERS + HEADS

# (plan, epoch) -> what is trained
TRAINED = [
    ("none", 0, EVERYTHING),
    ("all", 0, []),
    ("backbone", 0, HEADS),
    ("head:type", 0, [*EMBEDDINGS, *LAYERS, "heads.sentiment"]),
    ("layers:0", 0, LAYERS + HEADS),
    ("layers:2", 0, ["layers.2", *HEADS]),
    ("layers:3", 0, HEADS),
    ("layers:1,head:sentiment", 0, ["layers.1", "layers.2", "heads.type"]),
    (" layers:1 , layers:2 ", 0, ["layers.2", *HEADS]),
    ("backbone,head:type", 0, ["heads.sentiment"]),
    ("gradual", 0, HEADS),
    ("gradual", 1, ["layers.2", *HEADS]),
    ("gradual", 3, LAYERS + HEADS),
    ("gradual", 4, EVERYTHING),
    ("gradual", 99, EVERYTHING),
    ("gradual:2", 1, HEADS),
    ("gradual:2", 2, ["layers.2", *HEADS]),
    ("gradual:2", 8, EVERYTHING),
    ("gradual,layers:2,head:type", 99, ["layers.2", "heads.sentiment"]),
    ("only:heads", 0, HEADS),
    ("only:heads.type", 0, ["heads.type"]),
    ("only:layers.1-2,heads", 0, ["layers.1", "layers.2", *HEADS]),
    ("only:layers.0", 0, ["layers.0"]),
    ("only:embeddings, layers", 0, EMBEDDINGS + LAYERS),
]
STRATEGIES = [spec for spec, epoch, trained in TRAINED if trained and (epoch == 0 or "gradual" in spec)]


@pytest.fixture
def model() -> MultiTaskModel:
    torch.manual_seed(0)
    fields: dict[str, Any] = TINY | {"num_hidden_layers": 3, "initializer_range": 0.1}
    encoder = BertModel(BertConfig(**fields)).eval()
    return MultiTaskModel(encoder, {"type": MLPHead(36, 13, 3), "sentiment": MLPHead(36, 7, 5)})


def batch(seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((6, 11), generator=generator) < 0.8
    mask[:, 0] = True
    labels = {"type": torch.randint(3, (6,), generator=generator)}
    labels["sentiment"] = torch.randint(5, (6,), generator=generator)
    return torch.randint(TINY["vocab_size"], (6, 11), generator=generator), mask, labels


def train_step(model: MultiTaskModel, optimizer: torch.optim.Optimizer, seed: int) -> None:
    input_ids, mask, labels = batch(seed)
    total, _ = MultiTaskLoss(list(labels))(model(input_ids, mask).logits, labels)
    optimizer.zero_grad()
    torch.autograd.backward(total)
    optimizer.step()


def moved(model: MultiTaskModel, before: dict[str, Tensor], but: set[str]) -> dict[str, set[bool]]:
    """Group -> whether its parameters have changed, `but` these."""
    result = {}
    for group, module in named_groups(model).items():
        prefix = next(name for name, m in model.named_modules() if m is module)
        result[group] = {
            not torch.equal(before[f"{prefix}.{name}"], parameter)
            for name, parameter in module.named_parameters()
            if name not in but
        }
    return result


@pytest.mark.parametrize(("spec", "epoch", "trained"), TRAINED)
def test_what_a_plan_trains(model: MultiTaskModel, spec: str, epoch: int, trained: list[str]) -> None:
    plan = FreezePlan.parse(spec)
    assert plan.trained(model, epoch) == trained
    plan.apply(model, epoch)
    for name, group in named_groups(model).items():
        assert {p.requires_grad for p in group.parameters()} == {name in trained}
    assert plan.trains_nothing(model) == (spec == "all")


@pytest.mark.parametrize(
    "optimizer_class",
    [torch.optim.AdamW, lambda groups: torch.optim.SGD(groups, momentum=0.9)],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize("spec", sorted(set(STRATEGIES)))
def test_twenty_steps_move_all_that_is_trained_and_nothing_else(
    model: MultiTaskModel, spec: str, optimizer_class: Callable[[Any], torch.optim.Optimizer]
) -> None:
    plan = FreezePlan.parse(spec, lr=1e-2, head_lr=1e-2, weight_decay=0.1)
    torch.manual_seed(1)
    optimizer = None
    for epoch in range(5):  # a gradual plan thaws on the way
        plan.apply(model, epoch)
        model.train()
        if optimizer is None:
            optimizer = optimizer_class(plan.optimizer_groups(model, epoch))
        set_groups(optimizer, plan.optimizer_groups(model, epoch))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for step in range(4):
            train_step(model, optimizer, seed=10 * epoch + step)
        trained = plan.trained(model, epoch)
        # Softmax does not see what all scores of a row share, so the key bias has no gradient but rounding,
        # which AdamW, unlike SGD, blows up to a step.
        but = set() if optimizer_class is torch.optim.AdamW else {"attention.key.bias"}
        for group, changes in moved(model, before, but).items():
            assert changes == {group in trained}, f"{group} in epoch {epoch}"


@pytest.mark.parametrize(("spec", "epoch", "trained"), TRAINED)
def test_frozen_parts_stay_in_eval_mode(
    model: MultiTaskModel, spec: str, epoch: int, trained: list[str]
) -> None:
    model.train()
    FreezePlan.parse(spec).apply(model, epoch)
    for _ in range(2):
        for name, group in named_groups(model).items():
            assert {m.training for m in group.modules()} == {name in trained}, name
        model.train()
    model.eval()
    assert not any(m.training for m in model.modules())
    FreezePlan.parse(spec).apply(model, epoch)  # in an evaluated model nothing starts to train by itself
    assert not any(m.training for group in named_groups(model).values() for m in group.modules())


def test_what_is_frozen_in_part_trains(model: MultiTaskModel) -> None:
    layer = model.encoder.layers[0]
    layer.attention.requires_grad_(False)
    model.train()
    assert all(m.training for m in layer.modules())


@pytest.mark.parametrize(("spec", "epoch", "trained"), TRAINED)
def test_nothing_is_saved_below_what_is_trained(
    model: MultiTaskModel, spec: str, epoch: int, trained: list[str]
) -> None:
    plan = FreezePlan.parse(spec)
    plan.apply(model, epoch)
    model.train()
    inside: list[str] = []
    saved: dict[str, int] = dict.fromkeys(EVERYTHING, 0)

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: object) -> None:
        inside.pop()

    def pack(tensor: Tensor) -> Tensor:
        for name in inside:
            saved[name] += 1
        return tensor

    for name, group in named_groups(model).items():
        if name != "pooler":
            group.register_forward_pre_hook(enter(name))
            group.register_forward_hook(leave)
    input_ids, mask, labels = batch(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        MultiTaskLoss(list(labels))(model(input_ids, mask).logits, labels)
    depth = len(EMBEDDINGS + LAYERS) if not (set(trained) - set(HEADS)) else EVERYTHING.index(trained[0])
    assert [saved[name] for name in EVERYTHING[:depth]] == [0] * depth
    assert all(saved[name] for name in trained)


def test_frozen_layers_give_the_same_twice(model: MultiTaskModel) -> None:
    """Dropout is off in them and on above."""
    FreezePlan.parse("layers:2").apply(model)
    model.train()
    input_ids, mask, _ = batch(0)
    first, second = (model.encoder(input_ids, mask, output_hidden_states=True).hidden_states for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert not torch.equal(first[3], second[3])


@pytest.mark.parametrize("layer_lr_decay", [0.5, 1.0])
@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_optimizer_groups(model: MultiTaskModel, layer_lr_decay: float, weight_decay: float) -> None:
    """Every trained parameter once, at its layer's rate; one group for each rate and decay."""
    plan = FreezePlan("layers:1", 1e-3, 5e-3, weight_decay, layer_lr_decay)
    groups = plan.optimizer_groups(model)
    rates = {"encoder.layers.1": 1e-3 * layer_lr_decay, "encoder.layers.2": 1e-3, "heads": 5e-3}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            (rate,) = (rate for start, rate in rates.items() if names[id(parameter)].startswith(start))
            assert group["lr"] == pytest.approx(rate, rel=1e-12)
            assert group["weight_decay"] == (weight_decay if parameter.dim() == 2 else 0)
    assert len(groups) == len(set(rates.values())) * (2 if weight_decay else 1)
    chosen = [id(parameter) for group in groups for parameter in group["params"]]
    plan.apply(model)
    assert sorted(chosen) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    whole = FreezePlan.parse("none", lr=1.0, layer_lr_decay=0.5).optimizer_groups(model)
    assert whole[0]["lr"] == 0.5**3  # the embeddings, below three layers


def test_a_head_under_two_names_is_trained_once(model: MultiTaskModel) -> None:
    head = model.heads["type"]
    twice = MultiTaskModel(model.encoder, {"type": head, "sentiment": head})
    chosen = [p for group in FreezePlan("backbone").optimizer_groups(twice) for p in group["params"]]
    assert sorted(map(id, chosen)) == sorted(map(id, head.parameters()))
    for frozen in ("type", "sentiment"):  # under one of its names it is trained
        FreezePlan(f"head:{frozen}").apply(twice)
        assert all(parameter.requires_grad for parameter in head.parameters())


def test_a_scheduler_goes_on_until_something_is_thawed(model: MultiTaskModel) -> None:
    plan = FreezePlan("gradual:3", lr=1.0, head_lr=8.0)
    optimizer = torch.optim.AdamW(plan.optimizer_groups(model))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    for epoch in range(4):
        set_groups(optimizer, plan.optimizer_groups(model, epoch))
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if epoch < 3:
            scheduler.step()
    assert rates == [[8.0, 8.0], [4.0, 4.0], [2.0, 2.0], [1.0, 1.0, 8.0, 8.0]]
    set_groups(optimizer, FreezePlan("gradual:3", lr=1.0, head_lr=3.0).optimizer_groups(model, 3))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 3.0, 3.0]
    own = list(model.heads.parameters())
    for lr in (1.0, 2.0):
        set_groups(optimizer, [{"params": iter(own), "lr": lr}])
        assert len(optimizer.param_groups[0]["params"]) == len(own)
        assert [group["lr"] for group in optimizer.param_groups] == [lr]


def test_without_an_epoch_it_is_the_first(model: MultiTaskModel) -> None:
    plan = FreezePlan("gradual", layer_lr_decay=0.0)
    heads = ["heads.type", "heads.sentiment"]
    assert plan.trained(model) == heads
    plan.apply(model)
    chosen = [p for group in plan.optimizer_groups(model) for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {*map(id, chosen)} == {*map(id, trained)} == {*map(id, model.heads.parameters())}
    assert plan.frozen_depth(model) == len(model.encoder.layers)
    assert [line.split()[0] for line in plan.summary(model).splitlines() if "trained " in line] == heads


def test_rates_set_by_hand_count(model: MultiTaskModel) -> None:
    plan = FreezePlan("backbone", head_lr=1.0)
    optimizer = torch.optim.AdamW(plan.optimizer_groups(model))
    for factor in (1.0, 0.1, 0.1, 1.0):
        groups = plan.optimizer_groups(model)
        for group in groups:
            group["lr"] *= factor
        set_groups(optimizer, groups)
        assert [group["lr"] for group in optimizer.param_groups] == [factor, factor]


def test_what_reduce_on_plateau_makes_of_rates_stays(model: MultiTaskModel) -> None:
    plan = FreezePlan("backbone", head_lr=1.0)
    own = torch.nn.Parameter(torch.zeros(1))  # which no plan has
    optimizer = torch.optim.AdamW([*plan.optimizer_groups(model), {"params": own, "lr": 1.0}])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for rate in (1.0, 1.0, 0.5, 0.25):  # from the second step on, as nothing gets better
        set_groups(optimizer, [*plan.optimizer_groups(model), {"params": own, "lr": 1.0}])
        assert [group["lr"] for group in optimizer.param_groups] == [rate, rate, rate]
        scheduler.step(1.0)


@pytest.mark.parametrize(
    ("first", "later"), [(float, float), (torch.tensor, torch.tensor), (torch.tensor, float)]
)
def test_rates_of_groups_that_no_plan_made(
    first: Callable[[float], Any], later: Callable[[float], Any]
) -> None:
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    def groups(*parameters: torch.nn.Parameter, kind: Callable[[float], Any] = later) -> list[dict[str, Any]]:
        return [{"params": each, "lr": kind(0.1)} for each in parameters]

    optimizer = torch.optim.AdamW(groups(one, kind=first))
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    rates = []
    for parameters in [(one,)] * 4 + [(one, two)] * 2:  # the other comes in the middle, and all rates are new
        set_groups(optimizer, groups(*parameters))
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        if len(parameters) == 1:
            scheduler.step(1.0)
        else:
            optimizer.param_groups[0]["lr"] *= 0.5  # as a new scheduler would
    expected = [[0.1], [0.1], [0.05], [0.025], [0.1, 0.1], [0.05, 0.1]]
    assert rates == [pytest.approx(each) for each in expected]


def test_a_scheduler_that_sets_rates_of_its_own_goes_on(model: MultiTaskModel) -> None:
    plan = FreezePlan("layers:1")
    learned = MultiTaskLoss(list(model.heads), uncertainty=True).parameters()
    own = {"params": list(learned), "lr": 1e-2, "weight_decay": 0.0}  # which no plan has
    optimizer = torch.optim.AdamW([*plan.optimizer_groups(model), own])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    for epoch in range(4):
        rates = [group["lr"] for group in optimizer.param_groups]
        set_groups(optimizer, [*plan.optimizer_groups(model, epoch), own])
        assert [group["lr"] for group in optimizer.param_groups] == rates
        optimizer.step()
        scheduler.step()
    other = FreezePlan("layers:1", lr=0.5, head_lr=0.25).optimizer_groups(model)  # says something else
    set_groups(optimizer, [*other, own])
    assert [group["lr"] for group in optimizer.param_groups[:4]] == [0.5, 0.5, 0.25, 0.25]


def test_another_rate_counts_beside_a_scheduler(model: MultiTaskModel) -> None:
    own = list(model.heads.parameters())
    optimizer = torch.optim.AdamW(own, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    for wanted, rate in ((1.0, 0.5), (3.0, 3.0)):
        set_groups(optimizer, [{"params": own, "lr": wanted}])
        assert optimizer.param_groups[0]["lr"] == rate
    set_groups(optimizer, [{"params": own, "lr": 3.0, "weight_decay": 0.5}])
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_thawing_leaves_the_others_alone_and_freezing_forgets(model: MultiTaskModel) -> None:
    def use(spec: str) -> None:
        plan = FreezePlan.parse(spec, lr=1e-3)
        plan.apply(model)
        set_groups(optimizer, plan.optimizer_groups(model))

    optimizer = torch.optim.AdamW(model.heads.parameters())
    use("backbone")
    train_step(model, optimizer, 0)
    head = model.heads["type"].get_parameter("out.weight")
    layer = model.get_parameter("encoder.layers.2.feed_forward.up.weight")
    state = {key: value.clone() for key, value in optimizer.state[head].items()}
    use("layers:2")
    assert layer not in optimizer.state
    assert all(torch.equal(optimizer.state[head][key], value) for key, value in state.items())
    train_step(model, optimizer, 1)
    assert optimizer.state[head]["step"] == 2
    assert optimizer.state[layer]["step"] == 1
    assert layer.grad is not None
    use("backbone")
    assert layer not in optimizer.state
    assert layer.grad is None
    use("layers:2")
    train_step(model, optimizer, 2)
    assert optimizer.state[layer]["step"] == 1


def test_frozen_depth(model: MultiTaskModel) -> None:
    depths = {"none": None, "head:type": None, "layers:0": 0, "layers:2": 2, "backbone": 3, "all": 3}
    depths |= {"only:heads": 3, "only:layers.1,heads": 1, "only:embeddings": None}
    assert {spec: FreezePlan.parse(spec).frozen_depth(model) for spec in depths} == depths
    assert [FreezePlan.parse("gradual").frozen_depth(model, e) for e in range(6)] == [3, 2, 1, 0, None, None]


def test_summary(model: MultiTaskModel) -> None:
    rows = FreezePlan.parse("layers:1,head:type", lr=2e-5).summary(model).splitlines()
    words = {row.split()[0]: row.split()[1:] for row in rows[1:]}
    sizes = {name: sum(p.numel() for p in group.parameters()) for name, group in named_groups(model).items()}
    assert rows[0].split() == ["group", "parameters", "trained?", "learning", "rate"]
    assert words["embeddings"] == [f"{sizes['embeddings']:,}", "frozen"]
    assert words["layers.0"][1] == words["heads.type"][1] == "frozen"
    assert words["layers.1"] == [f"{sizes['layers.1']:,}", "trained", "2e-05"]
    assert words["pooler"][1] == "unused"
    assert words["heads.sentiment"][1:] == ["trained", "0.001"]
    moving = sizes["layers.1"] + sizes["layers.2"] + sizes["heads.sentiment"]
    total = sum(p.numel() for p in model.parameters())
    assert words["total"] == [f"{total:,}", f"{100 * moving / total:.1f}%", f"({moving:,})"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "no freezing strategy ''"),
        (None, "spec is None, give one of none, all, backbone"),
        ("backbones", "no freezing strategy 'backbones' (in 'backbones'): give one of none, all, backbone"),
        ("layers:-1", "no freezing strategy 'layers:-1'"),
        ("layers", "no freezing strategy 'layers'"),
        ("layers:x", "no freezing strategy 'layers:x'"),
        ("gradual:0", "no freezing strategy 'gradual:0'"),
        ("head:", "no freezing strategy 'head:'"),
        ("none,backbone", "'none' stands alone"),
        ("head:type,all", "'all' stands alone"),
        ("only:pooler", "only: takes embeddings, layers, layers.I"),
        ("only:heads,head:type", "no freezing strategy 'head:type' (in 'only:heads,head:type'): only: takes"),
        ("backbone,only:heads", "no freezing strategy 'only:heads'"),
        ("layers:4", "'layers:4': the model has 3 layers"),
        ("head:topic", "the model has no head 'topic', its heads are: type, sentiment"),
        ("only:heads.topic", "the model has no head 'topic', its heads are: type, sentiment"),
        ("only:layers.3", "'layers.3': the model has layers.0 to layers.2"),
        ("only:layers.2-1", "'layers.2-1': the model has layers.0 to layers.2, and a range goes up"),
    ],
)
def test_a_plan_that_cannot_be(model: MultiTaskModel, spec: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        FreezePlan.parse(spec).apply(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "rates", [{"lr": -1.0}, {"head_lr": float("nan")}, {"weight_decay": float("inf")}, {"layer_lr_decay": 1.1}]
)
def test_a_rate_that_cannot_be(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(rates))} is .*, it must be a number from"):
        FreezePlan.parse("none", **rates)


def test_only_models_with_heads(small: Path) -> None:
    encoder: Any = SentenceEncoder.from_pretrained(small)
    with pytest.raises(TypeError, match="SentenceEncoder has no encoder and heads: give a MultiTaskModel"):
        FreezePlan.parse("backbone").apply(encoder)
    encoder.encoder, encoder.heads = torch.nn.Linear(1, 1), torch.nn.ModuleDict()
    with pytest.raises(TypeError, match=r"encoder is a torch.Linear, it must be a minibert.BertModel"):
        FreezePlan.parse("backbone").apply(encoder)
