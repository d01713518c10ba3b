"""Labelled sentences: files -> examples -> batches.

A file is a table with a column of text and a column of labels per task: .csv, .tsv (where quotes are
part of the text) or .jsonl, in UTF-8. An empty cell is a missing label.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from heads.losses import MISSING
from minibert import Tokenizer
from minibert.text_lines import decoded
from minibert.tokenizer import pad

DEMO = Path(__file__).with_name("demo.csv")
SPLITS = ("train", "validation", "test")
NOTHING = {"nan", "NaN", "N/A", "NA", "<NA>", "null", "NULL", "None"}  # as other programs write it
SAY_WHICH = "say which by --text COLUMN and --task NAME=COLUMN (of a file for one task: --train NAME=FILE)"
POOL = 16  # so many batches' sentences are sorted by length together


class DataError(ValueError):
    """Something is wrong with a data file; the message says where (file and line) and what."""


@dataclass(frozen=True)
class Example:
    """A sentence and the labels it has: task -> label.

    `where` is its file and line, `split` what the file's split column says ("" without one), `source`
    which of several training files it came from.
    """

    text: str
    labels: dict[str, str]
    where: str = ""
    split: str = ""
    source: int = 0


def read_examples(
    path: str | Path, text: str, tasks: Mapping[str, str], *, split: str | None = None, source: int = 0
) -> list[Example]:
    """The examples in a file.

    Args:
        path: a .csv, .tsv or .jsonl file; the first two begin with a line of column names.
        text: the column of text.
        tasks: task -> its column.
        split: the column that says train, validation or test, if the file has it.
        source: noted in each example.

    Raises:
        DataError: not such a file, bytes that are not UTF-8, a ragged row, a missing column, an empty
            text, an unknown split.
    """
    examples = []
    columns: set[str] = set()
    for line, row in _rows(Path(path), [text, *tasks.values()], split):
        where = f"{path}, line {line}"
        columns |= row.keys()
        if text not in row:
            raise DataError(f"{where}: no column {text!r}, there are: {_listed(row)}; {SAY_WHICH}")
        if not row[text].strip():
            raise DataError(f"{where}: the text (column {text!r}) is empty")
        if other := [name for name in row if split and split not in row and name.lower() == split.lower()]:
            raise DataError(f"{where}: the split column is called {other[0]!r}, say so by --split {other[0]}")
        part = row.get(split, "").strip() if split else ""
        if part not in ("", *SPLITS):
            raise DataError(f"{where}: {split} is {part!r}, it must be {', '.join(SPLITS)} or empty")
        labels = {task: label for task, column in tasks.items() if (label := row.get(column, "").strip())}
        examples.append(Example(row[text], labels, where, part, source))
    if not examples:
        raise DataError(f"{path} holds no examples")
    quoted = [each.where for each in examples if len(each.text) > 1 and each.text[0] == each.text[-1] == '"']
    if quoted and Path(path).suffix.lower() == ".tsv":
        warnings.warn(
            f"{quoted[0]}: the quotes around the text belong to it, as in every .tsv: if they should not, "
            "save the file as .csv",
            stacklevel=2,
        )
    for task, column in tasks.items():
        if column not in columns:
            raise DataError(
                f"{path} has no column {column!r} for {task}, it has: {_listed(sorted(columns))}; {SAY_WHICH}"
            )
    return examples


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _rows(path: Path, needed: Sequence[str], split: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number (of a row's first line) and cells by column name; a table must have the `needed` ones."""
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"cannot tell what {path} is: its name must end in .csv, .tsv or .jsonl")
    try:
        with path.open("rb") as file:
            lines = decoded(str(path), file)
            if kind == ".jsonl":
                yield from _json_rows(path, lines, {*needed, split})
            else:
                yield from _table_rows(path, lines, needed)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeError as error:
        raise DataError(str(error)) from error


