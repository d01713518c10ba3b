"""train.py as a stranger would call it, on small random models."""

import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from heads import MISSING, MultiTaskLoss, MultiTaskModel, features
from heads.options import Options, read_options
from heads.processes import Processes, catching_interrupts
from heads.run_directory import RunDirectory
from heads.sets import read_sets
from minibert import BertModel
from tests.conftest import save_small
from weights import CheckpointError

ROOT = Path(__file__).parents[1]
STATE = (
    "metrics.jsonl report.json report.md config.json best/model.safetensors best/heads.safetensors "
    "last/model.safetensors last/heads.safetensors last/heads.json last/training.safetensors last/training.json"
).split()

Main = Callable[..., Path]

pytestmark = pytest.mark.filterwarnings("default:--freeze .* leaves the new head")


@pytest.fixture
def main(small: Path, tmp_path: Path) -> Main:
    """Trains `small` on dummy data into a directory of this name; the options are one string."""

    def run(name: str, options: str = "", *, status: int = 0) -> Path:
        command = (
            f"--model {small} --data dummy --epochs 3 --batch-size 48 --output {tmp_path / name} {options}"
        )
        assert train.main(command.split()) == status
        return tmp_path / name

    return run


def steps(run: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "losses" in r]


def epochs(run: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation" in r]


def assert_same_run(a: Path, b: Path) -> None:
    assert {name for name in STATE if (a / name).read_bytes() != (b / name).read_bytes()} == set()


def table(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------- the main job


@pytest.mark.parametrize("freeze", [pytest.param("none", marks=pytest.mark.slow), "backbone"])
def test_the_demo_is_learned_from_real_weights(
    tmp_path: Path, freeze: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Well above the 33% of the majority class; `none` is the README's first command, shorter."""
    options = {"none": "--epochs 2", "backbone": "--epochs 20 --lr 3e-3"}[freeze]
    command = f"--model all-MiniLM-L6-v2 --freeze {freeze} {options} --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"] == {}
    assert report["validation"]["type"]["accuracy"] > 0.85
    assert report["validation"]["sentiment"]["accuracy"] > 0.7
    printed = capsys.readouterr().out
    assert printed.startswith(
        "sentences: 360 train, 90 validation\n"
        "  type         question 120, news 120, statement 120\n"
        "  sentiment    neutral 120, positive 120, negative 120\n\n"
    )
    assert "(majority class 33.3%)" in printed
    assert printed.count("macro-F1") == 2 * (len(epochs(tmp_path / "run")) + 1)
    model = MultiTaskModel.from_pretrained(tmp_path / "run" / "best")
    for sentence, kind in zip(train.EXAMPLES, ("question", "news", "statement"), strict=True):
        (prediction,) = model.predict(sentence)
        assert f"{prediction['type']['label']} ({prediction['type']['probability']:.0%})" in printed
        if kind == "question":
            assert prediction["type"]["label"] == kind


def test_what_a_run_leaves(main: Main, tmp_path: Path) -> None:
    run = main("run", "--freeze layers:1 --loss-weight sentiment=0.5 --schedule cosine --seed 7")
    assert sorted(p.name for p in run.iterdir() if p.suffix != ".png") == [
        "best",
        "config.json",
        "last",
        "metrics.jsonl",
        "report.json",
        "report.md",
    ]
    config = json.loads((run / "config.json").read_text())
    assert (config["lr"], config["head_lr"], config["freeze"], config["seed"]) == (5e-5, 1e-3, "layers:1", 7)
    assert config["loss_weight"] == ["sentiment=0.5"]
    assert [record["step"] for record in steps(run)] == list(range(1, 25))
    assert [record["step"] for record in epochs(run)] == [8, 16, 24]
    report = json.loads((run / "report.json").read_text())
    scores = {r["step"]: sum(t["accuracy"] for t in r["validation"].values()) for r in epochs(run)}
    best = next(r for r in epochs(run) if scores[r["step"]] == max(scores.values()))
    for task in ("type", "sentiment"):
        reported = report["validation"][task]
        assert reported.keys() == {"loss", "accuracy", "macro_f1", "confusion"}
        cells = reported.pop("confusion")
        assert sum(cell["count"] for cell in cells) == 40
        right = sum(cell["count"] for cell in cells if cell["true"] == cell["predicted"])
        assert right / 40 == reported["accuracy"]
        for metric, value in reported.items():
            assert value == pytest.approx(best["validation"][task][metric], rel=1e-5)
    text = (run / "report.md").read_text()
    assert re.search(r"layers\.0 +[\d,]+  frozen", text)
    assert "## Confusion on validation: rows are true, columns predicted" in text
    for name in ("best", "last"):
        assert len(MultiTaskModel.from_pretrained(run / name).predict(["x", "y"])) == 2
    # and its config gives the same run again
    again = tmp_path / "again"
    assert train.main(["--config", str(run / "config.json"), "--output", str(again)]) == 0
    assert_same_run(run, again)


def test_the_plots(main: Main) -> None:
    pytest.importorskip("matplotlib")
    run = main("run", "--freeze gradual --epochs 2")
    names = {path.name for path in run.glob("*.png")}
    assert not (run / "report.md").read_text().startswith("!")
    assert names == {
        f"{kind}-{task}.png" for kind in ("curves", "confusion-validation") for task in ("type", "sentiment")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    assert "![curves-type.png](curves-type.png)" in (run / "report.md").read_text()
    assert "- from epoch 2: layers.2, heads.type, heads.sentiment" in (run / "report.md").read_text()


@pytest.mark.filterwarnings("default:nothing was drawn")
def test_a_library_that_cannot_draw_costs_no_results(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def broken(*_: object) -> None:
        raise ImportError("numpy.core.multiarray failed to import")

    monkeypatch.setattr("heads.report.draw", broken)
    run = main("run", "--epochs 1")
    captured = capsys.readouterr()
    assert captured.err == ("train.py: warning: nothing was drawn: numpy.core.multiarray failed to import\n")
    assert "the best checkpoint on validation" in captured.out
    assert (run / "report.md").read_text().startswith("# Training report")


def test_odd_label_names(small: Path, tmp_path: Path) -> None:
    labels = ["<$10", "$10_$20", "a|b", "\u4e2d\u6587", "x^2_"]
    rows = [(f"sentence {i}", labels[i % 5]) for i in range(30)]
    data = table(tmp_path / "a.csv", [("text", "price"), *rows])
    command = f"--model {small} --train {data} --task price=price --epochs 1 --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert "| price | $10_$20 | <$10 | a\\|b | x^2_ | \u4e2d\u6587 |" in text
    predictions = MultiTaskModel.from_pretrained(tmp_path / "run" / "best").predict(["x"])
    assert predictions[0]["price"]["label"] in labels


def test_columns_files_and_missing_labels(small: Path, tmp_path: Path) -> None:
    """One file with two label columns, an empty cell in each; explicit validation and test files."""
    rows = [(f"sentence {i}", "ab"[i % 2], "xyz"[i % 3]) for i in range(30)]
    whole = table(
        tmp_path / "a.csv", [("body", "k", "m"), ("one", "", "x"), ("two", "b", ""), ("3", "", ""), *rows]
    )
    held = table(tmp_path / "b.csv", [("body", "k", "m"), *((f"other {i}", *ks) for i, *ks in rows[:9])])
    only = table(tmp_path / "c.csv", [("body", "k", "m"), ("no mood", "a", ""), ("none either", "b", "")])
    command = f"--model {small} --train {whole} --validation {held} --test {only} --text body --task kind=k"
    command += f" --task mood=m --epochs 1 --lr 1e-3 --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"]["kind"]["accuracy"] in (0.0, 0.5, 1.0)
    assert report["test"]["mood"] == {"loss": None, "accuracy": None, "macro_f1": None, "confusion": []}
    assert MultiTaskModel.from_pretrained(tmp_path / "run" / "best").labels == {
        "kind": ("a", "b"),
        "mood": ("x", "y", "z"),
    }


@pytest.mark.parametrize("mixing", ["proportional", "uniform"])
def test_a_file_for_each_task(small: Path, tmp_path: Path, mixing: str) -> None:
    kinds = table(tmp_path / "k.csv", [("text", "label"), *((f"sentence {i}", "ab"[i % 2]) for i in range(60))])
    moods = table(tmp_path / "m.csv", [("text", "label"), *((f"words {i}", "xy"[i % 2]) for i in range(20))])
    command = f"--model {small} --train kind={kinds} --train mood={moods} --task kind=label --task mood=label"
    command += f" --mixing {mixing} --epochs 1 --batch-size 8 --freeze backbone --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    held = {task: sum(cell["count"] for cell in m["confusion"]) for task, m in report["validation"].items()}
    assert held == {"kind": 6, "mood": 2}


@pytest.mark.filterwarnings("default:no validation sentence")
def test_a_task_without_validation_labels(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"sentence {i}", "ab"[i % 2], "validation" if i % 5 == 0 else "") for i in range(40)]
    kinds = table(tmp_path / "k.csv", [("text", "label", "split"), *rows])
    moods = table(tmp_path / "m.csv", [("text", "label"), *((f"words {i}", "xy"[i % 2]) for i in range(20))])
    command = f"--model {small} --train kind={kinds} --train mood={moods} --task kind=label --task mood=label"
    assert train.main(f"{command} --epochs 1 --freeze backbone --output {tmp_path / 'run'}".split()) == 0
    warning = "no validation sentence has a label for mood: best/ is chosen without it"
    assert f"train.py: warning: {warning}" in capsys.readouterr().err


def test_a_new_head_that_is_frozen(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = main("first", "--freeze head:sentiment --epochs 1")
    assert (
        "train.py: warning: --freeze head:sentiment leaves the new head sentiment random"
        in capsys.readouterr().err
    )
    main("second", f"--freeze head:sentiment --epochs 1 --model {run / 'best'}")
    main("third", "--freeze gradual --epochs 1")
    assert "warning" not in capsys.readouterr().err
    table(tmp_path / "d.csv", [("text", "a"), *((f"sentence {i}", "xy"[i % 2]) for i in range(20))])
    task = f"--train {tmp_path / 'd.csv'} --validation {tmp_path / 'd.csv'} --task new=a"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert (
            train.main(
                f"--model {run / 'best'} {task} --freeze head:new --steps 1 --output {tmp_path / 'n'}".split()
            )
            == 0
        )
        assert "--freeze head:new leaves the new head new random" in capsys.readouterr().err
        shutil.rmtree(run)  # what it began from is not needed any more
        assert train.main(f"--output {tmp_path / 'n'} --resume".split()) == 0


def test_eval_only(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = main("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = f"--model {run / 'best'} --data dummy --eval-only --output {tmp_path / 'evaluated'}"
    assert train.main(command.split()) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    assert report == json.loads((run / "report.json").read_text())
    assert not (tmp_path / "evaluated" / "best").exists()
    test = table(tmp_path / "t.csv", [("text", "l"), ("a b", "news"), ("c", "question")])
    capsys.readouterr()
    assert train.main(f"--model {run / 'best'} --eval-only --test {test} --task type=l".split()) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sentences: 2 test\n")
    assert f"{run / 'best'} on test\n  type " in printed
    assert "majority" not in printed  # of which training nobody knows
    assert "  sentiment    loss" not in printed
    nothing = table(tmp_path / "n.csv", [("text", "l"), ("a b", "")])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert train.main(f"--model {run / 'best'} --eval-only --test {nothing} --task type=l".split()) == 0
    assert "no sentence has a label for type: nothing to evaluate" in capsys.readouterr().err
    assert train.main(f"--eval-only --test {test} --task type=l".split()) == 2
    assert "--eval-only needs --model DIR, such as best/ of a run" in capsys.readouterr().err


def test_what_is_held_out_does_not_depend_on_the_seed(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a run that goes on from another would validate on what that one was trained on."""
    rows = [(f"sentence {i}", "ab"[i % 2], "xyz"[i % 3]) for i in range(60)]
    data = f"--train {table(tmp_path / 'd.csv', [('text', 'a', 'b'), *rows])} --task a=a"
    held = [read_sets(read_options(f"{data} --seed {seed}".split()))[0]["validation"] for seed in (0, 1)]
    assert held[0] == held[1]
    run = main("run", "--epochs 1")
    assert "is drawn" not in capsys.readouterr().err
    output = f"--output {tmp_path / 'other'}"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert train.main(f"--model {run / 'best'} {data} --task b=b --steps 1 {output}".split()) == 0
        drawn = f"validation is drawn from the training file: {run / 'best'} has seen"
        assert drawn in capsys.readouterr().err
        assert train.main(f"{output} --resume".split()) == 0
        assert drawn not in capsys.readouterr().err


def test_the_directory_of_a_run_is_no_model(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = main("run", "--epochs 1")
    with pytest.raises(CheckpointError, match=r"run is the directory of a run: give .*run/best"):
        MultiTaskModel.from_pretrained(run)
    capsys.readouterr()
    assert train.main(f"--model {run} --data dummy --output {tmp_path / 'next'}".split()) == 2
    assert f"holds neither model.safetensors nor model.safetensors.index.json: give {run / 'best'} instead" in (
        capsys.readouterr().err
    )


def test_nothing_to_train(main: Main, capsys: pytest.CaptureFixture[str], small: Path) -> None:
    run = main("run", "--freeze all")
    assert "--freeze all leaves nothing to train: this only evaluates" in capsys.readouterr().out
    assert json.loads((run / "report.json").read_text())["validation"]["type"]["accuracy"] is not None
    ours, theirs = MultiTaskModel.from_pretrained(run / "best").encoder, BertModel.from_pretrained(small)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (run / "metrics.jsonl").read_text() == ""


def test_going_on_from_a_run_with_one_head_frozen(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trained heads come along, also the one that has no data now."""
    first = main("first")
    rows = [(f"sentence {i}", "ab"[i % 2]) for i in range(40)]
    data = table(tmp_path / "new.csv", [("text", "label"), *rows])
    command = f"--model {first / 'best'} --train {data} --task topic=label --epochs 1 --metric topic.loss"
    options = [*command.split(), "--freeze", "head:sentiment", "--output", str(tmp_path / "second")]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert train.main(options) == 0
    assert (
        "no training sentence has a label for type: --freeze head:type keeps its head"
        in capsys.readouterr().err
    )
    old, new = (
        MultiTaskModel.from_pretrained(first / "best"),
        MultiTaskModel.from_pretrained(tmp_path / "second/last"),
    )
    assert list(new.heads) == ["type", "sentiment", "topic"]
    assert new.labels["topic"] == ("a", "b")
    pairs = zip(old.heads["sentiment"].parameters(), new.heads["sentiment"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    name = "layers.0.feed_forward.up.weight"
    assert not torch.equal(old.encoder.get_parameter(name), new.encoder.get_parameter(name))


# ----------------------------------------------------------------------------------------- how it trains


def test_early_stopping(main: Main) -> None:
    """With a learning rate of nothing no epoch is better than the first."""
    run = main("run", "--epochs 9 --lr 0 --patience 2 --metric sentiment.macro_f1")
    assert len(epochs(run)) == 3
    assert json.loads((run / "last/training.json").read_text())["finished"]


def test_steps_instead_of_epochs(main: Main) -> None:
    run = main("run", "--steps 11 --warmup 0.5 --lr 1e-3")
    records = steps(run)
    assert len(records) == 11
    assert len(epochs(run)) == 2
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, round(0.5 * 11), 11)
    for record in records:
        assert record["lr"] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_cosine_schedule_is_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 4, 37)
    for step in range(37):
        assert (
            train.rate_factor(Options(schedule="cosine", warmup=4 / 37), step, 37) == schedule.get_last_lr()[0]
        )
        optimizer.step()
        schedule.step()
    assert train.rate_factor(Options(schedule="constant", warmup=0), 20, 37) == 1.0


@pytest.mark.parametrize("freeze", ["backbone", "layers:1", "layers:2,head:type", "gradual:2"])
def test_cached_features_give_the_same_run(main: Main, freeze: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def noting(*arguments: Any) -> Iterator[int]:
        filled.append(arguments[-1])
        return features.fill(*arguments)

    monkeypatch.setattr(train, "fill", noting)
    cached = main("cached", f"--freeze {freeze} --epochs 4 --lr 1e-3")
    expected = {
        "backbone": [3],
        "layers:1": [1],
        "layers:2,head:type": [2],
        "gradual:2": [3, 2],
    }[freeze]
    assert filled == expected
    computed = main("computed", f"--freeze {freeze} --epochs 4 --lr 1e-3 --feature-cache-mb 0")
    assert filled == expected  # nothing more
    a, b = steps(cached), steps(computed)
    first = [record["losses"] for record in a if record["epoch"] == 0]
    assert first == [record["losses"] for record in b if record["epoch"] == 0]  # to the last bit
    for x, y in zip(a, b, strict=True):
        assert x["losses"] == pytest.approx(y["losses"], rel=1e-4)
    old, new = (MultiTaskModel.from_pretrained(run / "last") for run in (cached, computed))
    for p, q in zip(old.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_uniform_mixing_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def noting(dataset: Any, epoch: int, **settings: Any) -> list[list[int]]:
        asked.append(settings["uniform"])
        return [[0]]

    monkeypatch.setattr(train, "epoch_batches", noting)
    for mixing in ("uniform", "proportional"):
        train.all_batches(Options(mixing=mixing, epochs=1), None)  # type: ignore[arg-type]
    assert asked == [True, False]


def test_bf16(main: Main) -> None:
    plain, half = main("plain", "--epochs 1"), main("half", "--epochs 1 --bf16")
    for x, y in zip(steps(plain), steps(half), strict=True):
        assert x["losses"] != y["losses"]
        assert x["losses"] == pytest.approx(y["losses"], abs=0.1)


def test_batch_tokens(main: Main) -> None:
    run = main("run", "--epochs 1 --batch-tokens 200")
    assert len(steps(run)) > 10


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite(
    main: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """In step 12 of 24: best/ and last/ stay those of the first epoch."""
    calls = []
    if what == "loss":
        forward = MultiTaskLoss.forward

        def broken(self: Any, logits: dict[str, Any], *rest: Any) -> Any:
            calls.append(1)
            poison = {task: x * (math.nan if len(calls) == 12 else 1) for task, x in logits.items()}
            return forward(self, poison, *rest)

        monkeypatch.setattr(MultiTaskLoss, "forward", broken)
        message = "step 12: the loss of type is nan, at learning rate 2.95e-05 (heads 0.000591): stopped"
    else:
        clip = torch.nn.utils.clip_grad_norm_

        def exploding(*args: Any) -> torch.Tensor:
            calls.append(1)
            return clip(*args) * (math.inf if len(calls) == 12 else 1)

        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", exploding)
        message = "step 12: the length of the gradient is inf, at learning rate"
    run = main("run", status=2)
    assert message in capsys.readouterr().err
    assert len(steps(run)) == 11
    assert json.loads((run / "last/training.json").read_text())["step"] == 8
    for name in ("best", "last"):
        assert all(p.isfinite().all() for p in MultiTaskModel.from_pretrained(run / name).parameters())


@pytest.mark.parametrize("save_every", ["", "--save-every 1"])
def test_weights_that_are_not_finite_are_never_saved(
    main: Main, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, save_every: str
) -> None:
    """One step an epoch; the second one's update destroys the weights although its loss was fine."""
    calls = []
    step = torch.optim.AdamW.step

    def destroying(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 2:
            self.param_groups[-1]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", destroying)
    run = main("run", f"--batch-size 400 {save_every}", status=2)
    assert "step 2: heads.type.hidden.bias is not finite: stopped" in capsys.readouterr().err
    assert json.loads((run / "last/training.json").read_text())["step"] == 1
    for name in ("best", "last"):
        assert all(p.isfinite().all() for p in MultiTaskModel.from_pretrained(run / name).parameters())


# ---------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "options",
    [
        "--freeze none --balance uncertainty --save-every 3",
        "--freeze backbone",
        "--freeze layers:2,head:type --layer-lr-decay 0.5",
        "--freeze gradual --patience 2 --epochs 4",
        "--freeze layers:1 --fast",
        "--freeze layers:1 --fast --bf16",
    ],
)
@pytest.mark.parametrize("stop", [8, pytest.param(13, marks=pytest.mark.slow)])
def test_resuming_is_exact(main: Main, monkeypatch: pytest.MonkeyPatch, options: str, stop: int) -> None:
    """Ctrl-C in a step: it is finished and saved; resumed, every file is as if nothing had happened."""
    whole = main("whole", options)
    log = RunDirectory.log

    def interrupting(self: RunDirectory, record: dict[str, Any]) -> None:
        log(self, record)
        if record["step"] == stop and "losses" in record:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunDirectory, "log", interrupting)
    part = main("part", options, status=130)
    assert len(steps(part)) in (stop, stop + 1)
    monkeypatch.undo()
    assert train.main(["--output", str(part), "--resume"]) == 0
    assert_same_run(whole, part)
    assert train.main(["--output", str(part), "--resume"]) == 0  # a finished run only reports again
    assert_same_run(whole, part)


@pytest.mark.parametrize("options", ["", "--fast"])
# Computed before the first step, and in the middle of the run:
@pytest.mark.parametrize("depth", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupt_while_features_are_computed(
    main: Main, monkeypatch: pytest.MonkeyPatch, options: str, depth: int
) -> None:
    """Ctrl-C is heeded after a batch of them; resumed, every file is as if nothing had happened."""
    options += " --freeze gradual:2 --epochs 4 --save-every 100"
    whole = main("whole", options)
    batches = 0

    def interrupting(*arguments: Any) -> Iterator[int]:
        nonlocal batches
        for sentences in features.fill(*arguments):
            if arguments[-1] == depth:
                batches += 1
                signal.raise_signal(signal.SIGINT)
            yield sentences

    monkeypatch.setattr(train, "fill", interrupting)
    part = main("part", options, status=130)
    assert batches == 1
    assert (len(steps(part)) > 0) == (depth == 2)
    monkeypatch.undo()
    assert train.main(["--output", str(part), "--resume"]) == 0
    assert_same_run(whole, part)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "before the first save", "between saves", "while saving"])
def test_a_kill_loses_no_more_than_since_the_last_save(
    main: Main, small: Path, tmp_path: Path, when: str
) -> None:
    options = "--save-every 5"
    whole = main("whole", options)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from heads.processes import Processes
from heads.run_directory import RunDirectory
import heads.run_directory as module
log, write = RunDirectory.log, module.write_directory
def kill(): os.kill(os.getpid(), signal.SIGKILL)
def killing(self, record):
    log(self, record)
    if record["step"] == {{"at once": 1, "before the first save": 4, "between saves": 12}}.get({when!r}):
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write('{{"half a li')
        kill()
def dying(directory, files):
    write(directory, files)
    if {when!r} == "while saving" and directory.name == ".last.new" and directory.parent.joinpath("best").exists():
        os.rename(directory.parent / "last", directory.parent / ".last.old")
        kill()
RunDirectory.log, module.write_directory = killing, dying
command = "--model {small} --data dummy --epochs 3 --batch-size 48 --output {tmp_path / "part"} {options}"
train.main(command.split())
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    RunDirectory(tmp_path / "part").recover()
    saved = tmp_path / "part" / "last" / "training.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    assert step == {"at once": 0, "before the first save": 0, "between saves": 10, "while saving": 5}[when]
    assert train.main(["--output", str(tmp_path / "part"), "--resume"]) == 0
    assert_same_run(whole, tmp_path / "part")
    assert not list((tmp_path / "part").glob(".*"))


def test_resuming_something_else_says_what_differs(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"sentence {i}", "ab"[i % 2]) for i in range(40)]
    data = table(
        tmp_path / "a.csv",
        [("text", "label", "other"), *((*row, "cd"[len(row) % 2]) for row in rows), ("x", "a", "d")],
    )
    output = tmp_path / "run"
    command = f"--model {small} --train {data} --task a=label --epochs 1 --output {output}"
    assert train.main(command.split()) == 0
    assert train.main(f"{command} --resume".split()) == 0  # repeating the options is fine

    def refused(options: str) -> str:
        capsys.readouterr()
        assert train.main([*options.split(), "--output", str(output), "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has other options: --freeze was none, is backbone" in refused("--freeze backbone")
    assert "--task was ('a=label',), is ('a=other',)" in refused("--task a=other")
    assert "--epochs was 1, is 2; --seed was 0, is 1" in refused("--seed 1 --epochs 2")
    data.write_text(data.read_text() + "more,a,c\n")
    assert "these sets have changed since" in refused("")
    assert "train" in refused("")


def test_a_run_without_its_last_state_is_not_begun_again(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    run = main("run", "--epochs 2")
    kept = [run / "metrics.jsonl", run / "best" / "model.safetensors", run / "best" / "heads.safetensors"]
    before = [path.read_bytes() for path in kept]
    shutil.rmtree(run / "last")
    assert train.main(["--output", str(run), "--resume"]) == 2
    assert "last is not there any more, so the run cannot go on: begin another" in capsys.readouterr().err
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize("missing", ["best", "last/heads.json"])
def test_a_run_that_lost_a_part_does_not_go_on(
    main: Main, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run = main("run", "--epochs 1")
    (run / missing).rename(run / "elsewhere")
    assert train.main(["--output", str(run), "--resume"]) == 2
    assert f"{run / missing} is not there any more, so the run cannot go on" in capsys.readouterr().err


def test_resuming_removes_nothing_of_others(main: Main) -> None:
    run = main("run", "--epochs 1")
    names = [".venv.old", ".git.new", ".best.new", ".last.old"]
    for name in names:
        (run / name).mkdir()
        (run / name / "file").touch()
    assert train.main(["--output", str(run), "--resume"]) == 0
    assert [name for name in names if (run / name).exists()] == [".venv.old", ".git.new"]


def test_a_run_is_not_overwritten(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main("run", "--epochs 1")
    main("run", "--epochs 1", status=2)
    assert (
        "run holds a config.json already: give another --output, or go on with that run by --resume"
        in capsys.readouterr().err
    )
    (tmp_path / "other" / "best").mkdir(parents=True)
    (tmp_path / "other" / "best" / "precious.txt").write_text("mine")
    main("other", "--epochs 1", status=2)
    assert "other holds a best already" in capsys.readouterr().err
    assert (tmp_path / "other" / "best" / "precious.txt").read_text() == "mine"


def test_the_next_free_directory(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main(f"--model {small} --data dummy --steps 1 --freeze backbone".split()) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["1", "2"]
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    assert train.main(f"--model {small} --data dummy --steps 1 --freeze backbone".split()) == 2


def test_a_run_has_one_process(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = main("run", "--epochs 1")
    with RunDirectory(run).locked():
        assert train.main(f"--output {run} --resume".split()) == 2
        main("new", "--epochs 1")
    assert "last is being written by another process: wait for it or stop it" in capsys.readouterr().err
    assert train.main(f"--output {run} --resume".split()) == 0
    assert not list(tmp_path.glob("*/*.lock"))


def test_an_epoch_is_saved_before_it_is_printed(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = main("whole")

    def gone(*_: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", gone)
        patch.setattr(os, "dup2", lambda *_: None)  # pytest's own standard output is not broken
        main("part", status=141)
    assert len(epochs(tmp_path / "part")) == 1
    assert (tmp_path / "part" / "best").is_dir()
    assert train.main(f"--output {tmp_path / 'part'} --resume".split()) == 0
    assert_same_run(whole, tmp_path / "part")


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catching_interrupts() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert not caught
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--freeze layers:9", "'layers:9': the model has 3 layers"),
        ("--freeze head:topic", "no head 'topic', its heads are: type, sentiment"),
        ("--freeze frozen", "no freezing strategy 'frozen'"),
        ("--freeze gradual,head:type,head:sentiment", "leaves nothing to train in the first epoch"),
        ("--epochs 0", "--epochs is 0, it must be 1 or more"),
        ("--epochs x", "argument --epochs: invalid int value: 'x'"),
        ("--lr -1", "lr is -1.0, it must be a number from 0"),
        ("--warmup 2", "--warmup is 2.0, it must be from 0 to 1"),
        ("--validation-fraction 1", "--validation-fraction is 1.0, it must lie between 0 and 1"),
        ("--metric f1", "--metric is 'f1', it must be [TASK.]loss, accuracy or macro_f1"),
        ("--metric topic.loss", "--metric topic.loss: no task 'topic', there are: type, sentiment"),
        ("--loss-weight topic=1", "a loss weight is given for 'topic'"),
        ("--loss-weight type", "--loss-weight type: give NAME=X, each name once"),
        ("--loss-weight type=much", "--loss-weight type=much: could not convert string to float: 'much'"),
        ("--loss-weight type=2 --balance uncertainty", "choose one"),
        ("--task a=b", "--task, --validation and --test need --train FILE"),
        ("--train x.csv", "--train needs --task NAME=COLUMN"),
        ("--train x.csv --task a=b", "x.csv cannot be read: No such file or directory"),
        ("--device gpu", "--device gpu:"),
        ("--device meta", "--device meta"),
        ("--seed 20240101123456", "--seed is 20240101123456, it must be less than 2**32"),
        ("--eval-only --test x.csv", "files need --task NAME=COLUMN, and --task needs files"),
        ("--train knd=x.csv --task kind=a", "--train knd=x.csv: there is no task 'knd', --task names kind"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--eval-only", "has no heads"),
        ("--resume", "holds no run, it has no config.json"),
        ("--config none.json", "has no none.json"),
    ],
)
def test_bad_options_are_one_sentence(
    main: Main,
    tmp_path: Path,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main("run", options, status=2)
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("train.py: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("column", "given", "message"),
    [
        ("Split", "", "d.csv, line 2: the split column is called 'Split', say so by --split Split"),
        ("split", "--split nosuch", "--split nosuch: no row of any file has something in that column"),
    ],
)
def test_a_split_that_would_be_overlooked(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, given: str, message: str
) -> None:
    rows = [(f"text {i}", "xy"[i % 2], "train" if i < 20 else "test") for i in range(30)]
    data = table(tmp_path / "d.csv", [("text", "a", column), *rows])
    command = f"--model {small} --train {data} --task a=a --epochs 1 --output {tmp_path / 'run'} "
    assert train.main((command + given).split()) == 2
    assert message in capsys.readouterr().err
    assert train.main((command + f"--split {column}").split()) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epoch": 3}', "config.json: no option 'epoch', see --help"),
        ('{"freeze": ["layers:1", "head:type"]}', "config.json: freeze is a list, it must be one value"),
        ('{"epochs": "many"}', "config.json: argument --epochs: invalid int value: 'many'"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_config(tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert train.main(["--config", str(tmp_path / "config.json")]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"epochs": 3, "bf16": true, "lr": 0.1, "loss_weight": ["a=1", "b=2"]}'
    )
    options = read_options(["--config", str(tmp_path / "config.json"), "--epochs", "4", "--loss-weight", "c=3"])
    assert (options.epochs, options.bf16, options.lr, options.loss_weight) == (4, True, 0.1, ("c=3",))


@pytest.mark.parametrize("lr", ["", "--lr 1e-4", "--head-lr 1e-2", "--lr 1e-4 --head-lr 1e-2"])
def test_learning_rates(lr: str) -> None:
    plan = read_options(lr.split()).plan()
    expected = {"": (5e-5, 1e-3), "--lr 1e-4": (1e-4, 1e-4), "--head-lr 1e-2": (5e-5, 1e-2)}
    assert (plan.lr, plan.head_lr) == expected.get(lr, (1e-4, 1e-2))


def test_an_output_that_cannot_be_written(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        main(name, status=2)
        captured = capsys.readouterr()
        assert f"{tmp_path / 'file'} is a file, it must be a directory" in captured.err
        assert not captured.out  # before the work
    free = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    run = main("full", status=2)
    assert "1 MB are free, checkpoints may take" in capsys.readouterr().err
    assert not list(run.iterdir())
    monkeypatch.undo()

    def dying(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "truncate", dying)  # by which a run that can be gone on with has begun
    assert main(run.name, status=130) == run
    monkeypatch.undo()
    assert train.main(["--output", str(run), "--resume"]) == 0


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saves = []
    save = MultiTaskModel.save_pretrained

    def failing(self: MultiTaskModel, directory: Path) -> None:
        saves.append(directory)
        if len(saves) > 3:
            raise OSError(28, "No space left on device")
        save(self, directory)

    monkeypatch.setattr(MultiTaskModel, "save_pretrained", failing)
    run = main("run", "--save-every 6", status=2)
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads((run / "last/training.json").read_text())["step"] == 8
    MultiTaskModel.from_pretrained(run / "last")
    MultiTaskModel.from_pretrained(run / "best")


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal_only(small: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        "--model",
        str(small),
        "--data",
        "dummy",
        "--epochs",
        "1",
    ]
    piped = subprocess.run([*command, "--output", str(tmp_path / "a")], capture_output=True, check=True)
    assert piped.stderr == b""
    assert b"tokens/s" in piped.stdout
    terminal, child_end = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    subprocess.run(
        [*command, "--output", str(tmp_path / "b")], stderr=child_end, stdout=subprocess.DEVNULL, check=True
    )
    os.close(child_end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "epoch 1/1" in shown
    assert re.search(r"loss \d\.\d+, [\d,]+ tokens/s", shown)


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in Options.__dataclass_fields__.values():
        assert f"--{item.name.replace('_', '-')}" in text
        assert " ".join(item.metadata["help"].split()) in text


# ----------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def no_dropout(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_small(tmp_path_factory.mktemp("no_dropout"), minilm, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", ["none", "backbone", "gradual,head:mood", "only:layers.1,heads.type", "all"])
def test_two_processes_train_as_one(no_dropout: Path, tmp_path: Path, freeze: str) -> None:
    """Batches of 9 of 64 sentences, many of them without a label, one batch of a single sentence."""
    rows = [
        (f"sentence {'again ' * (i % 7)} {i}", ["a", "b", ""][i % 3], ["", "x", "y", "", ""][i % 5])
        for i in range(64)
    ]
    data = table(tmp_path / "a.csv", [("text", "kind", "mood"), *rows])
    held = table(tmp_path / "b.csv", [("text", "kind", "mood"), *((f"other {i}", *ks) for i, *ks in rows)])
    command = f"--model {no_dropout} --train {data} --validation {held} --task type=kind --task mood=mood"
    command += f" --epochs 2 --batch-size 9 --lr 1e-4 --freeze {freeze} --balance uncertainty"
    command += " --device cpu"  # there may be one GPU
    assert train.main([*command.split(), "--output", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *command.split(), "--output", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("sentences: 64 train") == 1
    assert "train.py" not in result.stderr.replace("train.py: warning: --freeze", "", 1)
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(one) == (0 if freeze == "all" else 16)
    for x, y in zip(one, two, strict=True):
        assert x["losses"] == pytest.approx(y["losses"], abs=1e-5)
    for name in ("best", "last"):
        a, b = (
            load_file(tmp_path / "one" / name / "model.safetensors"),
            load_file(tmp_path / "two" / name / "model.safetensors"),
        )
        for key in a:
            # A key bias has the gradient 0, but for rounding, and AdamW makes a step even of that.
            limit = 16 * 1e-4 if key.endswith("key.bias") else 1e-5
            assert (a[key] - b[key]).abs().max() < limit, key


@pytest.mark.slow
def test_an_error_in_the_first_process_stops_all_with_one_sentence(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    command = f"--model {small} --data dummy --epochs 1 --device cpu --output {tmp_path / 'run'}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, str(ROOT / "train.py"), *command.split()], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: ") == 1
    assert "holds a best already" in result.stderr
    assert "FirstFailedError" not in result.stderr
    assert "gloo" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_process_of_its_own(small: Path, tmp_path: Path, number: int) -> None:
    command = f"--model {small} --data dummy --epochs 500 --batch-size 8 --output {tmp_path / 'run'}"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *command.split()],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 5):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == (
        "\nstopping once all is saved; the same again stops at once\n"
        f"train.py: interrupted; a run that has begun goes on with --output {tmp_path / 'run'} --resume\n"
    )
    assert json.loads((tmp_path / "run/last/training.json").read_text())["step"] == len(steps(tmp_path / "run"))


def test_a_share_of_a_batch() -> None:
    processes = Processes("cpu")
    processes.count = 3
    batch = {"attention_mask": torch.ones(2, 4), "labels.a": torch.tensor([5, 6]), "features": torch.eye(2, 4)}
    shares = []
    for processes.rank in range(3):
        shares.append(processes.share(batch))
    assert [share["labels.a"].tolist() for share in shares] == [[5], [6], [MISSING]]
    assert [share["features"].tolist() for share in shares] == [[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[1, 0, 0, 0]]]
