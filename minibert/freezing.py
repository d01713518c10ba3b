"""Which parts of a model are trained, epoch by epoch.

A model is cut into groups, from the input up: embeddings, layers.0, layers.1, ..., pooler, heads.NAME.
A group is trained as a whole or frozen as a whole. The pooler lies on no path to a head that reads
mean-pooled embeddings, so it is always left as it is.
"""

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn

from minibert.inputs import full_name
from minibert.model import BertModel
from minibert.wrapped import uncompiled

STRATEGIES = "none, all, backbone, head:NAME, layers:K, gradual, gradual:EPOCHS, only:GROUPS"
GROUPS = "embeddings, layers, layers.I, layers.I-J, heads, heads.NAME"
STRATEGY = re.compile(r"none|all|backbone|head:.+|layers:\d+|gradual(:[1-9]\d*)?")
GROUP = re.compile(r"embeddings|layers(\.\d+(-\d+)?)?|heads(\..+)?")


class Headed(Protocol):
    """What a plan can be applied to: `heads.MultiTaskModel`, or anything else with these two."""

    encoder: BertModel

    @property
    def heads(self) -> Any: ...


def named_groups(model: Headed) -> dict[str, nn.Module]:
    """The groups of a model by name, from the input up."""
    encoder = uncompiled(getattr(model, "encoder", None))
    if encoder is None or not hasattr(model, "heads"):
        raise TypeError(f"{type(model).__name__} has no encoder and heads: give a MultiTaskModel")
    if not isinstance(encoder, BertModel):
        raise TypeError(f"encoder is a {full_name(encoder)}, it must be a minibert.BertModel")
    groups: dict[str, nn.Module] = {"embeddings": encoder.embeddings}
    groups |= {f"layers.{i}": layer for i, layer in enumerate(encoder.layers)}
    if encoder.pooler is not None:
        groups["pooler"] = encoder.pooler
    return groups | {f"heads.{name}": head for name, head in model.heads.items()}


def keep_frozen_in_eval(model: Headed) -> None:
    """Puts every frozen group into eval mode: what is not trained gets no dropout either."""
    for group in named_groups(model).values():
        if not any(parameter.requires_grad for parameter in group.parameters()):
            group.eval()


