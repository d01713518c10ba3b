"""Trains task heads on a shared encoder, any part of it frozen.

    python train.py --model all-MiniLM-L6-v2

trains two heads on the sentences of heads/demo.csv; `--help` lists what can be changed. This file reads
from the top: the model, the loop, all of a run. Options are in heads/options.py, data in heads/sets.py,
what can be frozen in minibert/freezing.py, the files of a run in heads/run_directory.py.
"""

import io
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heads import MISSING, MLPHead, MultiTaskLoss, MultiTaskModel
from heads.data import SentenceDataset, epoch_batches, fingerprint, label_names
from heads.evaluation import evaluate, majority_accuracies, score
from heads.features import compute, fill, size_in_bytes
from heads.options import Options, read_options
from heads.processes import FirstFailedError, Processes, catching_interrupts
from heads.report import Bar, print_epoch, print_results, print_sets, write_report
from heads.run_directory import RunDirectory, check_room
from heads.sets import read_sets
from heads.tables import DataError, Example
from heads.training_state import Progress, collect, restore
from minibert import BertModel, Tokenizer
from minibert.fast_dropout import use_fast_dropout
from minibert.freezing import FreezePlan, set_groups
from minibert.memory import is_out_of_memory, keep_freed_memory
from minibert.modes import evaluating
from minibert.onednn import onednn_products
from weights import resolve
from weights.safetensors_files import HEADS, check_same_save, last_save

WIDTHS = (256, 128)  # of the first task's head, of every other's
EXAMPLES = (
    "Is it going to rain tomorrow?",
    "The stock market is crashing badly!",
    "I'm so happy about my promotion!",
)

# ------------------------------------------------------------------------------------------------ model


def build_model(
    options: Options, tasks: list[str], examples: list[Example]
) -> tuple[MultiTaskModel, list[str]]:
    """The encoder with a head for every task, the checkpoint's own and new ones; and the names of the new."""
    directory = resolve(options.model)
    mark = last_save(directory)
    heads: dict[str, nn.Module] = {}
    labels: dict[str, tuple[str, ...]] = {}
    if (directory / HEADS).is_file():
        trained = MultiTaskModel.from_pretrained(directory, dtype=torch.float32)
        encoder, heads, labels = trained.encoder, dict(trained.heads.items()), dict(trained.labels)
    else:
        encoder = BertModel.from_pretrained(directory, dtype=torch.float32)
    new = [task for task in tasks if task not in heads]
    if options.eval_only and (new or not heads):
        lacks = f"no head for {new[0]}, but for {', '.join(heads)}" if heads else "no heads"
        raise ValueError(
            f"--eval-only: {options.model} has {lacks}"
            + ("" if options.task else " (without --test FILE and --task it is for the bundled sentences)")
        )
    labels |= label_names(examples, new)
    torch.manual_seed(options.seed)
    for task in new:
        width = WIDTHS[0] if task == tasks[0] else WIDTHS[1]
        heads[task] = MLPHead(encoder.config.hidden_size, width, len(labels[task]))
    tokenizer = Tokenizer.from_pretrained(directory)
    check_same_save(directory, mark)
    model = MultiTaskModel(encoder, heads, labels=labels, tokenizer=tokenizer)
    for parameter in model.parameters():
        # MKL may round differently where a matrix begins elsewhere in memory, as it does in each mapped file
        parameter.data = parameter.data.clone()
    return model.eval(), new


def build_loss(options: Options, model: MultiTaskModel) -> MultiTaskLoss:
    """The tasks' losses and how they are added."""
    uncertainty = options.balance == "uncertainty"
    return MultiTaskLoss(list(model.heads), weights=options.loss_weights(), uncertainty=uncertainty)


