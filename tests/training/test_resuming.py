"""A run that was stopped goes on as if it had not been."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import train
from heads import MultiTaskModel, features
from heads.processes import catching_interrupts
from heads.run_directory import RunDirectory
from heads.training_state import Progress
from minibert import BertModel
from tests import forked
from tests.training.conftest import (
    Main,
    a_new_head_may_be_frozen,
    assert_same_run,
    command,
    epochs,
    steps,
    table,
)


@pytest.fixture(scope="module")
def whole_run(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that nothing stopped, one for all tests that ask for these options."""

    @cache
    def run(options: str) -> Path:
        output = tmp_path_factory.mktemp("whole") / "run"
        assert train.main(command(small, output, options)) == 0
        return output

    return run


@a_new_head_may_be_frozen
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
def test_resuming_is_exact(
    main: Main, whole_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, options: str, stop: int
) -> None:
    """Ctrl-C in a step: it is finished and saved; resumed, every file is as if nothing had happened."""
    whole = whole_run(options)
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


@pytest.mark.parametrize(("owner", "name"), [(RunDirectory, "log"), (train, "evaluate")])
def test_an_interrupt_saves_once(main: Main, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """In a step, and while the model is evaluated, after which it is saved anyway."""
    saved = []
    save, interrupted = RunDirectory.save, getattr(owner, name)

    def saving(self: RunDirectory, *arguments: Any) -> None:
        saved.append(arguments[0])
        save(self, *arguments)

    def interrupting(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return interrupted(*arguments)

    monkeypatch.setattr(RunDirectory, "save", saving)
    monkeypatch.setattr(owner, name, interrupting)
    run = main("part", "--save-every 1", status=130)
    assert saved == ["last"] * len(steps(run)) + ["best", "last"] * (name == "evaluate")


@pytest.mark.parametrize("options", ["", "--fast"])
# Computed before the first step, and in the middle of the run:
@pytest.mark.parametrize("depth", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupt_while_features_are_computed(
    main: Main, whole_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, options: str, depth: int
) -> None:
    """Ctrl-C is heeded after a batch of them; resumed, every file is as if nothing had happened."""
    options += " --freeze gradual:2 --epochs 4 --save-every 100"
    whole = whole_run(options)
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
    whole_run: Callable[[str], Path], small: Path, tmp_path: Path, when: str
) -> None:
    options = "--save-every 5"
    whole = whole_run(options)
    code = f"""
import os, signal
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
train.main({command(small, tmp_path / "part", options)})
"""
    killed = forked.run(("-c", code), os.environ, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    RunDirectory(tmp_path / "part").recover()
    saved = tmp_path / "part" / "last" / "training.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    assert step == {"at once": 0, "before the first save": 0, "between saves": 10, "while saving": 5}[when]
    assert train.main(["--output", str(tmp_path / "part"), "--resume"]) == 0
    assert_same_run(whole, tmp_path / "part")
    assert not list((tmp_path / "part").glob(".*"))


def test_a_checkpoint_that_was_moved_and_linked(small: Path, tmp_path: Path) -> None:
    run, model = RunDirectory(tmp_path / "run"), MultiTaskModel(BertModel.from_pretrained(small), {})
    run.save("best", model)
    shutil.move(run.path / "best", tmp_path / "elsewhere")
    (run.path / "best").symlink_to(tmp_path / "elsewhere")
    for _ in range(3):
        run.save("best", model)
    assert MultiTaskModel.from_pretrained(run.path / "best")
    assert [path.name for path in run.path.iterdir()] == ["best"]
    assert (tmp_path / "elsewhere" / "model.safetensors").is_file()


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
    assert train.main(f"{command} --resume --device cpu".split()) == 0  # repeating the options is fine

    def refused(options: str) -> str:
        capsys.readouterr()
        assert train.main([*options.split(), "--output", str(output), "--resume"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has other options: --freeze was none, is backbone" in refused("--freeze backbone")
    assert "--task was ('a=label',), is ('a=other',)" in refused("--task a=other")
    assert "--epochs was 1, is 2; --seed was 0, is 1" in refused("--seed 1 --epochs 2")
    header, *lines = data.read_text().splitlines()
    for split in ("train", "test"):  # the latter is a set that was not there
        marked = [f"{header},split", *(f"{line}," for line in lines), f"more,a,c,{split}"]
        data.write_text("\n".join(marked) + "\n")
        assert f"these sets have changed since {output} began: {split}" in refused("")


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
    # but one that died while its first epoch was saved is
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (first, _) = (i for i, line in enumerate(lines) if "validation" in line)
    (run / "metrics.jsonl").write_text("".join(lines[: first + 1]))
    assert train.main(["--output", str(run), "--resume"]) == 0
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.parametrize("missing", ["best", "last/heads.json"])
def test_a_run_that_lost_a_part_does_not_go_on(
    main: Main, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    run = main("run", "--epochs 1")
    (run / missing).rename(run / "elsewhere")
    assert train.main(["--output", str(run), "--resume"]) == 2
    assert f"{run / missing} is not there any more, so the run cannot go on" in capsys.readouterr().err


def test_damaged_files_of_a_run(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    run = main("run", "--epochs 1")
    progress = json.loads((run / "last/training.json").read_text())

    def refused() -> str:
        assert train.main(["--output", str(run), "--resume"]) == 2
        return capsys.readouterr().err

    (run / "metrics.jsonl").write_bytes(b"x" * (run / "metrics.jsonl").stat().st_size)
    assert "metrics.jsonl is damaged, not every line is JSON" in refused()
    os.truncate(run / "metrics.jsonl", 99)
    assert "metrics.jsonl is missing or shorter than it was" in refused()
    assert (run / "metrics.jsonl").stat().st_size == 99
    for name, value, message in (
        ("processes", 2, "run has 2 processes, now there are 1"),
        ("colour", 2, "training.json was not written by this version of train.py"),
    ):
        (run / "last/training.json").write_text(json.dumps(progress | {name: value}))
        assert message in refused()


def test_what_is_saved_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a power cut leaves all of it, and a record that is as long as last/ says."""
    run = RunDirectory(tmp_path)
    run.log({"step": 1})
    flushed: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda file: flushed.add(os.fstat(file).st_ino))
    run.save("last", Mock(save_pretrained=Path.mkdir), Progress({}), {})
    files = [run.log_file, *(tmp_path / "last").iterdir()]
    assert len(files) == 3
    assert {file.stat().st_ino for file in files} <= flushed


def test_resuming_removes_nothing_of_others(main: Main) -> None:
    run = main("run", "--epochs 1")
    names = [".venv.old", ".git.new", ".best.new", ".last.old", ".saving-0a1b2c3d"]
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


def test_the_best_is_there_before_last_says_so(
    main: Main, tmp_path: Path, whole_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunDirectory.save

    def killed(*arguments: Any) -> None:
        save(*arguments)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save", killed)
        with pytest.raises(SystemExit):
            main("part")
    assert train.main(f"--output {tmp_path / 'part'} --resume".split()) == 0
    assert_same_run(whole_run(""), tmp_path / "part")


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


def test_a_second_signal_acts_at_once_and_later_ones_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with catching_interrupts() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert "stopping once all is saved" in capfd.readouterr().err


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_counts_where_nobody_can_be_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str
) -> None:
    """Standard error is gone, or another process says it."""
    monkeypatch.setenv("RANK", rank)
    with catching_interrupts() as caught, monkeypatch.context() as patch:
        if rank == "0":
            patch.setattr(os, "write", Mock(side_effect=BrokenPipeError))
        signal.raise_signal(signal.SIGTERM)
    assert caught == [signal.SIGTERM]
    assert capfd.readouterr().err == ""


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catching_interrupts() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert not caught
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
