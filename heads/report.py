"""What a run came to: report.json, report.md and, where matplotlib is installed, curves as PNGs."""

import importlib.util
import io
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from heads.data import SentenceDataset
from heads.losses import MISSING
from heads.metrics import TaskMetrics
from heads.run_directory import RunDirectory
from weights.json_files import to_json

LEGIBLE = 40  # so many classes can be written beside a matrix
LISTED = 8  # and so many in a line
LONGEST = 24  # characters of a label that are written beside a matrix
Results = Mapping[str, Mapping[str, TaskMetrics]]  # set -> task -> metrics


def write_report(
    run: RunDirectory,
    subject: str,
    results: Results,
    *,
    labels: Mapping[str, tuple[str, ...]],
    majorities: Mapping[str, Mapping[str, float | None]],
    plan: str,
) -> None:
    """Writes report.json, report.md and the plots.

    Args:
        subject: which model this is about.
        results: set -> task -> its metrics.
        labels: task -> label names, for the confusion matrices.
        majorities: set -> task -> accuracy of always giving the most frequent training label.
        plan: what was trained, as text.
    """
    scores = {
        name: {task: {**m.scores(), "confusion": _counts(m, labels[task])} for task, m in tasks.items()}
        for name, tasks in results.items()
    }
    epochs = [record for record in run.metrics() if "validation" in record]
    text = "\n\n".join(
        [
            "# Training report",
            f"```\n{plan}\n```",
            *(_results(f"{subject} on {name}", tasks, majorities[name]) for name, tasks in results.items()),
            _history(epochs),
            *(_confusions(name, tasks, labels) for name, tasks in results.items()),
        ]
    )
    report = {"report.json": to_json({"validation": {}, "test": {}} | scores)}
    run.write(report | {"report.md": f"{text}\n".encode()})
    if importlib.util.find_spec("matplotlib"):  # once the rest is safe
        try:
            figures = draw(epochs, results, labels)
            text += "".join(f"\n\n![{name}]({name})" for name in figures)
            run.write(figures | {"report.md": f"{text}\n".encode()})
        except Exception as error:  # a library that does not fit, a directory in the way, a full disk
            warnings.warn(f"nothing was drawn: {error}", stacklevel=2)


def print_sets(sets: Mapping[str, SentenceDataset], labels: Mapping[str, Sequence[str]]) -> None:
    """How many sentences there are, and from how many each label is learned, the most frequent first."""
    print(f"sentences: {', '.join(f'{len(dataset):,} {name}' for name, dataset in sets.items())}")
    for task, names in labels.items() if "train" in sets else ():
        counts = Counter(sets["train"].labels[task].tolist())
        del counts[MISSING]
        listed = ", ".join(f"{one_line(names[index])} {count:,}" for index, count in counts.most_common(LISTED))
        more = f", and {len(counts) - LISTED} more" * (len(counts) > LISTED)
        print(f"  {task:<12} {listed or 'no label'}{more}")


def one_line(label: str) -> str:
    """A label as it can stand in a line."""
    return " ".join(label.split())


def print_epoch(title: str, record: Mapping[str, Any], majorities: Mapping[str, float | None]) -> None:
    """An epoch's record (see train.py) as a line per task."""
    print(title)
    for task, scores in record["validation"].items():
        train = record["train"][task]
        print(
            f"  {task:<12} train: loss {shown(train['loss'])}, accuracy {percent(train['accuracy'])}"
            f"   validation: loss {shown(scores['loss'])}, accuracy {percent(scores['accuracy'])},"
            f" macro-F1 {shown(scores['macro_f1'])}   (majority class {percent(majorities[task])})",
            flush=True,
        )


def print_results(what: str, results: Results, majorities: Mapping[str, Mapping[str, float | None]]) -> None:
    """The metrics of every set as a line per task that has labels there."""
    for name, tasks in results.items():
        print(f"\n{what} on {name}")
        for task, m in tasks.items():
            if m.loss is None:
                continue
            majority = majorities[name][task]
            beside = "" if majority is None else f"   (majority class {percent(majority)})"
            print(
                f"  {task:<12} loss {shown(m.loss)}, accuracy {percent(m.accuracy)},"
                f" macro-F1 {shown(m.macro_f1)}{beside}"
            )


class Bar:
    """A progress bar on a terminal, nothing elsewhere; and how fast the epoch goes."""

    def __init__(self, title: str, unit: str, total: int, done: int = 0, *, hidden: bool) -> None:
        from tqdm import tqdm

        disabled = True if hidden or sys.stderr is None else None  # None: where there is no terminal
        self.bar = tqdm(total=total, initial=done, desc=title, unit=unit, leave=False, disable=disabled)
        self.began = time.perf_counter()
        self.tokens = 0

    def step(self, loss: float, tokens: int) -> None:
        """One step more, with its loss, and the speed so far."""
        self.tokens += tokens
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.speed()}", refresh=False)
        self.advance(1)

    def advance(self, units: int) -> None:
        """So many more."""
        self.bar.update(units)

    def speed(self) -> str:
        """Tokens per second, or nothing before the first step."""
        return f", {self.tokens / (time.perf_counter() - self.began):,.0f} tokens/s" if self.tokens else ""

    def close(self) -> None:
        """Takes the bar away."""
        self.bar.close()


