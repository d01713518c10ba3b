"""What full fine-tuning and each freezing strategy cost, beside the same loop written with transformers.

    python -m benchmarks.train_step            short and mixed texts, MiniLM and bert-base size: an hour
    python -m benchmarks.train_step --quick    one round on 32 short sentences, MiniLM only

All train two heads for 5 epochs on the same sentences in batches of 16, without validation or saving:
train.py, exact and with --fast, whose batches are of similar lengths; the transformers loop in those very
batches, and in shuffled ones, which is what such a loop usually does ("padded"). Every run is a process of
its own (its peak memory is VmHWM, so Linux only); they take turns, and what is reported are medians, and
medians of the ratios within a round. The time is the loop's: ours includes computing what frozen layers
give, theirs tokenizing batches.
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
from functools import partial
from pathlib import Path
from typing import Any

import torch

import heads.data
from benchmarks.encode import make_texts
from benchmarks.shared import Rows, print_table, ratio, save_base_size
from heads.data import SentenceDataset, epoch_batches, label_names
from heads.tables import DEMO, read_examples
from minibert import Tokenizer
from weights import resolve

TASKS = {"type": "type", "sentiment": "sentiment"}
EPOCHS = 5
BATCH_SIZE = 16


def ours(directory: Path, data: Path, strategy: str, options: str) -> float:
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
    command += (
        f" --freeze {strategy} --epochs {EPOCHS} --batch-size {BATCH_SIZE} --output {data.parent}{options}"
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        train.main(command.split())  # ends in an error, since no best/ was saved
    if not seconds:
        raise RuntimeError(errors.getvalue())
    return seconds[0]


def theirs(directory: Path, data: Path, strategy: str, *, shuffled: bool) -> float:
    """The seconds that the loop in transformers takes."""
    from transformers import AutoTokenizer

    from benchmarks.transformers_loop import TransformersMultiTask, train_with_transformers

    examples = [e for e in read_examples(data, "text", TASKS) if e.split == "train"]
    names = label_names(examples, list(TASKS))
    tokenizer = Tokenizer.from_pretrained(directory)
    dataset = SentenceDataset(examples, tokenizer, names)
    their_tokenizer = AutoTokenizer.from_pretrained(directory)
    their_tokenizer.model_max_length = tokenizer.max_length  # it says 512 where the model's own limit is 256
    epochs = [epoch_batches(dataset, epoch, seed=0, batch_size=BATCH_SIZE) for epoch in range(EPOCHS)]
    if shuffled:
        orders = [torch.randperm(len(dataset)).tolist() for _ in range(EPOCHS)]
        epochs = [[order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)] for order in orders]
    loop = train_with_transformers(
        TransformersMultiTask(directory, [3, 3], seed=0),
        their_tokenizer,
        [example.text for example in examples],
        dataset.labels,
        epochs,
        spec=strategy,
        lr=5e-5,
        head_lr=1e-3,
    )
    start = time.perf_counter()
    for _ in loop:
        pass
    return time.perf_counter() - start


LOOPS = {
    "exact": partial(ours, options=""),
    "fast": partial(ours, options=" --fast"),
    "same batches": partial(theirs, shuffled=False),
    "padded": partial(theirs, shuffled=True),
}


def worker(loop: str, directory: Path, strategy: str, corpus: str, sentences: int) -> None:
    """Prints what one run took."""
    heads.data.POOLS = 1  # few sentences are batched as many are: sorted by length
    with DEMO.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    train = [row for row in rows if row[-1] == "train"]
    validation = next(row for row in rows if row[-1] == "validation")
    if corpus == "mixed":
        words = [word for row in train for word in row[0].split()]
        texts = make_texts(words, "mixed", sentences)
        train = [[text, *row[1:]] for text, row in zip(texts, train, strict=False)]
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data.csv"
        with data.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *train[:sentences], validation])
        seconds = LOOPS[loop](directory, data, strategy)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"seconds": seconds / EPOCHS, "MB": int(peak.split()[1]) * 1024 / 1e6}))


def run(*arguments: object) -> dict[str, float]:
    """A worker in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", "--worker", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(directory: Path, strategies: list[str], corpus: str, sentences: int, rounds: int) -> Rows:
    """For each strategy the medians over the rounds: seconds per epoch, ratios, peak memory."""
    table = {}
    for strategy in strategies:
        runs: dict[str, list[dict[str, float]]] = {loop: [] for loop in LOOPS}
        for _ in range(rounds):
            for loop, results in runs.items():
                results.append(run(loop, directory, strategy, corpus, sentences))
                print(".", end="", flush=True, file=sys.stderr)
        seconds = {loop: [result["seconds"] for result in results] for loop, results in runs.items()}
        table[strategy] = {
            **{loop: statistics.median(each) for loop, each in seconds.items()},
            "same/exact": ratio(seconds["same batches"], seconds["exact"]),
            "padded/exact": ratio(seconds["padded"], seconds["exact"]),
            "same/fast": ratio(seconds["same batches"], seconds["fast"]),
            "padded/fast": ratio(seconds["padded"], seconds["fast"]),
            **{
                f"{loop} MB": statistics.median(result["MB"] for result in runs[loop])
                for loop in ("exact", "fast", "padded")
            },
        }
    return table


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        loop, directory, strategy, corpus, count = sys.argv[2:]
        worker(loop, Path(directory), strategy, corpus, int(count))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 round, 32 short sentences, MiniLM only")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--sentences",
        type=int,
        default=192,
        metavar="N",
        help="(default: %(default)s; of bert-base size a quarter)",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("train_step.json"), help="JSON file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not 64 <= arguments.sentences <= 360:
        parser.error(
            f"--sentences is {arguments.sentences}, it must be 64 to 360, as many as heads/demo.csv has"
        )
    small, count, rounds = resolve("all-MiniLM-L6-v2"), arguments.sentences, arguments.rounds
    results = {}
    print(f"seconds per epoch, how many times faster, peak memory; {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.quick:
            runs = {"all-MiniLM-L6-v2, short": (small, ["none"], "short", 32, 1)}
        else:
            base = save_base_size(Path(temporary) / "base")
            strategies = ["none", "head:sentiment", "layers:3", "gradual", "backbone"]
            runs = {
                "all-MiniLM-L6-v2, mixed": (small, strategies, "mixed", count, rounds),
                "all-MiniLM-L6-v2, short": (small, strategies, "short", count, rounds),
                "bert-base size, mixed": (base, ["none", "layers:6", "backbone"], "mixed", count // 4, rounds),
            }
        for title, settings in runs.items():
            results[title] = measure(*settings)
            print_table(title, results[title])
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
