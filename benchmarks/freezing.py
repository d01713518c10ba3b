"""What each freezing strategy costs, beside the same loop written with transformers.

    python -m benchmarks.freezing            all-MiniLM-L6-v2 and a bert-base-sized model: half an hour
    python -m benchmarks.freezing --quick    one round on 32 sentences, MiniLM only

Both train two heads for 5 epochs on the first sentences of heads/demo.csv, in the same batches of 16,
without validation or saving. Every run is a process of its own (its peak memory is VmHWM, so Linux only);
ours and transformers' take turns, and what is reported are medians, and medians of the ratios within a
round. The time is the loop's: ours includes computing what frozen layers give, theirs tokenizing batches.
"""

import argparse
import contextlib
import csv
import importlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.load import save_base_size
from heads.data import DEMO, SentenceDataset, epoch_batches, label_names, read_examples
from minibert import Tokenizer
from weights import resolve

TASKS = {"type": "type", "sentiment": "sentiment"}
EPOCHS = 5
BATCH_SIZE = 16


def ours(directory: Path, data: Path, strategy: str) -> float:
    """The seconds that train.py's loop takes."""
    import train
    from heads.metrics import TaskMetrics
    from heads.run_directory import RunDirectory

    importlib.import_module("torch._dynamo")  # else by the first optimizer; transformers imports it earlier
    seconds = []
    loop = train.train

    def timed(*arguments: Any) -> None:
        start = time.perf_counter()
        loop(*arguments)
        seconds.append(time.perf_counter() - start)

    train.train = timed  # type: ignore[assignment]
    nothing = {task: TaskMetrics(0.0, 0.0, 0.0, []) for task in TASKS}
    train.evaluate = lambda *_: nothing  # type: ignore[attr-defined]
    RunDirectory.save = lambda *_: None  # type: ignore[method-assign]
    command = f"--model {directory} --train {data} --task type=type --task sentiment=sentiment"
    command += f" --freeze {strategy} --epochs {EPOCHS} --batch-size {BATCH_SIZE} --output {data.parent}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        train.main(command.split())  # ends in an error, since no best/ was saved
    if not seconds:
        raise RuntimeError(errors.getvalue())
    return seconds[0]


def theirs(directory: Path, data: Path, strategy: str) -> float:
    """The seconds that the loop in transformers takes."""
    from transformers import AutoTokenizer

    from benchmarks.transformers_loop import TransformersMultiTask, train_with_transformers

    examples = [e for e in read_examples(data, "text", TASKS, split="split") if e.split == "train"]
    names = label_names(examples, list(TASKS))
    dataset = SentenceDataset(examples, Tokenizer.from_pretrained(directory), names)
    loop = train_with_transformers(
        TransformersMultiTask(directory, [3, 3], seed=0),
        AutoTokenizer.from_pretrained(directory),
        [example.text for example in examples],
        dataset.labels,
        [epoch_batches(dataset, epoch, seed=0, batch_size=BATCH_SIZE) for epoch in range(EPOCHS)],
        spec=strategy,
        lr=5e-5,
        head_lr=1e-3,
    )
    start = time.perf_counter()
    for _ in loop:
        pass
    return time.perf_counter() - start


def worker(who: str, directory: Path, strategy: str, sentences: int) -> None:
    """Prints what one run took."""
    with DEMO.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    train = [row for row in rows if row[-1] == "train"][:sentences]
    validation = next(row for row in rows if row[-1] == "validation")
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.csv"
        with data.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *train, validation])
        seconds = (ours if who == "minibert" else theirs)(directory, data, strategy)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"seconds per epoch": seconds / EPOCHS, "peak MB": int(peak.split()[1]) * 1024 / 1e6}))


def run(*arguments: object) -> dict[str, float]:
    """A worker in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.freezing", "--worker", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(directory: Path, strategies: list[str], sentences: int, rounds: int) -> dict[str, dict[str, float]]:
    """For each strategy the medians over the rounds."""
    from heads import MLPHead, MultiTaskModel
    from minibert import BertModel
    from minibert.freezing import FreezePlan, named_groups

    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(rounds):
        for strategy in strategies:
            for who in ("minibert", "transformers"):
                runs.setdefault((strategy, who), []).append(run(who, directory, strategy, sentences))
                print(".", end="", flush=True, file=sys.stderr)
    encoder = BertModel.from_pretrained(directory)
    hidden = encoder.config.hidden_size
    model = MultiTaskModel(encoder, {"type": MLPHead(hidden, 256, 3), "sentiment": MLPHead(hidden, 128, 3)})
    sizes = {name: sum(p.numel() for p in group.parameters()) for name, group in named_groups(model).items()}
    table = {}
    for strategy in strategies:
        mine, other = runs[strategy, "minibert"], runs[strategy, "transformers"]
        trained = FreezePlan.parse(strategy).trained(model, EPOCHS - 1)
        table[strategy] = {
            "trained M": sum(sizes[name] for name in trained) / 1e6,
            "s/epoch": statistics.median(r["seconds per epoch"] for r in mine),
            "transformers": statistics.median(r["seconds per epoch"] for r in other),
            "ratio": statistics.median(
                a["seconds per epoch"] / b["seconds per epoch"] for a, b in zip(mine, other, strict=True)
            ),
            "of none": statistics.median(
                a["seconds per epoch"] / b["seconds per epoch"]
                for a, b in zip(mine, runs["none", "minibert"], strict=True)
            ),
            "peak MB": statistics.median(r["peak MB"] for r in mine),
            "transformers MB": statistics.median(r["peak MB"] for r in other),
        }
    return table


def print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n{'':16}" + "".join(f"{column:>17}" for column in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[column]:17.2f}" for column in columns))


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        who, directory, strategy, sentences = sys.argv[2:]
        worker(who, Path(directory), strategy, int(sentences))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 round, 32 sentences, MiniLM only")
    parser.add_argument(
        "--output", type=Path, default=Path("freezing.json"), help="JSON file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    small = resolve("all-MiniLM-L6-v2")
    if arguments.quick:
        results = {"all-MiniLM-L6-v2": measure(small, ["none", "backbone"], 32, 1)}
    else:
        strategies = ["none", "head:sentiment", "layers:3", "gradual", "backbone"]
        results = {"all-MiniLM-L6-v2": measure(small, strategies, 192, 3)}
        with tempfile.TemporaryDirectory() as temporary:
            strategies = ["none", "head:sentiment", "layers:6", "gradual", "backbone"]
            base = save_base_size(Path(temporary) / "base")
            results["bert-base size"] = measure(base, strategies, 64, 3)
    for title, rows in results.items():
        print_table(f"{title}, {torch.get_num_threads()} threads", rows)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
