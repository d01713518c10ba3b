"""What several benchmarks need: a model of bert-base's size, ratios and tables."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from minibert import BertConfig, BertModel, SentenceEncoder, Tokenizer

Rows = dict[str, dict[str, float]]

FORMATS = {"seconds": ".3f", "max difference": ".1e", "min cosine": ".6f"}  # of columns; else two decimals
FORMATS |= dict.fromkeys(("tokens/s", "GFLOP/s", "TFLOP/s", "% of square", "identical", "of"), ",.0f")
FORMATS |= dict.fromkeys(("added MB", "peak MB", "exact MB", "fast MB", "padded MB"), ",.0f")


def save_base_size(directory: Path) -> Path:
    """Random weights in bert-base-uncased's shape, with its vocabulary."""
    SentenceEncoder(BertModel(BertConfig()), Tokenizer.from_pretrained("all-MiniLM-L6-v2")).save_pretrained(
        directory
    )
    return directory


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def print_table(title: str, rows: Rows) -> None:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    width = max(map(len, columns)) + 2
    print(f"\n{title}\n{'':22}" + "".join(f"{column:>{width}}" for column in columns))
    for name, row in rows.items():
        cells = (format(row[c], FORMATS.get(c, ",.2f")) if c in row else "" for c in columns)
        print(f"{name:22}" + "".join(f"{cell:>{width}}" for cell in cells), flush=True)