@dataclass(frozen=True)
class FreezePlan:
    """What is frozen when, and how fast the rest learns.

    `spec` is one of

        none          everything is trained (but the pooler, which the heads do not use)
        all           nothing is trained
        backbone      the encoder is frozen, the heads are trained
        head:NAME     this head is frozen
        layers:K      the embeddings and the lowest K layers are frozen
        gradual[:N]   the heads first, then one layer more from the top every N epochs (1 if not
                      given), the embeddings last (Howard & Ruder 2018, section 3.3)
        only:A,B,...  only this is trained: embeddings, layers, layers.I, layers.I-J, heads, heads.NAME

    or several joined by commas (not `none`, `all` or `only`), which freeze what any of them freezes.

    `lr` is the encoder's learning rate, `head_lr` the heads'. Each layer's is `layer_lr_decay` times
    that of the layer above it (Howard & Ruder 2018, section 3.2). `weight_decay` (Devlin et al. 2018,
    appendix A.2) is for matrices only, not for biases and LayerNorms, as in their code.

    Raises:
        ValueError: no such strategy, or a rate that cannot be; methods that see the model also raise
            it for a layer or a head that the model does not have.
    """

    spec: str = "none"
    lr: float = 2e-5
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    layer_lr_decay: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str):
            raise ValueError(f"spec is {self.spec!r}, give one of {STRATEGIES}")
        terms = self._terms()
        known, options = STRATEGY, f"give one of {STRATEGIES}"
        if self._is_only():
            known, options = GROUP, f"only: takes {GROUPS}"
        for term in terms:
            if not known.fullmatch(term):
                raise ValueError(f"no freezing strategy {term!r} (in {self.spec!r}): {options}")
        if len(terms) > 1 and (alone := {"none", "all"} & set(terms)):
            raise ValueError(f"{alone.pop()!r} stands alone, it cannot be combined as in {self.spec!r}")
        for name in ("lr", "head_lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, it must be a number from 0 up")
        if not 0 <= self.layer_lr_decay <= 1:
            raise ValueError(f"layer_lr_decay is {self.layer_lr_decay}, it must be a number from 0 to 1")

    @classmethod
    def parse(cls, spec: str, **rates: float) -> Self:
        """The same as the class: `rates` are the fields after `spec`. Raises ValueError as it does."""
        return cls(spec, **rates)

    def trained(self, model: Headed, epoch: int = 0) -> list[str]:
        """The names of the groups that are trained in an epoch (counted from 0), from the input up."""
        names = [name for name in named_groups(model) if name != "pooler"]
        backbone = [name for name in names if not name.startswith("heads.")]  # from the input up
        heads = [name for name in names if name.startswith("heads.")]
        if self._is_only():
            wanted = {name for term in self._terms() for name in _named(term, backbone, heads)}
            return [name for name in names if name in wanted]
        frozen = {name for term in self._terms() for name in _frozen(term, backbone, heads, epoch)}
        return [name for name in names if name not in frozen]

    def trains_nothing(self, model: Headed) -> bool:
        """Whether no epoch trains anything."""
        return not self.trained(model, sys.maxsize)  # what has thawed stays so: the last epoch trains most

    def apply(self, model: Headed, epoch: int = 0) -> None:
        """Sets `requires_grad` both ways, drops the gradients of what is frozen, and sets its mode.

        A frozen group runs in eval mode, also after a later `model.train()` of a MultiTaskModel; a
        trained one runs in the model's mode.
        """
        trained = self.trained(model, epoch)
        mode = isinstance(model, nn.Module) and model.training
        groups = named_groups(model).items()
        for name, group in sorted(groups, key=lambda item: item[0] in trained):  # trained ones last
            group.requires_grad_(name in trained)
            group.train(mode and name in trained)
            if name not in trained:
                group.zero_grad(set_to_none=True)

    def optimizer_groups(self, model: Headed, epoch: int = 0) -> list[dict[str, Any]]:
        """Parameter groups for a torch optimizer: what is trained, and nothing else.

        Two for each learning rate: matrices with weight decay, vectors without. `plan_lr` is that rate, too,
        and stays when a scheduler changes `lr`. Few groups, since on a GPU each starts kernels of its own.
        """
        groups, rates = named_groups(model), self._learning_rates(model)
        together: dict[tuple[float, float], dict[nn.Parameter, None]] = {}  # once, if two heads are one module
        for name in self.trained(model, epoch):
            for parameter in groups[name].parameters():
                decay = self.weight_decay if parameter.ndim > 1 else 0.0  # none of biases and LayerNorms
                together.setdefault((rates[name], decay), {})[parameter] = None
        return [
            {"params": list(some), "lr": lr, "weight_decay": decay, "plan_lr": lr}
            for (lr, decay), some in together.items()
        ]

    def frozen_depth(self, model: Headed, epoch: int = 0) -> int | None:
        """How many layers are frozen, from the bottom up; 0: the embeddings alone, None: not even they."""
        trained = self.trained(model, epoch)
        if "embeddings" in trained:
            return None
        layers = range(len(model.encoder.layers))
        return next((i for i in layers if f"layers.{i}" in trained), len(layers))

    def summary(self, model: Headed, epoch: int = 0) -> str:
        """A table: each group's parameters, whether it is trained, its learning rate; and totals."""
        trained, rates = self.trained(model, epoch), self._learning_rates(model)
        rows, sizes = [], {}
        for name, group in named_groups(model).items():
            sizes[name] = sum(parameter.numel() for parameter in group.parameters())
            state = "unused" if name == "pooler" else "trained" if name in trained else "frozen"
            rate = f"{rates[name]:.3g}" if name in trained else ""
            rows.append((name, f"{sizes[name]:,}", state, rate))
        total, moving = sum(sizes.values()), sum(sizes[name] for name in trained)
        rows.append(("total", f"{total:,}", f"{100 * moving / total:.1f}%", f"({moving:,})"))
        width = max(len(row[0]) for row in rows)
        header = ("group", "parameters", "trained?", "learning rate")
        return "\n".join(f"{a:<{width}}  {b:>13}  {c:<8}  {d}".rstrip() for a, b, c, d in [header, *rows])

    def _learning_rates(self, model: Headed) -> dict[str, float]:
        layers = len(model.encoder.layers)
        rates = {"embeddings": self.lr * self.layer_lr_decay**layers}
        rates |= {f"layers.{i}": self.lr * self.layer_lr_decay ** (layers - 1 - i) for i in range(layers)}
        return rates | {f"heads.{name}": self.head_lr for name in model.heads}

    def _is_only(self) -> bool:
        return self.spec.strip().startswith("only:")

    def _terms(self) -> list[str]:
        return [term.strip() for term in self.spec.strip().removeprefix("only:").split(",")]