def _table_rows(
    path: Path, lines: Iterator[str], needed: Sequence[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if repeated := [name for name in names if name and names.count(name) > 1]:
            raise DataError(f"{path}, line 1: two columns are named {repeated[0]!r}")
        separator = "tabs" if path.suffix.lower() == ".tsv" else "commas"
        if len(names) == 1 and names[0] not in needed and (other := re.search("[;\t,|]", names[0])):
            found = f"{path}, line 1: columns are separated by {other[0]!r}"
            raise DataError(f"{found}, in a {path.suffix} it must be by {separator}")
        if names and (missing := [name for name in needed if name not in names]):
            raise DataError(
                f"{path}, line 1: no column {missing[0]!r}, there are: {_listed(names)}; {SAY_WHICH}"
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(names):
                raise DataError(
                    f"{path}, line {line}: {len(cells)} cells, but line 1 names {len(names)} columns"
                )
            if cells:
                yield line, dict(zip(names, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path, lines: Iterator[str], used: set[str | None]) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"it is a {type(row).__name__}")
            cells = {key: _cell(value) if key in used else "" for key, value in row.items()}
            "".join(cells.values()).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path}, line {number}: not valid Unicode, it has a lone surrogate") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not a JSON object ({error})") from error
        except TypeError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        yield number, cells


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, dict | list | float):
        raise TypeError(
            f"{value!r:.40} is neither a string nor an integer nor a boolean, as text and labels must be"
        )
    return value if isinstance(value, str) else json.dumps(value)


def label_names(examples: Sequence[Example], tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every label that occurs, per task, in order: whole numbers by value, else alphabetical.

    Raises:
        DataError: a task with fewer than two labels, from which nothing can be learned.
    """
    names = {}
    for task in tasks:
        found = {example.labels[task] for example in examples if task in example.labels}
        if len(found) < 2:
            has = f"only the label {found.pop()!r}" if found else "no label at all"
            raise DataError(f"the training examples have {has} for {task}: there must be two or more")
        _warn_of_odd_labels(task, found)
        numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
        names[task] = tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))
    return names


def _warn_of_odd_labels(task: str, labels: set[str]) -> None:
    """Warns of a label that another program may have made of an empty cell, and of one spelt in two ways."""
    if missing := sorted(labels & NOTHING):
        warnings.warn(f"{missing[0]!r} is a label of {task}: if it means none, empty the cells", stacklevel=1)
    spelt: dict[str, str] = {}
    for label in sorted(labels):
        other = spelt.setdefault(without_spelling(label).removesuffix(".0"), label)
        if other != label:
            warnings.warn(
                f"{other!r} and {label!r} are two labels of {task}: write them in one way if they are one",
                stacklevel=1,
            )
            return


def without_spelling(text: str) -> str:
    """The same for texts that differ in capitals and spaces only."""
    return " ".join(text.lower().split())


def stratified_split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(rest, held out): `fraction` of each combination of labels and file, as nearly as can be, one at least.

    Keeps the order, and something of every label in the rest. A text that comes several times, as with a
    file or a row for each task, is held out everywhere or nowhere, with other spaces and capitals, too.
    The same examples are always split alike, or a run that goes on from another would validate on what that
    one was trained on.

    Raises:
        DataError: too few examples to hold one out and keep one.
    """
    together: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        together[without_spelling(example.text)].append(index)
    strata: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
    for group in together.values():
        kinds = (part for i in group for part in (examples[i].source, *sorted(examples[i].labels.items())))
        strata[tuple(kinds)].append(group)
    generator = torch.Generator().manual_seed(0)
    # Largest remainders: each stratum gives its share rounded down; those that lost most by it give one more.
    shares = {key: fraction * len(groups) for key, groups in strata.items()}
    keys = sorted(strata, key=repr)
    keys = [keys[i] for i in torch.randperm(len(keys), generator=generator).tolist()]
    keys.sort(key=lambda key: int(shares[key]) - shares[key])
    one_more = max(1, round(fraction * len(together))) - sum(map(int, shares.values()))
    rest = Counter(label for example in examples for label in example.labels.items())
    held: set[int] = set()
    for rank, key in enumerate(keys):
        order = torch.randperm(len(strata[key]), generator=generator).tolist()
        for i in order[: int(shares[key]) + (rank < one_more)]:
            group = strata[key][i]
            labels = Counter(label for index in group for label in examples[index].labels.items())
            if all(rest[label] > count for label, count in labels.items()):  # none may lose its last one
                rest.subtract(labels)
                held.update(group)
    if not held:
        once = list(rest.values()).count(1)
        raise DataError(
            f"none of {len(together)} different texts can be held out, {once} of {len(rest)} labels come only "
            "once: give a validation file, or another column of labels"
        )
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def dummy_examples(count: int, tasks: Mapping[str, Sequence[str]], seed: int) -> list[Example]:
    """Random words with random labels: nothing can be learned from them, but every part of the loop runs."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    words = "the a red old small river dog sees opens table and under green seven letter".split()
    return [
        Example(
            " ".join(choose(words) for _ in range(3 + int(torch.randint(12, (), generator=generator)))),
            {task: choose(labels) for task, labels in tasks.items()},
            where=f"dummy {index}",
        )
        for index in range(count)
    ]


def fingerprint(examples: Sequence[Example]) -> str:
    """The sha256 of texts, labels and order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.text, sorted(example.labels.items()), example.source)).encode())
    return digest.hexdigest()


