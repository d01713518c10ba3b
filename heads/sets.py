"""Which sentences a run trains on, validates on and tests on."""

import warnings
from pathlib import Path

from heads.data import dummy_examples, normalized, stratified_split
from heads.options import Options
from heads.tables import DEMO, SPLITS, DataError, Example, read_examples
from weights.safetensors_files import HEADS


def read_sets(options: Options) -> tuple[dict[str, list[Example]], list[str]]:
    """The examples of train, validation and test, and the names of the tasks.

    Raises:
        DataError: a file that cannot be used, a set given twice, none for training, too few to hold some out.
    """
    tasks = options.pairs("task")
    if options.train or options.validation or options.test:
        sets = {name: read_files(options, name, tasks) for name in SPLITS}
        if options.split != Options.split and not any(e.split for some in sets.values() for e in some):
            raise DataError(f"--split {options.split}: no row of any file has something in that column")
    elif options.data == "demo":
        tasks = {"type": "type", "sentiment": "sentiment"}
        sets = {"train": read_examples(DEMO, "text", tasks)}
    else:
        labels = {"type": ("question", "news", "statement"), "sentiment": ("negative", "neutral", "positive")}
        tasks = {name: name for name in labels}
        sets = {"train": dummy_examples(400, labels, options.seed)}
    whole = sets["train"]
    for name in ("validation", "test"):
        marked = [example for example in whole if example.split == name]
        given = sets.get(name, [])
        if marked and given:
            raise DataError(f"{marked[0].where} is marked {name}, but --{name} is given too: use one of them")
        sets[name] = marked or given
    sets["train"] = [example for example in whole if example.split in ("", "train")]
    if sets["train"] and not sets["validation"]:
        sets["train"], sets["validation"] = stratified_split(sets["train"], options.validation_fraction)
        if options.train and (Path(options.model) / HEADS).is_file() and not options.resume:
            warnings.warn(
                f"validation is drawn from the training file: {options.model} has seen some of it unless file, "
                "tasks and --validation-fraction were the same; a column named split can mark its rows",
                stacklevel=1,
            )
    if not sets["train"] and not options.eval_only:
        raise DataError("there is no sentence for train")
    _warn_of_seen(sets)
    return {name: examples for name, examples in sets.items() if examples}, list(tasks)


def read_files(options: Options, name: str, tasks: dict[str, str]) -> list[Example]:
    """One set from its files: FILE holds all tasks, TASK=FILE one.

    Of a file for validation or test its rows are those so marked or, if none is, those without a mark.
    """
    examples = []
    for source, given in enumerate(getattr(options, name)):
        task, equals, path = given.partition("=")
        if not equals or Path(given).exists():
            path, columns = given, tasks
            _warn_of_shared_columns(name, path, tasks)
        elif task in tasks:
            columns = {task: tasks[task]}
        else:
            raise DataError(f"--{name} {given}: there is no task {task!r}, --task names {', '.join(tasks)}")
        rows = read_examples(path, options.text, columns, split=options.split, source=source)
        if name != "train":
            first = rows[0]
            rows = [row for row in rows if row.split == name] or [row for row in rows if row.split == ""]
            if not rows:
                raise DataError(f"--{name}: {first.where} is marked {first.split}, and no row {name}")
        examples += rows
    return examples


def _warn_of_shared_columns(name: str, path: str, tasks: dict[str, str]) -> None:
    """Warns where a file of all tasks gives two of them the same labels: it may be a file of one of them."""
    first: dict[str, str] = {}
    for task, column in tasks.items():
        if (other := first.setdefault(column, task)) != task:
            warnings.warn(
                f"--{name} {path}: {other} and {task} both take their labels from its column {column!r}: "
                f"if it is a file for one of them, say --{name} {other}={path}",
                stacklevel=1,
            )
            return


def _warn_of_seen(sets: dict[str, list[Example]]) -> None:
    """Warns where validation or test has texts that are trained on."""
    trained = {normalized(example.text) for example in sets["train"]}
    for name in ("validation", "test"):
        if seen := [example for example in sets[name] if normalized(example.text) in trained]:
            warnings.warn(
                f"{len(seen)} of {len(sets[name])} {name} sentences are among those for training, too (the "
                f"first: {seen[0].where}): what comes out on them says little of new ones",
                stacklevel=1,
            )
