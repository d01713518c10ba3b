"""The options of train.py: on its command line, in a JSON file, or as the run to resume has them."""

from __future__ import annotations  # so that a field's type is its text, of which `parser` makes an option

import argparse
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minibert.freezing import GROUPS, FreezePlan
from weights.json_files import read_json

FREE_ON_RESUME = {"output", "resume", "save_every", "device"}


def option(default: Any, text: str, metavar: str | None = None, choices: tuple[str, ...] = ()) -> Any:
    """A field of `Options`, with what --help says of it."""
    return field(default=default, metadata={"help": text, "metavar": metavar, "choices": choices or None})


def flag(name: str) -> str:
    """An option as it stands on the command line: save_every -> --save-every."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class Options:
    """Every option of a run, under its command line name with _ for -. A tuple can be given repeatedly."""

    model: str = option(
        "bert-base-uncased", "what to start from: a name, a directory, or best/ of a run", "NAME_OR_DIR"
    )
    data: str = option(
        "demo",
        "what to train on if no --train is given: demo, the bundled sentences, or dummy, random words and "
        "labels, to see that a run goes through",
        choices=("demo", "dummy"),
    )
    train: tuple[str, ...] = option(
        (), "training file (.csv, .tsv, .jsonl), or TASK=FILE with labels of one task, repeatable", "FILE"
    )
    validation: tuple[str, ...] = option((), "validation file, or TASK=FILE, repeatable", "FILE")
    test: tuple[str, ...] = option((), "test file, or TASK=FILE, repeatable", "FILE")
    text: str = option("text", "the column of text", "COLUMN")
    task: tuple[str, ...] = option((), "a task and its column of labels, repeatable", "NAME=COLUMN")
    split: str = option("split", "column that says train, validation or test, if there is one", "COLUMN")
    validation_fraction: float = option(0.1, "part held out if nothing else says what to hold out", "X")
    mixing: str = option(
        "proportional",
        "how often to draw from each of several training files: by size, or equally",
        choices=("proportional", "uniform"),
    )
    freeze: str = option(
        "none",
        "none | all | backbone, head:NAME, layers:K, gradual[:EPOCHS] (several joined by commas) | "
        f"only:GROUPS ({GROUPS})",
        "PLAN",
    )
    epochs: int = option(5, "passes over the training set", "N")
    steps: int | None = option(None, "stop after so many steps, whatever --epochs says", "N")
    batch_size: int = option(16, "sentences in a step, over all processes", "N")
    batch_tokens: int | None = option(None, "tokens in a step, padding included, in place of --batch-size", "N")
    lr: float | None = option(None, "learning rate (default: 5e-05, and 1e-03 for the heads)", "X")
    head_lr: float | None = option(None, "learning rate of the heads (default: --lr if given, else 1e-03)", "X")
    layer_lr_decay: float = option(1.0, "each layer's learning rate over that of the layer above", "X")
    weight_decay: float = option(0.01, "of matrices; biases and LayerNorms have none", "X")
    warmup: float = option(0.1, "part of the steps in which the learning rate rises from 0", "X")
    schedule: str = option(
        "linear", "how the learning rate falls after that", choices=("linear", "cosine", "constant")
    )
    clip_norm: float = option(1.0, "longer gradients are scaled down to this length; 0: no limit", "X")
    balance: str = option(
        "sum", "add the tasks' losses, or learn their weights", choices=("sum", "uncertainty")
    )
    loss_weight: tuple[str, ...] = option((), "factor of a task's loss, repeatable (default: 1)", "NAME=X")
    fast: bool = option(False, "compute nothing on padding: faster, and equal up to rounding but for dropout")
    bf16: bool = option(False, "compute in bfloat16 where that is safe (autocast)")
    seed: int = option(0, "of the heads' first weights, the order of the data, and dropout", "N")
    device: str = option("auto", "cpu, cuda or cuda:N; auto: a GPU if there is one", "NAME")
    metric: str = option(
        "accuracy",
        "what chooses best/, on validation: loss, accuracy or macro_f1 (mean of the tasks), or TASK.loss etc.",
        "NAME",
    )
    patience: int = option(0, "stop when so many epochs in a row were not the best; 0: never", "N")
    feature_cache_mb: float = option(1000.0, "memory for what frozen layers compute; 0: compute it anew", "X")
    save_every: int | None = option(None, "save every so many steps, not only after each epoch", "STEPS")
    output: str | None = option(
        None, "directory of the run (default: the next free runs/N; with --eval-only none)", "DIR"
    )
    resume: bool = option(
        False, "go on with the run in --output, by its own options (but for --save-every and --device)"
    )
    eval_only: bool = option(False, "train nothing, only evaluate --model")

    def __post_init__(self) -> None:
        if self.seed >= 2**32:
            raise ValueError(f"--seed is {self.seed}, it must be less than 2**32")
        least = {"epochs": 1, "steps": 1, "batch_size": 1, "batch_tokens": 1, "save_every": 1}
        least |= {"patience": 0, "clip_norm": 0, "feature_cache_mb": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value < math.inf:
                raise ValueError(f"{flag(name)} is {value}, it must be {lowest} or more")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup is {self.warmup}, it must be from 0 to 1")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"--validation-fraction is {self.validation_fraction}, it must lie between 0 and 1"
            )
        if not re.fullmatch(r"(.+\.)?(loss|accuracy|macro_f1)", self.metric):
            raise ValueError(f"--metric is {self.metric!r}, it must be [TASK.]loss, accuracy or macro_f1")
        output = Path(self.output or ".")
        for path in (output, *output.parents):
            if path.is_file():
                raise ValueError(f"--output {self.output}: {path} is a file, it must be a directory")
        if self.eval_only and self.model == Options.model:
            raise ValueError("--eval-only needs --model DIR, such as best/ of a run")
        if self.train and not self.task:
            raise ValueError("--train needs --task NAME=COLUMN, once for each task")
        if (self.task or self.test or self.validation) and not (self.train or self.eval_only):
            raise ValueError("--task, --validation and --test need --train FILE (or --eval-only)")
        if bool(self.task) != bool(self.train or self.validation or self.test):
            raise ValueError("files need --task NAME=COLUMN, and --task needs files")
        if not self.task and (self.text, self.split) != (Options.text, Options.split):
            raise ValueError("--text and --split are about files: give --train FILE, too (or --test)")
        self.plan()  # what cannot be in these two is said before anything is read, too
        self.loss_weights()

    def pairs(self, name: str) -> dict[str, str]:
        """The NAME=VALUE of a repeatable option, by name."""
        pairs: dict[str, str] = {}
        for given in getattr(self, name):
            key, equals, value = given.partition("=")
            if not (key and equals and value) or key in pairs:
                form = Options.__dataclass_fields__[name].metadata["metavar"]
                raise ValueError(f"{flag(name)} {given}: give {form}, each name once")
            pairs[key] = value
        return pairs

    def plan(self) -> FreezePlan:
        """--freeze with its learning rates: without --lr a trained encoder is to move less than new heads."""
        lr, head_lr = (5e-5, 1e-3) if self.lr is None else (self.lr, self.lr)
        head_lr = head_lr if self.head_lr is None else self.head_lr
        return FreezePlan(self.freeze, lr, head_lr, self.weight_decay, self.layer_lr_decay)

    def loss_weights(self) -> dict[str, float]:
        """--loss-weight as numbers."""
        pairs = self.pairs("loss_weight")
        try:
            return {task: float(value) for task, value in pairs.items()}
        except ValueError as error:
            raise ValueError(f"--loss-weight {' '.join(self.loss_weight)}: {error}") from error

    def resolved(self) -> dict[str, Any]:
        """The options as config.json keeps them: what was left open filled in, and no name of the run."""
        plan = self.plan()
        fixed = asdict(replace(self, lr=plan.lr, head_lr=plan.head_lr))
        return {name: value for name, value in fixed.items() if name not in ("output", "resume")}


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print and exit."""

    def error(self, message: str) -> Any:
        raise ValueError(message)