class SentenceDataset:
    """Sentences, tokenized once, and their labels as class indices.

    `ids[i]` the tokens of sentence i; `labels[task]` (n,), `MISSING` where there is none. Once
    heads/features.py has filled `features`, of `depth` layers, batches hold these instead of tokens.

    Raises:
        DataError: a label that is not among `labels`; says where.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Tokenizer, labels: Mapping[str, Sequence[str]]
    ) -> None:
        self.ids = tokenizer.token_ids([example.text for example in examples])
        self.pad_token_id = tokenizer.pad_token_id
        self.sources = [example.source for example in examples]
        self.labels = {
            task: torch.tensor([_class_index(example, task, names) for example in examples])
            for task, names in labels.items()
        }
        self.forget_features()

    def forget_features(self) -> None:
        """Back to batches of tokens."""
        self.features: list[Tensor] | None = None
        self.depth: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def has_labels(self, task: str) -> bool:
        """Whether any sentence has a label for this task."""
        return bool((self.labels[task] != MISSING).any())

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: `attention_mask` (B, T), `labels.TASK` (B,), and `input_ids` (B, T) or `features`."""
        rows = [self.ids[i] for i in indices]
        batch = {f"labels.{task}": labels[list(indices)] for task, labels in self.labels.items()}
        batch["attention_mask"] = pad([[1] * len(row) for row in rows], 0)
        if self.features is None:
            batch["input_ids"] = pad(rows, self.pad_token_id)
        else:  # (T, H) each, or (H,) each
            batch["features"] = torch.nn.utils.rnn.pad_sequence(
                [self.features[i] for i in indices], batch_first=True
            )
        return batch


def _class_index(example: Example, task: str, names: Sequence[str]) -> int:
    label = example.labels.get(task)
    if label is None:
        return MISSING
    if label not in names:
        raise DataError(f"{example.where}: {task} is {label!r}, the known labels are {_listed(names)}")
    return names.index(label)


def epoch_batches(
    dataset: SentenceDataset,
    epoch: int,
    *,
    seed: int,
    batch_size: int,
    batch_tokens: int | None = None,
    uniform: bool = False,
) -> list[list[int]]:
    """The batches of one epoch, as indices into the dataset; the same for the same seed and epoch.

    Sentences are shuffled, sorted by length among the next `POOL` batches' worth, cut into batches, and
    the batches shuffled, so that little is padded and no order is learned.

    Args:
        batch_size: sentences in a batch.
        batch_tokens: cut batches by this many tokens, padding included, instead.
        uniform: draw equally often from each training file, whatever its size; a small file's sentences
            come again, of a large one's some have to wait.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if uniform:
        order = _evenly(order, dataset.sources, generator)
    lengths = [len(ids) for ids in dataset.ids]
    pool = POOL * batch_size
    if batch_tokens is not None:
        pool = max(1, POOL * batch_tokens * len(lengths) // sum(lengths))
    batches = []
    for start in range(0, len(order), pool):
        together = sorted(order[start : start + pool], key=lengths.__getitem__)  # stable
        if batch_tokens is None:
            batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
        else:
            batches += _by_tokens(together, lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _evenly(order: Sequence[int], sources: Sequence[int], generator: torch.Generator) -> list[int]:
    by_source: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_source[sources[index]].append(index)
    share = -(-len(order) // len(by_source))
    mixed = [index for _, members in sorted(by_source.items()) for index in islice(cycle(members), share)]
    return [mixed[i] for i in torch.randperm(len(mixed), generator=generator).tolist()]


def _by_tokens(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cuts sentences sorted by length so that no batch, padded, exceeds the budget (but for a single one)."""
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