class TrainingStep(nn.Module):
    """From a batch to its loss, as one module: what runs in parallel."""

    def __init__(self, model: MultiTaskModel, loss: MultiTaskLoss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(
        self, batch: dict[str, Tensor], labels: dict[str, Tensor], depth: int | None, counts: dict[str, float]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The objective, each task's loss, and the logits; `counts` as in MultiTaskLoss."""
        logits = compute(self.model, batch, depth).logits
        return *self.loss(logits, labels, counts), logits


# ------------------------------------------------------------------------------------------------- loop


def train(
    options: Options,
    run: RunDirectory,
    model: MultiTaskModel,
    sets: dict[str, SentenceDataset],
    processes: Processes,
    progress: Progress,
    state: dict[str, Tensor],
) -> None:
    """Trains from where `progress` and `state` are, and saves. Raises KeyboardInterrupt after Ctrl-C."""
    plan, epochs = options.plan(), all_batches(options, sets["train"])
    total = sum(map(len, epochs))
    module = TrainingStep(model, build_loss(options, model).to(processes.device))
    fused = options.fast or None  # None: torch's default, which rounds as the reference does; fused does not
    optimizer = torch.optim.AdamW(parameter_groups(plan, module, progress.epoch), fused=fused)
    if not processes.is_first:
        torch.manual_seed(options.seed + processes.rank)  # other dropout than in the first process
    restore(state, module, optimizer, processes)
    state.clear()  # its tensors are views of last/'s file, which the next save replaces
    depths = [plan.frozen_depth(model, epoch) for epoch in range(len(epochs))]

    def save() -> None:
        """Writes last/."""
        check_weights(module, progress)
        tensors = collect(module, optimizer, processes)
        processes.from_first(partial(run.save, "last", model, progress, tensors))

    def interrupted() -> bool:
        return any(processes.totals([len(caught)]))  # in any process

    def stop_if_interrupted() -> None:
        if interrupted():
            save()
            raise KeyboardInterrupt(run.path)

    with catching_interrupts() as caught:
        for epoch in range(progress.epoch, len(epochs)):
            plan.apply(model, epoch)
            set_groups(optimizer, parameter_groups(plan, module, epoch))
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            cache_features(options, model, sets, epochs, depths, epoch, processes, stop_if_interrupted)
            parallel = processes.parallel(module)
            model.train()
            title = f"epoch {epoch + 1}/{len(epochs)}"
            bar = Bar(title, "step", len(epochs[epoch]), progress.batch, hidden=not processes.is_first)
            for indices in epochs[epoch][progress.batch :]:
                batch = sets["train"].collate(indices)
                counts = {task: float((batch[f"labels.{task}"] != MISSING).sum()) for task in model.heads}
                factor = rate_factor(options, progress.step, total)
                for group in optimizer.param_groups:
                    group["lr"] = group["plan_lr"] * factor
                record: dict[str, Any] = {"epoch": epoch, "step": progress.step + 1}
                record |= {"lr": plan.lr * factor, "head_lr": plan.head_lr * factor}

                mine = processes.share(batch)
                labels = {task: mine.pop(f"labels.{task}") for task in model.heads}
                # gradients are averaged over the processes, so each divides by its part of the common count
                shares = {task: count / processes.count for task, count in counts.items()}
                with processes.autocast():
                    objective, losses, logits = parallel(mine, labels, sets["train"].depth, shares)
                hits = [float((logits[task].argmax(1) == labels[task]).sum()) for task in losses]
                *sums, signals = processes.totals(  # of all processes, in one exchange; losses first, then hits
                    [*(loss.item() for loss in losses.values()), *hits, float(len(caught))]
                )
                means = {task: value / processes.count for task, value in zip(losses, sums, strict=False)}
                for task, value in means.items():
                    check_finite(f"loss of {task}", value, record)
                objective.backward()
                norm = nn.utils.clip_grad_norm_(trained, options.clip_norm or math.inf)
                check_finite("length of the gradient", float(norm), record)
                optimizer.step()
                optimizer.zero_grad()  # now, so that the gradients take no memory beside the next activations

                progress.step += 1
                progress.batch += 1
                for (task, mean), hit in zip(means.items(), sums[len(means) :], strict=True):
                    progress.count(task, mean * counts[task], hit, counts[task])
                if processes.is_first:
                    run.log({**record, "losses": means})
                bar.step(sum(means.values()), int(batch["attention_mask"].sum()))
                if signals or (options.save_every and progress.step % options.save_every == 0):
                    save()
                if signals:
                    raise KeyboardInterrupt(run.path)
            bar.close()
            title = f"{title}, step {progress.step}{bar.speed()}"

            check_weights(module, progress)
            metrics = processes.from_first(lambda: evaluate(model, sets["validation"], processes))
            better = progress.judge(score(metrics, options.metric))
            record = {"epoch": epoch, "step": progress.step, "trained": plan.trained(model, epoch)}
            record |= {"train": progress.means(), "validation": {t: m.scores() for t, m in metrics.items()}}
            stop = bool(options.patience) and progress.stale >= options.patience
            progress.next_epoch(finished=stop or epoch + 1 == len(epochs))
            processes.from_first(partial(run.log, record))
            if better:
                processes.from_first(partial(run.save, "best", model))
            save()
            if processes.is_first:
                print_epoch(title, record, majority_accuracies(sets, "validation"))
            if stop:
                break
            if interrupted():  # all is saved already
                raise KeyboardInterrupt(run.path)


def all_batches(options: Options, dataset: SentenceDataset) -> list[list[list[int]]]:
    """The batches of every epoch."""
    epochs: list[list[list[int]]] = []
    left = options.steps or math.inf
    while left > 0 and (options.steps or len(epochs) < options.epochs):
        batches = epoch_batches(
            dataset,
            len(epochs),
            seed=options.seed,
            batch_size=options.batch_size,
            batch_tokens=options.batch_tokens,
            uniform=options.mixing == "uniform",
        )
        epochs.append(batches[: int(min(left, len(batches)))])
        left -= len(epochs[-1])
    return epochs


def parameter_groups(plan: FreezePlan, module: TrainingStep, epoch: int) -> list[dict[str, Any]]:
    """The plan's, and the learned weights of the losses, which no plan freezes."""
    learned = list(module.loss.parameters())
    group = {"params": learned, "lr": plan.head_lr, "weight_decay": 0.0, "plan_lr": plan.head_lr}
    return plan.optimizer_groups(module.model, epoch) + [group] * bool(learned)


def rate_factor(options: Options, step: int, total: int) -> float:
    """What learning rates are multiplied by in a step (from 0), by transformers' formulas."""
    warmup = round(options.warmup * total)
    if step < warmup:
        return step / warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "linear":
        return (total - step) / (total - warmup)
    done = (step - warmup) / (total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done))


def cache_features(
    options: Options,
    model: MultiTaskModel,
    sets: dict[str, SentenceDataset],
    epochs: list[list[list[int]]],
    depths: list[int | None],
    epoch: int,
    processes: Processes,
    after_batch: Callable[[], None],
) -> None:
    """Computes once what frozen layers give, if they stay frozen for several epochs and memory allows."""
    train, validation = sets["train"], sets["validation"]
    depth = depths[epoch]
    if train.depth == depth:
        return
    train.forget_features()
    validation.forget_features()
    if depth is None or depths.count(depth) < 2:
        return
    needed = size_in_bytes(model, train, depth) + size_in_bytes(model, validation, depth)
    if needed > options.feature_cache_mb * 1e6:
        return
    batches = {train: epochs[depths.index(depth)], validation: []}  # of the latter those of `evaluate`
    bar = Bar("frozen layers", "sentence", len(train) + len(validation), hidden=not processes.is_first)
    with evaluating(model), processes.autocast():
        for sentences in fill(model, batches, depth):
            bar.advance(sentences)
            after_batch()
    bar.close()


def check_finite(name: str, value: float, record: dict[str, Any]) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"step {record['step']}: the {name} is {value}, at learning rate {record['lr']:.3g} (heads "
            f"{record['head_lr']:.3g}): stopped, best/ and last/ are as last saved; try a smaller --lr"
        )


