"""TREC-6 and SST-2 as files for train.py, and what logistic regression makes of the same embeddings.

    python -m benchmarks.public_sets DATA OUT

DATA holds trec/train_5500.label, trec/TREC_10.label, sst2/train.tsv, sst2/dev.tsv and sst2/test.tsv as
published (see docs/results.md). OUT gets a .csv per set, with the columns text and label. A tenth of TREC's
training set, stratified, becomes its validation set.
"""

import argparse
import csv
from pathlib import Path

from sklearn.linear_model import LogisticRegression

from heads.data import stratified_split
from heads.tables import Example
from minibert import SentenceEncoder

Rows = list[tuple[str, str]]


def read_trec(path: Path) -> Rows:
    lines = path.read_text(encoding="latin-1").splitlines()
    pairs = [line.split(" ", 1) for line in lines]
    return [(text, kind.split(":")[0]) for kind, text in pairs]


def read_sst2(path: Path) -> Rows:
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.rsplit("\t", 1) for line in lines if line]
    return [(text, ("negative", "positive")[int(label)]) for text, label in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="directory with sst2/ and trec/")
    parser.add_argument("out", type=Path, help="directory for the .csv files")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="whose embeddings (default: %(default)s)")
    arguments = parser.parse_args()
    whole = [
        Example(text, {"trec": label}) for text, label in read_trec(arguments.data / "trec/train_5500.label")
    ]
    train, validation = ([(e.text, e.labels["trec"]) for e in part] for part in stratified_split(whole, 0.1))
    sets = {
        "trec": {
            "train": train,
            "validation": validation,
            "test": read_trec(arguments.data / "trec/TREC_10.label"),
        },
        "sst2": {
            name: read_sst2(arguments.data / f"sst2/{file}.tsv")
            for name, file in (("train", "train"), ("validation", "dev"), ("test", "test"))
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    encoder = SentenceEncoder.from_pretrained(arguments.model)
    for task, parts in sets.items():
        embeddings = {}
        for name, rows in parts.items():
            with (arguments.out / f"{task}_{name}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("text", "label"), *rows])
            embeddings[name] = encoder.encode([text for text, _ in rows], normalize_embeddings=False)
        print(f"{task}: {', '.join(f'{len(rows):,} {name}' for name, rows in parts.items())}")
        best = max(
            (
                LogisticRegression(C=c, max_iter=2000).fit(embeddings["train"], [y for _, y in parts["train"]])
                for c in (0.1, 1.0, 10.0, 100.0)
            ),
            key=lambda model: model.score(embeddings["validation"], [y for _, y in parts["validation"]]),
        )
        for name in ("validation", "test"):
            accuracy = best.score(embeddings[name], [y for _, y in parts[name]])
            print(f"  logistic regression (C={best.C:g}, best on validation), {name}: {accuracy:.1%}")


if __name__ == "__main__":
    main()
