"""What a run does, and what it leaves."""

import importlib.util
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train
from heads import MLPHead, MultiTaskModel
from heads.metrics import TaskMetrics
from heads.options import Options, read_options
from heads.report import draw
from heads.sets import read_sets
from heads.tables import Example
from minibert import BertModel, Tokenizer
from tests.training.conftest import Main, a_new_head_may_be_frozen, assert_same_run, epochs, steps, table
from weights import CheckpointError


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


@pytest.mark.plots
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
    held_out = read_sets(read_options(["--config", str(run / "config.json")]))[0]["validation"]
    text = (run / "report.md").read_text()
    for task in ("type", "sentiment"):
        reported = report["validation"][task]
        assert reported.keys() == {"loss", "accuracy", "macro_f1", "confusion"}
        cells = reported.pop("confusion")
        assert sum(cell["count"] for cell in cells) == 40
        right = sum(cell["count"] for cell in cells if cell["true"] == cell["predicted"])
        assert right / 40 == reported["accuracy"]
        assert Counter(example.labels[task] for example in held_out) == {
            name: sum(cell["count"] for cell in cells if cell["true"] == name)
            for name in {cell["true"] for cell in cells}
        }
        for true in (names := sorted({example.labels[task] for example in held_out})):
            counts = {cell["predicted"]: str(cell["count"]) for cell in cells if cell["true"] == true}
            assert f"| {true} | {' | '.join(counts.get(name, '0') for name in names)} |" in text
        for metric, value in reported.items():
            assert value == pytest.approx(best["validation"][task][metric], rel=1e-5)
    assert text.count("- from epoch") == 1  # nothing was unfrozen
    for r in epochs(run):
        learned, held = r["train"]["type"], r["validation"]["type"]
        numbers = [f"{learned['loss']:.3f}", f"{learned['accuracy']:.1%}"]
        numbers += [f"{held['loss']:.3f}", f"{held['accuracy']:.1%}", f"{held['macro_f1']:.3f}"]
        assert f"| {r['epoch'] + 1} | {r['step']} | type | {' | '.join(numbers)} |" in text
    assert re.search(r"layers\.0 +[\d,]+  frozen", text)
    assert "## Confusion on validation: rows are true, columns predicted" in text
    for name in ("best", "last"):
        assert len(MultiTaskModel.from_pretrained(run / name).predict(["x", "y"])) == 2
    # and its config gives the same run again
    again = tmp_path / "again"
    assert train.main(["--config", str(run / "config.json"), "--output", str(again)]) == 0
    assert_same_run(run, again)


@pytest.mark.plots
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


def test_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures: list[Any] = []

    def canvas(figure: Any) -> Mock:
        figures.append(figure)
        return Mock()

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg", canvas)
    scores = {"t": {"loss": 0.5, "accuracy": 0.25}}
    records = [
        {"step": step, "trained": trained, "train": scores, "validation": scores}
        for step, trained in ((5, ["heads.t"]), (11, ["heads.t"]), (17, ["layers.0", "heads.t"]))
    ]
    confusion = [[7, 0, 1], [2, 0, 3], [0, 4, 9]]
    results = {"validation": {"t": TaskMetrics(0.5, 0.25, 0.25, confusion)}}
    draw(records, results, {"t": ("x", "y", "z")})
    curves, matrix = figures
    for axes in curves.axes:
        assert [list(line.get_xdata()) for line in axes.lines] == [[5, 11, 17], [5, 11, 17], [11, 11]]
    (axes,) = matrix.axes
    assert axes.images[0].get_array().tolist() == confusion
    assert {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts} == {
        (column, row): (str(count), "white" if count > 4 else "black")
        for row, counts in enumerate(confusion)
        for column, count in enumerate(counts)
    }


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


@pytest.mark.plots
def test_odd_label_names(small: Path, tmp_path: Path) -> None:
    long = "y " * 149 + "y"
    labels = ["<$10", "$10_$20", "a|b", "\u4e2d\u6587", "x^2_", long]
    rows = [(f"sentence {i}", labels[i % 6]) for i in range(60)]
    data = table(tmp_path / "a.csv", [("text", "price"), *rows])
    command = f"--model {small} --train {data} --task price=price --epochs 1 --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    text = (tmp_path / "run" / "report.md").read_text()
    assert f"| price | $10_$20 | <$10 | a\\|b | x^2_ | {long} | \u4e2d\u6587 |" in text
    drawn = (tmp_path / "run" / "confusion-validation-price.png").exists()
    assert drawn == bool(importlib.util.find_spec("matplotlib"))
    predictions = MultiTaskModel.from_pretrained(tmp_path / "run" / "best").predict(["x"])
    assert predictions[0]["price"]["label"] in labels