def check_weights(module: TrainingStep, progress: Progress) -> None:
    """Nothing is saved, and nothing evaluated, that is not finite."""
    for name, parameter in module.named_parameters():
        # a sum is not finite if a term is not, and takes no memory
        if parameter.requires_grad and not math.isfinite(parameter.detach().sum()):
            raise ValueError(
                f"step {progress.step}: {name.removeprefix('model.')} is not finite: stopped, best/ and last/ "
                "are as last saved; try a smaller --lr"
            )


# ---------------------------------------------------------------------------------------- all of a run


def run_all(options: Options, processes: Processes, held: ExitStack) -> None:
    """Data, model, training or only evaluation, report. Holds the run's directory until `held` is closed."""
    examples, tasks = read_sets(options)
    progress = Progress({name: fingerprint(some) for name, some in examples.items()}, processes.count)
    if any(data != progress.data for data in processes.gather(progress.data)):
        raise DataError("the processes have read different sentences: give each the same files")
    state: dict[str, Tensor] = {}
    run = None
    if options.resume:
        run = RunDirectory(str(options.output))
        processes.from_first(partial(held.enter_context, run.locked()))
        processes.from_first(run.recover)
        progress, state = run.load(progress)
    start = replace(options, model=f"{options.output}/last") if state else options
    model, new = build_model(start, tasks, examples.get("train", []))
    model.to(processes.device)
    if options.fast:
        model.encoder.attention = "packed"
        use_fast_dropout(model.encoder)
    assert model.tokenizer is not None
    sets = {name: SentenceDataset(some, model.tokenizer, model.labels) for name, some in examples.items()}
    check_vocabulary(options, model, sets)
    if processes.is_first:
        print_sets(sets, model.labels)
    if options.eval_only:
        for task in tasks:
            if not any(dataset.has_labels(task) for dataset in sets.values()):
                warnings.warn(f"no sentence has a label for {task}: nothing to evaluate", stacklevel=1)
        run = open_run(options, model, processes, held) if options.output else None
    else:
        plan = options.plan()
        check_settings(options, plan, model, new, sets)
        if run is not None and state:
            processes.from_first(partial(run.rewind, progress))
        else:
            run = open_run(options, model, processes, held)
        if processes.is_first:
            print(f"\n{summary(plan, model, progress.epoch)}\n\nin {run.path}", flush=True)
        if plan.trains_nothing(model):
            if processes.is_first:
                print(f"--freeze {options.freeze} leaves nothing to train: this only evaluates")
                run.save("best", model)
                run.save("last", model, progress)
        elif not progress.finished:
            train(options, run, model, sets, processes, progress, state)
    if processes.is_first:
        if run is not None and not options.eval_only:
            model = MultiTaskModel.from_pretrained(run.path / "best", attention=model.encoder.attention)
            model = model.to(processes.device)
        finish(options, run, model, sets, processes, max(0, progress.epoch - 1))


