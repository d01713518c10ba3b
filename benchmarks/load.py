"""Cold start to the first embedding, and peak memory, beside transformers and sentence-transformers.

    python -m benchmarks.load            all-MiniLM-L6-v2 and a bert-base-sized model (needs the test extra)
    python -m benchmarks.load --quick    one round, MiniLM only

Every measurement is a process of its own; the candidates take turns, and what is reported are
medians of the ratios within a round. Peak memory is the process's own high-water mark (VmHWM, so
Linux only), less that of `import torch` in the same round, over the size of the weights file;
every weight has been read once by then.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shared import Rows, print_table, ratio, save_base_size
from weights import resolve

IMPORT_TORCH = "import torch"
MINIBERT = """
from minibert import SentenceEncoder
model = SentenceEncoder.from_pretrained(DIRECTORY)
model.encode(SENTENCE)
"""
TRANSFORMERS = """
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(DIRECTORY), AutoModel.from_pretrained(DIRECTORY)
with torch.no_grad():
    model(**tokenizer(SENTENCE, return_tensors="pt")).last_hidden_state.mean(1)
"""
SENTENCE_TRANSFORMERS = """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(DIRECTORY, device="cpu")
model.encode(SENTENCE)
"""
CANDIDATES = {
    "import torch": IMPORT_TORCH,
    "minibert": MINIBERT,
    "transformers": TRANSFORMERS,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
}
# Mapped weights that nobody has read take no memory. Our `encode` has read and packed all but the embeddings
# (and a pooler), and has given back the memory of the originals.
UNREAD = {"minibert": "model.model.embeddings", "transformers": "model", "sentence-transformers": "model"}
READ = "sum(float(p.sum()) for p in {}.parameters())"
PRINT_PEAK = "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"


def run(code: str, directory: Path) -> str:
    """Runs code in a fresh process and returns what it prints."""
    names = f"DIRECTORY, SENTENCE = {str(directory)!r}, 'The sky is blue and clear today.'\n"
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", names + code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


def seconds(code: str, directory: Path) -> float:
    start = time.perf_counter()
    run(code, directory)
    return time.perf_counter() - start


def peak_bytes(name: str, directory: Path) -> int:
    lines = [CANDIDATES[name], READ.format(UNREAD[name]) if name in UNREAD else "", PRINT_PEAK]
    return int(run("\n".join(lines), directory)) * 1024


def measure(directory: Path, rounds: int) -> Rows:
    """For each candidate the medians over the rounds, against `import torch` of the same round."""
    size = (directory / "model.safetensors").stat().st_size
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    peaks: dict[str, list[int]] = {name: [] for name in CANDIDATES}
    for _ in range(rounds):
        for name, code in CANDIDATES.items():
            peaks[name].append(peak_bytes(name, directory))  # first, since it fills the disk cache
            times[name].append(seconds(code, directory))
    return {
        name: {
            "seconds": statistics.median(times[name]),
            "times import torch": ratio(times[name], times["import torch"]),
            "peak MB": statistics.median(peaks[name]) / 1e6,
            "added / file size": statistics.median(
                (p - base) / size for p, base in zip(peaks[name], peaks["import torch"], strict=True)
            ),
        }
        for name in CANDIDATES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 round, MiniLM only")
    parser.add_argument(
        "--output", type=Path, default=Path("load.json"), help="JSON file (default: %(default)s)"
    )
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else 7
    results = {"all-MiniLM-L6-v2": measure(resolve("all-MiniLM-L6-v2"), rounds)}
    if not arguments.quick:
        with tempfile.TemporaryDirectory() as temporary:
            results["bert-base size"] = measure(save_base_size(Path(temporary) / "base"), rounds)
    for title, rows in results.items():
        print_table(title, rows)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