def shown(value: float | None) -> str:
    """A number in a table."""
    return "-" if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    """A part of one as a percentage."""
    return "-" if value is None else f"{value:.1%}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[one_line(cell.replace("|", "\\|")) for cell in row] for row in [header, *rows]]
    lines = [escaped[0], ["---"] * len(header), *escaped[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _results(title: str, tasks: Mapping[str, TaskMetrics], majorities: Mapping[str, float | None]) -> str:
    rows = [
        [task, shown(m.loss), percent(m.accuracy), shown(m.macro_f1), percent(majorities[task])]
        for task, m in tasks.items()
    ]
    header = ["task", "loss", "accuracy", "macro-F1", "majority class"]
    note = "Majority class: the accuracy of always answering what is most frequent in training."
    return f"## Results: {title}\n\n{_table(header, rows)}\n\n{note}"


def _history(epochs: list[dict[str, Any]]) -> str:
    rows = []
    for record in epochs:
        for task, scores in record["validation"].items():
            train = record["train"][task]
            numbers = [shown(train["loss"]), percent(train["accuracy"]), shown(scores["loss"])]
            numbers += [percent(scores["accuracy"]), shown(scores["macro_f1"])]
            rows.append([str(record["epoch"] + 1), str(record["step"]), task, *numbers])
    header = ["epoch", "step", "task", "train loss", "train accuracy"]
    header += ["validation loss", "validation accuracy", "macro-F1"]
    trained: list[tuple[int, list[str]]] = []
    for record in epochs:
        if not trained or trained[-1][1] != record["trained"]:
            trained.append((record["epoch"] + 1, record["trained"]))
    phases = "\n".join(f"- from epoch {epoch}: {', '.join(groups)}" for epoch, groups in trained)
    return f"## Epochs\n\n{_table(header, rows)}\n\nTrained:\n{phases or '- nothing'}"


def _counts(metrics: TaskMetrics, names: Sequence[str]) -> list[dict[str, Any]]:
    """The confusion matrix without its zeros."""
    return [
        {"true": names[i], "predicted": names[j], "count": count}
        for i, row in enumerate(metrics.confusion)
        for j, count in enumerate(row)
        if count
    ]


def _confusions(name: str, tasks: Mapping[str, TaskMetrics], labels: Mapping[str, tuple[str, ...]]) -> str:
    parts = [f"## Confusion on {name}: rows are true, columns predicted"]
    for task, m in tasks.items():
        names = labels[task]
        if len(names) > LEGIBLE:
            parts.append(f"{task}: {len(names)} classes, see report.json")
            continue
        rows = [[label, *map(str, counts)] for label, counts in zip(names, m.confusion, strict=True)]
        parts.append(_table([task, *names], rows))
    return "\n\n".join(parts)


def draw(
    epochs: list[dict[str, Any]], results: Results, labels: Mapping[str, tuple[str, ...]]
) -> dict[str, bytes]:
    """Curves of each task, with a line where something was unfrozen, and confusion matrices, as PNG files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    files = {}

    def save(figure: Figure, name: str) -> None:
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # of a script the font lacks
            FigureCanvasAgg(figure).print_png(content)
        files[name] = content.getvalue()

    steps = [record["step"] for record in epochs]
    changes = [a["step"] for a, b in pairwise(epochs) if a["trained"] != b["trained"]]
    for task in results["validation"] if epochs else ():
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            for part in ("train", "validation"):
                values = [record[part][task][metric] for record in epochs]
                axes.plot(steps, [float("nan") if v is None else v for v in values], marker="o", label=part)
            for step in changes:
                axes.axvline(
                    step, color="grey", linestyle=":", label="unfrozen" if step == changes[0] else None
                )
            axes.set(xlabel="step", ylabel=metric, title=task)
            axes.legend()
        save(figure, f"curves-{task}.png")
    for name, tasks in results.items():
        for task, m in tasks.items():
            classes = labels[task]
            size = 2.5 + 0.4 * min(len(classes), LEGIBLE)
            figure = Figure(figsize=(size, size), layout="constrained")
            axes = figure.subplots()
            axes.imshow(m.confusion, cmap="Blues")
            if len(classes) <= LEGIBLE:
                dark = max(map(max, m.confusion)) / 2
                for i, row in enumerate(m.confusion):
                    for j, count in enumerate(row):
                        color = "white" if count > dark else "black"
                        axes.text(j, i, str(count), ha="center", va="center", color=color)
                ticks, written = range(len(classes)), [one_line(label)[:LONGEST] for label in classes]
                axes.set_xticks(ticks, written, rotation=45, ha="right", parse_math=False)  # a $ is a $
                axes.set_yticks(ticks, written, parse_math=False)
            axes.set(xlabel="predicted", ylabel="true", title=f"{task}, {name}")
            save(figure, f"confusion-{name}-{task}.png")
    return files
