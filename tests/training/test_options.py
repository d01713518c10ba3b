"""What train.py refuses, and what it says."""

import json
import os
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import train
from heads import MultiTaskModel
from heads.options import Options, read_options
from minibert import BertConfig, BertModel, Tokenizer
from tests.full_disk import no_file_beyond
from tests.terminal import shown_on_a_terminal
from tests.training.conftest import Main, assert_same_run, table


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
        ("--metric .loss", "--metric is '.loss', it must be [TASK.]loss, accuracy or macro_f1"),
        ("--metric topic.loss", "--metric topic.loss: no task 'topic', there are: type, sentiment"),
        ("--loss-weight topic=1", "a loss weight is given for 'topic'"),
        ("--loss-weight type", "--loss-weight type: give NAME=X, each name once"),
        ("--loss-weight type=2 --loss-weight type=3", "--loss-weight type=3: give NAME=X, each name once"),
        ("--loss-weight type=much", "--loss-weight type=much: could not convert string to float: 'much'"),
        ("--loss-weight type=2 --balance uncertainty", "choose one"),
        ("--task a=b", "--task, --validation and --test need --train FILE"),
        ("--text sentence", "--text and --split are about files: give --train FILE, too"),
        ("--split part", "--text and --split are about files: give --train FILE, too"),
        ("--train x.csv", "--train needs --task NAME=COLUMN"),
        ("--train x.csv --task a=b", "x.csv cannot be read: No such file or directory"),
        ("--device gpu", "--device gpu:"),
        ("--device meta", "--device meta"),
        ("--seed 4294967296", "--seed is 4294967296, it must be less than 2**32"),
        ("--eval-only --test x.csv", "files need --task NAME=COLUMN, and --task needs files"),
        ("--train knd=x.csv --task kind=a", "--train knd=x.csv: there is no task 'knd', --task names kind"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--eval-only", "has no heads"),
        ("--resume", "holds no run, it has no config.json"),
        ("--model no-such-model --lr -1", "lr is -1.0, it must be a number from 0 up"),
        ("--model no-such-model --freeze some", "no freezing strategy 'some'"),
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


def test_no_sentence_for_training(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"text {i}", "xy"[i % 2], "validation") for i in range(6)]
    data = table(tmp_path / "d.csv", [("text", "a", "split"), *rows])
    assert train.main(f"--model {small} --train {data} --task a=a --output {tmp_path / 'run'}".split()) == 2
    assert "error: there is no sentence for train\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_with_more_words_than_the_model(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only one sentence, of those for testing, has the word."""
    tokenizer = Tokenizer.from_pretrained(small)
    size = tokenizer.backend.get_vocab_size()
    tokenizer.backend.add_tokens(["qwertz"])
    shutil.copytree(small, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [(f"text {i}", "xy"[i % 2], "train") for i in range(30)]
    data = table(tmp_path / "d.csv", [("text", "a", "split"), *rows, ("a qwertz", "x", "test")])
    command = f"--model {tmp_path / 'model'} --train {data} --task a=a --output {tmp_path / 'run'}"
    assert train.main(command.split()) == 2
    assert (
        f"has made an id {size} of a sentence, but the model's vocab_size is {size}" in capsys.readouterr().err
    )
    fields = json.loads((small / "config.json").read_text()) | {"vocab_size": 2000}
    BertModel(BertConfig.from_dict(fields)).save_pretrained(tmp_path / "model")
    # The examples that are printed in the end have rarer words.
    texts = [" ".join(words) for words in product(("the", "of", "and"), repeat=3)]
    table(data, [("text", "a"), *((text, text[0]) for text in texts)])
    assert train.main(command.split()) == 2
    assert "but the model's vocab_size is 2000: they do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_saved_while_it_is_read(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer may be another's."""
    shutil.copytree(small, tmp_path / "model")
    model, read = BertModel.from_pretrained(small), Tokenizer.from_pretrained

    def saved_before(directory: Path) -> Tokenizer:
        model.save_pretrained(directory)
        return read(directory)

    monkeypatch.setattr(Tokenizer, "from_pretrained", saved_before)
    assert train.main(f"--model {tmp_path / 'model'} --data dummy --output {tmp_path / 'run'}".split()) == 2
    assert "model was saved to while it was read: load it again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"epoch": 3}', "config.json: no option 'epoch', see --help"),
        ('{"freeze": ["layers:1", "head:type"]}', "config.json: freeze is a list, it must be one value"),
        ('{"epochs": "many"}', "config.json: argument --epochs: invalid int value: 'many'"),
        ('{"lr": false}', "config.json: argument --lr: invalid float value: 'False'"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_bad_config(tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert train.main(["--config", str(tmp_path / "config.json")]) == 2
    assert message in capsys.readouterr().err


def test_the_command_line_wins_over_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"epochs": 3, "bf16": true, "lr": 0.1, "loss_weight": ["a=1", "b=2"], "model": "--mine"}'
    )
    options = read_options(["--config", str(tmp_path / "config.json"), "--epochs", "4", "--loss-weight", "c=3"])
    assert (options.epochs, options.bf16, options.lr, options.loss_weight) == (4, True, 0.1, ("c=3",))
    assert options.model == "--mine"


@pytest.mark.parametrize("lr", ["", "--lr 1e-4", "--head-lr 1e-2", "--lr 1e-4 --head-lr 1e-2"])
def test_learning_rates(lr: str) -> None:
    plan = read_options(lr.split()).plan()
    expected = {"": (5e-5, 1e-3), "--lr 1e-4": (1e-4, 1e-4), "--head-lr 1e-2": (5e-5, 1e-2)}
    assert (plan.lr, plan.head_lr) == expected.get(lr, (1e-4, 1e-2))


def test_what_else_the_plan_is_told() -> None:
    plan = read_options(["--layer-lr-decay", "0.9", "--weight-decay", "0.2"]).plan()
    assert (plan.layer_lr_decay, plan.weight_decay) == (0.9, 0.2)


def test_what_the_loss_is_told() -> None:
    model = Mock(heads=["type", "mood"])
    loss = train.build_loss(read_options(["--loss-weight", "mood=0.5"]), model)
    assert loss.weights == {"type": 1.0, "mood": 0.5}
    assert loss.log_variance is None
    assert train.build_loss(read_options(["--balance", "uncertainty"]), model).log_variance is not None


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
    assert f"{run}: 1 MB are free, checkpoints may take" in capsys.readouterr().err
    assert not run.exists()
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


def test_what_finds_no_room_is_removed(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of last/ the model was written, the optimizer's state was not."""
    with no_file_beyond(6_000_000):
        run = main("run", status=2)
    hint = f"best/ and last/ are as last saved: free some room and --resume the run in {run}"
    assert re.search(rf"File too large.*; {hint}\n", capsys.readouterr().err)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert train.main(["--output", str(run), "--resume"]) == 0
    assert_same_run(run, main("whole"))


def test_a_progress_bar_on_a_terminal_only(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    main("piped", "--epochs 1")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "tokens/s" in captured.out
    shown = shown_on_a_terminal(lambda: main("shown", "--epochs 1"))
    assert "epoch 1/1" in shown
    assert re.search(r"loss \d\.\d+, [\d,]+ tokens/s", shown)


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in Options.__dataclass_fields__.values():
        assert f"--{item.name.replace('_', '-')}" in text
        assert " ".join(item.metadata["help"].split()) in text