def _frozen(term: str, backbone: Sequence[str], heads: Sequence[str], epoch: int) -> Sequence[str]:
    """What one strategy freezes in an epoch. `backbone` is the embeddings, then the layers upwards."""
    kind, _, argument = term.partition(":")
    if kind == "all":
        return [*backbone, *heads]
    if kind == "backbone":
        return backbone
    if kind == "layers":
        if int(argument) >= len(backbone):
            raise ValueError(f"{term!r}: the model has {len(backbone) - 1} layers, there are no more to freeze")
        return backbone[: 1 + int(argument)]
    if kind == "head":
        return [_head(argument, heads)]
    if kind == "gradual":
        return backbone[: max(0, len(backbone) - epoch // int(argument or 1))]
    return []  # none


def _named(term: str, backbone: Sequence[str], heads: Sequence[str]) -> Sequence[str]:
    """The groups that a name in `only:` means."""
    kind, _, argument = term.partition(".")
    if kind == "embeddings":
        return backbone[:1]
    if kind == "heads":
        return [_head(argument, heads)] if argument else heads
    first, _, last = argument.partition("-")
    if not argument:
        return backbone[1:]
    if not int(first) <= int(last or first) < len(backbone) - 1:
        raise ValueError(f"{term!r}: the model has layers.0 to layers.{len(backbone) - 2}, and a range goes up")
    return backbone[1 + int(first) : 2 + int(last or first)]


def _head(name: str, heads: Sequence[str]) -> str:
    if f"heads.{name}" not in heads:
        known = ", ".join(head.removeprefix("heads.") for head in heads) or "none"
        raise ValueError(f"the model has no head {name!r}, its heads are: {known}")
    return f"heads.{name}"


def set_groups(optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Gives an optimizer these parameter groups in place of those it has.

    A parameter that stays keeps its state (momentum); one that leaves loses it. If they are those it has
    already, nothing changes, not even the rates that one of torch's schedulers has given them.
    """
    wanted = [{**group, "params": _as_list(group["params"])} for group in groups]
    for group in wanted:
        if "lr" in group:
            group["plan_lr"] = float(group["lr"])  # which may have been set by hand
    for group in optimizer.param_groups:
        if "max_lr" not in group:  # OneCycleLR's, which makes rates of that alone: what it has now is no plan's
            group.setdefault("plan_lr", float(group["lr"]))
    if len(wanted) == len(optimizer.param_groups) and all(map(_is_same_group, optimizer.param_groups, wanted)):
        return
    optimizer.param_groups.clear()
    for group in wanted:
        optimizer.add_param_group(group)
    kept = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]


def _as_list(parameters: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """As torch's optimizers take them: one alone, or any iterable."""
    return [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)


def _is_same_group(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether an optimizer's group is this one, with its rate, or what a scheduler has made of it."""
    given = {**new, "params": [id(parameter) for parameter in new["params"]]}
    has = {**old, "params": [id(parameter) for parameter in old["params"]]}
    rate = given.pop("lr", None)
    given.pop("plan_lr", None)
    if rate is not None and "plan_lr" in old:  # set_groups gives OneCycleLR's groups none
        began = (old.get("initial_lr", old["lr"]), old["plan_lr"])  # the former is not always noted
        if not any(math.isclose(rate, each, rel_tol=1e-6) for each in began):  # a tensor's rate has 24 bits
            return False
    return given.items() <= has.items()