def summary(plan: FreezePlan, model: MultiTaskModel, epoch: int) -> str:
    """What is trained; in which epoch, if that changes."""
    changes = plan.trained(model, 0) != plan.trained(model, sys.maxsize)
    return f"in epoch {epoch + 1}:\n" * changes + plan.summary(model, epoch)


def check_vocabulary(options: Options, model: MultiTaskModel, sets: dict[str, SentenceDataset]) -> None:
    """Raises DataError where the model has no vector for a token, also of the examples that `finish` prints."""
    assert model.tokenizer is not None
    printed, _ = model.tokenizer.token_ids_and_cuts([*EXAMPLES], first=0)
    rows = chain(printed, *(dataset.ids for dataset in sets.values()))
    largest, size = max(max(row, default=0) for row in rows), model.encoder.config.vocab_size
    if largest >= size:
        raise DataError(
            f"the tokenizer of {options.model} has made an id {largest} of a sentence, but the model's "
            f"vocab_size is {size}: they do not belong together"
        )


def check_settings(
    options: Options,
    plan: FreezePlan,
    model: MultiTaskModel,
    new: list[str],
    sets: dict[str, SentenceDataset],
) -> None:
    """What could only fail later is said before training; `new` are the heads that have learned nothing yet."""
    build_loss(options, model)
    trained = plan.trained(model, sys.maxsize)  # in some epoch, since what has thawed stays so
    if trained and not plan.trained(model, 0):
        raise ValueError(f"--freeze {options.freeze} leaves nothing to train in the first epoch")
    judge = options.metric.rpartition(".")[0]
    if judge and judge not in model.heads:
        raise ValueError(f"--metric {options.metric}: no task {judge!r}, there are: {', '.join(model.heads)}")
    judged = [judge] if judge else list(model.heads)
    unlabelled = [task for task in judged if not sets["validation"].has_labels(task)]
    if unlabelled == judged:
        raise ValueError(f"--metric {options.metric}: no validation sentence has a label for it")
    for task in unlabelled:
        warnings.warn(
            f"no validation sentence has a label for {task}: best/ is chosen without it", stacklevel=1
        )
    for task in model.heads:
        if f"heads.{task}" not in trained:
            if trained and task in new:
                warnings.warn(f"--freeze {options.freeze} leaves the new head {task} random", stacklevel=1)
        elif not sets["train"].has_labels(task):
            warnings.warn(
                f"no training sentence has a label for {task}: --freeze head:{task} keeps its head as it is, "
                "not its accuracy",
                stacklevel=1,
            )


