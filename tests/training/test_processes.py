"""Several processes train as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

import train
from heads import MISSING
from heads.processes import Processes
from heads.training_state import restore
from tests.training.conftest import ROOT, Main, a_new_head_may_be_frozen, steps, table

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TORCHRUN.append(str(ROOT / "train.py"))


@a_new_head_may_be_frozen
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
    result = subprocess.run(
        [*TORCHRUN, *command.split(), "--output", str(tmp_path / "two")],
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


def test_processes_that_read_different_sentences(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On two machines, or of a file that was written meanwhile: they would wait for each other, or mix them up."""
    monkeypatch.setattr(Processes, "gather", lambda _, data: [data, data | {"train": "another"}])
    run = main("run", status=2)
    assert "the processes have read different sentences: give each the same files" in capsys.readouterr().err
    assert not run.exists()


def test_another_process_that_ends_is_one_sentence(
    main: Main, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")
    monkeypatch.setattr(train, "run_all", Mock(side_effect=error))
    main("run", status=2)
    message = "train.py: error: another process has ended: a run that has begun goes on with --resume\n"
    assert capsys.readouterr().err == message


@pytest.mark.slow
def test_an_error_in_the_first_process_stops_all_with_one_sentence(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "best").mkdir(parents=True)
    command = f"--model {small} --data dummy --epochs 1 --device cpu --output {tmp_path / 'run'}"
    result = subprocess.run([*TORCHRUN, *command.split()], capture_output=True, text=True, check=False)
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


def test_each_process_has_its_own_dropout(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for rank in ("0", "1", "2"):  # each by itself, but for its number
        monkeypatch.setenv("RANK", rank)
        main(rank, "--steps 1")
        seeds.add(torch.initial_seed())
    assert len(seeds) == 3


def test_each_process_takes_back_its_own_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {f"random/{rank}/cpu": torch.Generator().manual_seed(rank).get_state() for rank in range(3)}
    module = torch.nn.Linear(1, 1)
    monkeypatch.setenv("RANK", "1")
    with torch.random.fork_rng():
        restore(states, module, torch.optim.AdamW(module.parameters()), Processes("cpu"))
        assert torch.equal(torch.get_rng_state(), states["random/1/cpu"])


def test_a_share_of_a_batch() -> None:
    processes = Processes("cpu")
    processes.count = 3
    batch = {"attention_mask": torch.ones(2, 4), "labels.a": torch.tensor([5, 6]), "features": torch.eye(2, 4)}
    shares = []
    for processes.rank in range(3):
        shares.append(processes.share(batch))
    assert [share["labels.a"].tolist() for share in shares] == [[5], [6], [MISSING]]
    assert [share["features"].tolist() for share in shares] == [[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[1, 0, 0, 0]]]