def parser() -> Parser:
    """The command line, made of the fields of `Options`."""
    result = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Trains task heads on a shared BERT encoder; without --train on the bundled sentences.",
        argument_default=argparse.SUPPRESS,
    )
    result.add_argument(
        "--config",
        metavar="FILE",
        help="options as JSON, names with _ for - (a run's has both rates); the command line overrides",
    )
    for item in fields(Options):
        kind, details = str(item.type), dict(item.metadata)
        if kind == "bool":
            details = {"help": details["help"], "action": "store_true"}
        elif kind.startswith("tuple"):
            details["action"] = "append"
        else:
            details["type"] = {"str": str, "int": int, "float": float}[kind.removesuffix(" | None")]
            if item.default is not None:
                details["help"] += f" (default: {item.default})"
        result.add_argument(flag(item.name), **details)
    return result


def from_json(path: Path) -> dict[str, Any]:
    """Options in a JSON file, checked by the same parser as the command line."""
    known, words = Options.__dataclass_fields__, []
    for name, value in read_json(path).items():
        if name not in known:
            raise ValueError(f"{path}: no option {name!r}, see --help")
        if isinstance(value, list) and known[name].default != ():
            raise ValueError(f"{path}: {name} is a list, it must be one value")
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not known[name].default:  # false is a flag's
                words.append(flag(name) if each is True else f"{flag(name)}={each}")
    try:
        return collected(parser().parse_args(words))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def collected(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given, lists as tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(arguments).items()}


def read_options(argv: list[str] | None) -> Options:
    """The command line over --config; when resuming, the run's own, which these may only repeat (but for
    `FREE_ON_RESUME`).

    Raises:
        ValueError: an option that does not exist or cannot be; options other than those of the run.
    """
    given = collected(parser().parse_args(argv))
    if "config" in given:
        given = from_json(Path(given.pop("config"))) | given
    if not given.get("resume"):
        return Options(**given)
    if "output" not in given:
        raise ValueError("--resume needs --output DIR, the run to go on with")
    config = Path(given["output"], "config.json")
    if not config.is_file():
        raise ValueError(f"--resume: {config.parent} holds no run, it has no config.json")
    begun = Options(**from_json(config))
    options = replace(begun, **given)
    changed = [
        f"{flag(name)} was {getattr(begun, name)}, is {value}"
        for name, value in asdict(options).items()
        if name not in FREE_ON_RESUME and value != getattr(begun, name)
    ]
    if changed:
        raise ValueError(
            f"--resume: the run in {config.parent} has other options: {'; '.join(changed)} (to train on in "
            f"another way, begin a run with --model {config.parent / 'best'})"
        )
    return options