def open_run(options: Options, model: MultiTaskModel, processes: Processes, held: ExitStack) -> RunDirectory:
    """The directory of a new run, made by the first process."""

    def begin() -> Path:
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        # best, last, a new last beside it, and twice the optimizer's two numbers per parameter; 1 to spare
        check_room(Path(options.output or "runs"), 0 if options.eval_only else 8 * size)
        path = Path(options.output) if options.output else next_directory()
        run = RunDirectory(path)
        if not options.resume:
            held.enter_context(run.locked())
            for name in ("config.json", "metrics.jsonl", "best", "last"):
                if (path / name).exists():
                    raise ValueError(
                        f"{path} holds a {name} already: give another --output, or go on with that run by "
                        "--resume"
                    )
        if not options.eval_only:  # which writes nothing unless it succeeds
            run.begin(options.resolved())
        return path

    return RunDirectory(processes.from_first(begin))


def next_directory() -> Path:
    """The first of runs/1, runs/2, ... that could be made: of runs begun at once each gets its own."""
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (path := Path("runs", str(number))).mkdir()
            return path
        except FileExistsError:
            number += 1


def finish(
    options: Options,
    run: RunDirectory | None,
    model: MultiTaskModel,
    sets: dict[str, SentenceDataset],
    processes: Processes,
    epoch: int,
) -> None:
    """Evaluates the best checkpoint, prints and writes what came out; `epoch` is the last one trained."""
    results = {}
    majorities: dict[str, dict[str, float | None]] = {}
    for name, dataset in sets.items():
        if name != "train":
            dataset.forget_features()
            results[name] = evaluate(model, dataset, processes)
            majorities[name] = majority_accuracies(sets, name)
    subject = options.model if options.eval_only else "the best checkpoint"
    if run is not None:
        if options.eval_only:
            run.begin(options.resolved())
        plan = "evaluated only" if options.eval_only else summary(options.plan(), model, epoch)
        write_report(run, subject, results, labels=model.labels, majorities=majorities, plan=plan)
    print_results(subject, results, majorities)
    print()
    for sentence, prediction in zip(EXAMPLES, model.predict(EXAMPLES), strict=True):
        answers = (f"{task}: {p['label']} ({p['probability']:.0%})" for task, p in prediction.items())
        print(f"{sentence:<36}  {'   '.join(answers)}")
    if run is not None:
        models = (
            "" if options.eval_only else "best/ and last/ (MultiTaskModel.from_pretrained), metrics.jsonl, "
        )
        print(f"\nin {run.path}: {models}report.md")


def main(argv: list[str] | None = None) -> int:
    """0: done. 2: an error, in one sentence on stderr. 130: Ctrl-C, or SIGTERM while training; all is saved.

    141: nobody reads standard output any more; what was saved before stays.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter still shows the rest
    try:
        with warnings.catch_warnings(), ExitStack() as held:
            warnings.showwarning = show_warning
            options = read_options(argv)
            keep_freed_memory()
            processes = Processes(options.device, bf16=options.bf16)
            if options.fast:
                held.enter_context(onednn_products())
            run_all(options, processes, held)
            processes.close()  # not after an error: it would wait for processes that wait for this one
        print(end="", flush=True)  # whether anybody reads the last lines is noticed now
        return 0
    except KeyboardInterrupt as interrupt:
        where = interrupt.args[0] if interrupt.args else "DIR"  # a signal that acts at once does not know
        tell(f"interrupted; a run that has begun goes on with --output {where} --resume")
        return 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except FirstFailedError:
        return 2  # the first process has said why
    except (ValueError, TypeError, OSError) as error:  # DataError and CheckpointError among them
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            message = "out of memory, try a smaller --batch-size"
        elif "by peer" in str(error):  # gloo: "Connection closed by peer", or reset
            message = "another process has ended: a run that has begun goes on with --resume"
        else:
            raise
    print(f"train.py: error: {message}", file=sys.stderr)
    return 2


def tell(message: str) -> None:
    """On standard error, from the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(f"train.py: {message}", file=sys.stderr)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    tell(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
