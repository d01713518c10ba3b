"""Labelled sentences in files.

A file is a table with a column of text and a column of labels per task: .csv, .tsv (where quotes are
part of the text) or .jsonl, in UTF-8. An empty cell is a missing label.
"""

import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minibert.text_lines import decoded

DEMO = Path(__file__).with_name("demo.csv")
SPLITS = ("train", "validation", "test")
SAY_WHICH = "say which by --text COLUMN and --task NAME=COLUMN (of a file for one task: --train NAME=FILE)"

CSV_ERRORS = {  # what csv says: what we say
    "unexpected end of data": "a quote is opened and not closed",
    "expected after": "something follows a cell's closing quote (inside a cell quotes are written twice)",
    "new-line character": "a carriage return stands alone: save the file with LF or CRLF at the end of lines",
}


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
    path: str | Path, text: str, tasks: Mapping[str, str], *, split: str = "split", source: int = 0
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
            raise DataError(f"{where}: no column {text!r}, there are: {listed(row)}; {SAY_WHICH}")
        if not row[text].strip():
            raise DataError(f"{where}: the text (column {text!r}) is empty")
        if other := [name for name in row if split not in row and name.lower() == split.lower()]:
            raise DataError(f"{where}: the split column is called {other[0]!r}, say so by --split {other[0]}")
        part = row.get(split, "").strip()
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
                f"{path} has no column {column!r} for {task}, it has: {listed(sorted(columns))}; {SAY_WHICH}"
            )
    return examples


def listed(names: Iterable[str]) -> str:
    """For a message: `a, b, c`, with what cannot be printed escaped."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _rows(path: Path, needed: Sequence[str], split: str) -> Iterator[tuple[int, dict[str, str]]]:
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
        separator, reader = "tabs", csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        separator, reader = "commas", csv.reader(lines, strict=True)
    line = 1
    try:
        names = [name.strip() for name in next(reader, [])]
        if repeated := [name for name in names if name and names.count(name) > 1]:
            raise DataError(f"{path}, line 1: two columns are named {repeated[0]!r}")
        if len(names) == 1 and names[0] not in needed and (other := re.search("[;\t,|]", names[0])):
            found = f"{path}, line 1: columns are separated by {other[0]!r}"
            raise DataError(f"{found}, in a {path.suffix} it must be by {separator}")
        if names and (missing := [name for name in needed if name not in names]):
            raise DataError(
                f"{path}, line 1: no column {missing[0]!r}, there are: {listed(names)}; {SAY_WHICH}"
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
        reason = next((ours for theirs, ours in CSV_ERRORS.items() if theirs in str(error)), str(error))
        end = f" (line {reader.line_num} still belongs to it)" if reader.line_num > line else ""
        raise DataError(f"{path}, line {line}{end}: {reason}") from error


def _json_rows(path: Path, lines: Iterator[str], used: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
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