@pytest.mark.plots
def test_columns_files_and_missing_labels(small: Path, tmp_path: Path) -> None:
    """One file with two label columns, an empty cell in each; explicit validation and test files."""
    rows = [(f"sentence {i}", "ab"[i % 2], "xyz"[i % 3]) for i in range(30)]
    whole = table(
        tmp_path / "a.csv", [("body", "k", "m"), ("one", "", "x"), ("two", "b", ""), ("3", "", ""), *rows]
    )
    held = table(tmp_path / "b.csv", [("body", "k", "m"), *((f"other {i}", *ks) for i, *ks in rows[:9])])
    only = table(tmp_path / "c.csv", [("body", "k", "m"), ("no mood", "a", ""), ("none either", "a", "")])
    command = f"--model {small} --train {whole} --validation {held} --test {only} --text body --task kind=k"
    command += f" --task mood=m --epochs 2 --batch-size 33 --lr 1e-3 --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    for step, epoch in zip(steps(tmp_path / "run"), epochs(tmp_path / "run"), strict=True):  # one batch each
        assert {task: train["loss"] for task, train in epoch["train"].items()} == pytest.approx(step["losses"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"]["kind"]["accuracy"] in (0.0, 0.5, 1.0)
    of_test = (
        (tmp_path / "run" / "report.md").read_text().partition("## Results: the best checkpoint on test")[2]
    )
    assert re.search(r"^\| kind \| .* \| 0\.0% \|$", of_test, re.MULTILINE)  # in training most are b
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
    command += f" --mixing {mixing} --epochs 2 --batch-size 8 --freeze backbone --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    held = {task: sum(cell["count"] for cell in m["confusion"]) for task, m in report["validation"].items()}
    assert held == {"kind": 6, "mood": 2}


@pytest.mark.plots
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
    captured = capsys.readouterr()
    assert f"train.py: warning: {warning}" in captured.err
    (mood,) = (line for line in captured.out.splitlines() if line.startswith("  mood         train:"))
    assert mood.endswith("validation: loss -, accuracy -, macro-F1 -   (majority class -)")
    assert train.main(f"{command} --metric mood.loss --output {tmp_path / 'none'}".split()) == 2
    assert "--metric mood.loss: no validation sentence has a label for it" in capsys.readouterr().err


@a_new_head_may_be_frozen
def test_a_new_head_that_is_frozen(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = main("first", "--freeze head:sentiment --epochs 1")
    assert (
        "train.py: warning: --freeze head:sentiment leaves the new head sentiment random"
        in capsys.readouterr().err
    )
    main("second", f"--freeze head:sentiment --epochs 1 --model {run / 'best'}")
    third = main("third", "--freeze gradual --epochs 2")
    assert "in epoch 2:\n" in (third / "report.md").read_text()  # what the last one trained
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


@pytest.mark.plots
def test_eval_only(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = main("run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = f"--model {run / 'best'} --data dummy --eval-only --output {tmp_path / 'evaluated'}"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Mock(free=100))  # enough: no checkpoints are written
        assert train.main(command.split()) == 0
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    report = json.loads((tmp_path / "evaluated" / "report.json").read_text())
    assert report == json.loads((run / "report.json").read_text())
    assert f"## Results: {run / 'best'} on validation" in (tmp_path / "evaluated" / "report.md").read_text()
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
    files = f"--validation {nothing} --test {test}"  # one of which has
    assert train.main(f"--model {run / 'best'} --eval-only {files} --task type=l".split()) == 0
    assert train.main(f"--eval-only --test {test} --task type=l".split()) == 2
    assert "--eval-only needs --model DIR, such as best/ of a run" in capsys.readouterr().err


def test_what_is_stored_in_bfloat16_is_trained_in_float32(small: Path, tmp_path: Path) -> None:
    encoder = BertModel.from_pretrained(small, dtype=torch.bfloat16)
    heads = {"a": MLPHead(36, 4, 2).bfloat16()}
    MultiTaskModel(encoder, heads, tokenizer=Tokenizer.from_pretrained(small)).save_pretrained(tmp_path)
    examples = [Example("x", {"a": "0"}), Example("y", {"a": "1"})]
    for _ in range(2):
        model, _ = train.build_model(Options(model=str(tmp_path)), ["a"], examples)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        (tmp_path / "heads.json").unlink(missing_ok=True)  # then with a new head


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


@pytest.mark.plots
def test_nothing_to_train(main: Main, capsys: pytest.CaptureFixture[str], small: Path) -> None:
    run = main("run", "--freeze all")
    assert "--freeze all leaves nothing to train: this only evaluates" in capsys.readouterr().out
    assert json.loads((run / "report.json").read_text())["validation"]["type"]["accuracy"] is not None
    ours, theirs = MultiTaskModel.from_pretrained(run / "best").encoder, BertModel.from_pretrained(small)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (run / "metrics.jsonl").read_text() == ""
    assert not list(run.glob("curves*"))  # of nothing


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
        "no training sentence has a label for type: --freeze head:type keeps its head as it is, not its accuracy"
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
