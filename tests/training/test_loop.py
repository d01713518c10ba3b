"""How it trains: schedules, cached features, numbers that are not finite."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import train
from heads import MLPHead, MultiTaskLoss, MultiTaskModel, features
from heads.options import Options
from heads.training_state import Progress
from minibert import BertModel
from minibert.freezing import FreezePlan
from tests.training.conftest import Main, a_new_head_may_be_frozen, epochs, steps


def test_early_stopping(main: Main) -> None:
    """With a learning rate of nothing no epoch is better than the first."""
    run = main("run", "--epochs 9 --lr 0 --patience 2 --metric sentiment.macro_f1")
    assert len(epochs(run)) == 3
    assert json.loads((run / "last/training.json").read_text())["finished"]


def test_patience_counts_from_the_best_epoch() -> None:
    progress = Progress({})
    judged = [(progress.judge(score), progress.stale) for score in (1.0, 0.0, 2.0, 2.0, 1.0)]
    assert judged == [(True, 0), (False, 1), (True, 0), (False, 1), (False, 2)]


def test_learned_weights_of_losses_do_not_decay(small: Path) -> None:
    model = MultiTaskModel(BertModel.from_pretrained(small), {"a": MLPHead(36, 5, 2)})
    loss = MultiTaskLoss(["a"], uncertainty=True)
    plan = FreezePlan("all", head_lr=0.5, weight_decay=0.1)  # which does not freeze them
    (group,) = train.parameter_groups(plan, train.TrainingStep(model, loss), 0)
    assert group == {"params": [loss.log_variance], "lr": 0.5, "plan_lr": 0.5, "weight_decay": 0.0}


def test_steps_instead_of_epochs(main: Main) -> None:
    run = main("run", "--steps 11 --epochs 1 --warmup 0.5 --lr 1e-3")
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


@a_new_head_may_be_frozen
@pytest.mark.parametrize("freeze", ["backbone", "layers:1", "layers:2,head:type", "gradual:2"])
def test_cached_features_give_the_same_run(main: Main, freeze: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def noting(*arguments: Any) -> Iterator[int]:
        filled.append(arguments[-1])
        return features.fill(*arguments)

    monkeypatch.setattr(train, "fill", noting)
    options = f"--freeze {freeze} --epochs {9 if freeze == 'gradual:2' else 4} --lr 1e-3"
    cached = main("cached", options)
    expected = {
        "backbone": [3],
        "layers:1": [1],
        "layers:2,head:type": [2],
        "gradual:2": [3, 2, 1, 0],  # and in the ninth epoch nothing is frozen any more
    }[freeze]
    assert filled == expected
    computed = main("computed", f"{options} --feature-cache-mb 0")
    assert filled == expected  # nothing more
    a, b = steps(cached), steps(computed)
    first = [record["losses"] for record in a if record["epoch"] == 0]
    assert first == [record["losses"] for record in b if record["epoch"] == 0]  # to the last bit
    for x, y in zip(a, b, strict=True):
        assert x["losses"] == pytest.approx(y["losses"], rel=1e-4)
    for x, y in zip(epochs(cached), epochs(computed), strict=True):
        for task, scores in x["validation"].items():
            assert scores["loss"] == pytest.approx(y["validation"][task]["loss"], rel=1e-4)
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
    evaluated = plain.with_name("evaluated")  # the same model
    command = f"--model {plain / 'best'} --data dummy --eval-only --bf16 --output {evaluated}"
    assert train.main(command.split()) == 0
    ours, reference = (
        json.loads((run / "report.json").read_text())["validation"]["type"]["loss"]
        for run in (evaluated, plain)
    )
    assert ours != reference
    assert ours == pytest.approx(reference, abs=0.01)


def test_batch_tokens(main: Main) -> None:
    run = main("run", "--epochs 1 --batch-tokens 200")
    assert len(steps(run)) > 10


@pytest.mark.parametrize(
    ("options", "limit"), [("", 1.0), ("--clip-norm 0.3", 0.3), ("--clip-norm 0", math.inf)]
)
def test_how_long_a_gradient_may_be(
    main: Main, monkeypatch: pytest.MonkeyPatch, options: str, limit: float
) -> None:
    clip = Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip)
    main("run", f"--steps 2 {options}")
    assert [call.args[1] for call in clip.call_args_list] == [limit, limit]


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


@pytest.mark.parametrize("signed", [True, False])  # nan, or infinity, of which the loss is nan
def test_what_overflows_is_not_evaluated(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path, signed: bool
) -> None:
    """All weights are finite, but the logits are not: argmax and a comparison make something good of them."""
    run = main("run", "--steps 1")
    model = MultiTaskModel.from_pretrained(run / "best")
    for parameter in model.heads["sentiment"].parameters():
        parameter.data = torch.full_like(parameter, 3e38) * (parameter.sign() if signed else 1)
    model.save_pretrained(tmp_path / "large")
    for _ in range(2):  # the first leaves nothing that the second could stumble over
        command = f"--model {tmp_path / 'large'} --data dummy --eval-only --output {tmp_path / 'evaluated'}"
        assert train.main(command.split()) == 2
        assert "sentiment: nan or inf among the logits of 40 of 40 sentences" in capsys.readouterr().err
