"""The first steps of train.py and of the same loop in transformers, on real sentences: are the losses the same?

    python -m benchmarks.same_losses SETS    # what public_sets.py wrote

Both start from the same weights and seed, see the same batches, and have dropout on. Exits with 1 if any
bit differs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

import train
from benchmarks.transformers_loop import TransformersMultiTask, train_with_transformers
from heads.data import SentenceDataset, epoch_batches, label_names
from heads.tables import read_examples
from minibert import Tokenizer
from weights import resolve

TASKS = ("trec", "sst2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, help="directory with what benchmarks.public_sets wrote")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument(
        "--freeze", nargs="*", default=["none", "backbone", "layers:3"], help="plans to compare"
    )
    arguments = parser.parse_args()
    examples = [
        example
        for source, task in enumerate(TASKS)
        for example in read_examples(
            arguments.sets / f"{task}_train.csv", "text", {task: "label"}, source=source
        )
    ]
    directory = resolve(arguments.model)
    labels = label_names(examples, TASKS)
    dataset = SentenceDataset(examples, Tokenizer.from_pretrained(directory), labels)
    batches = epoch_batches(dataset, 0, seed=1, batch_size=32)[: arguments.steps]
    same = True
    for strategy in arguments.freeze:
        with tempfile.TemporaryDirectory() as run:
            command = ["--model", str(directory), "--freeze", strategy, "--steps", str(arguments.steps)]
            command += [*"--batch-size 32 --lr 1e-4 --head-lr 1e-3 --seed 1 --output".split(), run]
            for task in TASKS:
                command += ["--task", f"{task}=label", "--train", f"{task}={arguments.sets}/{task}_train.csv"]
                command += ["--validation", f"{task}={arguments.sets}/{task}_validation.csv"]
            if status := train.main(command):
                return status
            lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
        ours = [record["losses"] for record in map(json.loads, lines) if "losses" in record]
        reference = train_with_transformers(
            TransformersMultiTask(directory, [len(names) for names in labels.values()], seed=1),
            AutoTokenizer.from_pretrained(directory),
            [example.text for example in examples],
            dataset.labels,
            [batches],
            spec=strategy,
            lr=1e-4,
            head_lr=1e-3,
        )
        theirs = list(reference)
        equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
        same &= equal == len(theirs)
        print(f"\n{strategy}: the losses of both tasks are bit-identical in {equal} of {len(theirs)} steps")
        print(f"  first {theirs[0]}, last {theirs[-1]}\n", flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
