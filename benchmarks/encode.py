"""How fast encode is, beside other libraries and beside what the processor can do.

    python -m benchmarks.encode            all-MiniLM-L6-v2 and a bert-base-sized model: 20 to 25 minutes
    python -m benchmarks.encode --quick    a 32nd of the texts, 2 rounds, MiniLM only: to see that it runs

The contenders take turns in one process; reported are medians, and medians of the ratios within a round
(2 is twice as long as ours). transformers and sentence-transformers come with the test extra; ONNX Runtime
needs onnxruntime and onnx. What is not installed is left out. The model has to pool by the mean.

The texts are random words. "% of products" is the useful arithmetic (nothing for padding) over the time, as
a share of the rate at which oneDNN multiplies by the model's own matrices, in that round and dtype.
"""

import argparse
import csv
import importlib
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shared import Rows, print_table, ratio, save_base_size
from heads.tables import DEMO
from minibert import BertConfig, SentenceEncoder, Tokenizer
from minibert.onednn import packs_weights
from minibert.tokenizer import pad
from weights import resolve

Encode = Callable[[list[str]], Any]  # texts -> (n, H), a tensor or an array

FLOAT32, BFLOAT16 = "ours float32", "ours bfloat16"
ST, ONNX = "sentence-transformers", "ONNX"
BATCH_SIZES = (8, 32)  # of ONNX Runtime
PRODUCTS = {  # name -> dtype, and whether the weights are in oneDNN's own layout
    "oneDNN float32": (torch.float32, True),
    "oneDNN bfloat16": (torch.bfloat16, True),
    "F.linear float32": (torch.float32, False),
}
PRODUCT_ROWS, PRODUCT_REPEATS = 2048, 5
COUNTS = {"short": 1024, "mixed": 320, "long": 32}
WORDS: dict[str, Callable[[random.Random], float]] = {  # how many a text has; short as in SST-2
    "short": lambda rng: min(50, rng.lognormvariate(math.log(17), 0.6)),
    "mixed": lambda rng: min(700, rng.lognormvariate(math.log(55), 1.0)),
    "long": lambda rng: rng.uniform(400, 700),
}
REST = 0.05  # seconds before each measurement: ONNX Runtime's idle threads spin, and slow what runs next
SENTENCE = "The sky is blue and clear today."
PEAK_MEMORY = """
import json, sys
import numpy, tokenizers, torch
from minibert import SentenceEncoder

def kilobytes(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))

directory, dtype = sys.argv[1:]
texts = json.load(sys.stdin)
before = kilobytes("VmRSS")
SentenceEncoder.from_pretrained(directory, dtype=getattr(torch, dtype, None)).encode(texts)
print(1024 * (kilobytes("VmHWM") - before))  # ru_maxrss can be that of the process that started this one
"""


def read_words() -> list[str]:
    with DEMO.open(encoding="utf-8", newline="") as file:
        return [word for row in csv.DictReader(file) for word in row["text"].split()]


def make_texts(words: Sequence[str], kind: str, count: int) -> list[str]:
    """Random words; always the same ones."""
    rng = random.Random(0)
    return [" ".join(rng.choices(words, k=max(1, round(WORDS[kind](rng))))) for _ in range(count)]


def linear_operations(config: BertConfig, tokens: int) -> int:
    """In one layer."""
    hidden, wide = config.hidden_size, config.intermediate_size
    return 2 * tokens * (4 * hidden * hidden + 2 * hidden * wide)


def operations(config: BertConfig, lengths: Sequence[int]) -> int:
    """In the Linears and the attention of all layers, for texts of so many tokens."""
    attention = 4 * config.hidden_size * sum(length * length for length in lengths)
    return config.num_hidden_layers * (linear_operations(config, sum(lengths)) + attention)


def products(
    config: BertConfig, dtype: torch.dtype, packed: bool, rows: int = PRODUCT_ROWS, device: str = "cpu"
) -> Callable[[], object]:
    """Multiplies by a layer's matrices, query, key and value as one."""
    hidden, wide = config.hidden_size, config.intermediate_size
    calls: list[Callable[[], Tensor]] = []
    for ins, outs in ((hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)):
        shapes = ((rows, ins), (outs, ins), (outs,))
        x, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
        if packed and packs_weights(weight):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
            calls.append(partial(torch.ops.mkldnn._linear_pointwise, x, weight, bias, "none", [], "none"))
        else:
            calls.append(partial(F.linear, x, weight, bias))
    return lambda: [call().shape for _ in range(PRODUCT_REPEATS) for call in calls]


def ours(directory: Path, limit: int) -> dict[str, Encode]:
    found: dict[str, Encode] = {}
    for name, dtype in ((FLOAT32, None), (BFLOAT16, torch.bfloat16)):
        encoder = SentenceEncoder.from_pretrained(directory, dtype=dtype)
        encoder.tokenizer.max_length = limit
        found[name] = encoder.encode
    return found


def sentence_transformers(directory: Path, limit: int) -> dict[str, Encode]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu")
    model.max_seq_length = limit
    return {ST: model.encode}


def transformers(directory: Path, limit: int) -> dict[str, Encode]:
    """As a plain script has it: batches of 32 in the order given."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModel.from_pretrained(directory)
    tokenize = partial(tokenizer, padding=True, truncation=True, max_length=limit, return_tensors="pt")

    def encode(texts: list[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokenize(texts[start : start + 32])
            with torch.no_grad():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    return {"transformers": encode}


def export(directory: Path, file: str) -> Any:
    """Writes transformers' eager model with its masked mean as ONNX, and returns its config."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32)
    pooled = SentenceEncoder(model, Tokenizer.from_pretrained(directory)).eval()
    inputs = (torch.tensor([[1, 2, 3], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    axes = {name: {0: "texts", 1: "tokens"} for name in ("ids", "mask")}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(pooled, inputs, file, dynamo=False, input_names=list(axes), dynamic_axes=axes)
    return model.config


def onnx_runtime(directory: Path, limit: int) -> dict[str, Encode]:
    """transformers' eager model and what ONNX Runtime's own optimizer makes of it.

    In batches of 8 and of 32, cut from the texts sorted by length as ours are. The threads spin, which is the
    default: without it MiniLM took 14 to 30% longer for one sentence, and up to 5% for many.
    """
    runtime = importlib.import_module("onnxruntime")
    optimizer = importlib.import_module("onnxruntime.transformers.optimizer")
    tokenizer = Tokenizer.from_pretrained(directory)
    tokenizer.max_length = limit
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def encode(texts: list[str], session: Any, batch_size: int) -> Tensor:
        rows = tokenizer.token_ids(texts)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        parts = []
        for start in range(0, len(order), batch_size):
            ids = pad([rows[i] for i in order[start : start + batch_size]], tokenizer.pad_token_id).numpy()
            mask = (ids != tokenizer.pad_token_id).astype("int64")
            parts.append(torch.from_numpy(session.run(None, {"ids": ids, "mask": mask})[0]))
        return torch.cat(parts)[torch.tensor(order).argsort()]

    found: dict[str, Encode] = {}
    with tempfile.TemporaryDirectory() as temporary:
        exported, optimized = (f"{temporary}/{name}.onnx" for name in ("exported", "optimized"))
        config = export(directory, exported)
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        optimizer.optimize_model(exported, "bert", **sizes).save_model_to_file(optimized)
        for file in (exported, optimized):
            session = runtime.InferenceSession(file, options, ["CPUExecutionProvider"])
            for size in BATCH_SIZES:
                name = f"{ONNX} {Path(file).stem}, {size}"
                found[name] = partial(encode, session=session, batch_size=size)
    return found


def find_contenders(directory: Path, limit: int) -> dict[str, Encode]:
    found: dict[str, Encode] = {}
    for load in (ours, sentence_transformers, transformers, onnx_runtime):
        try:
            found |= load(directory, limit)
        except ModuleNotFoundError as error:
            print(f"{load.__name__} is left out: {error.name} is not installed")
    return found


def take_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """The seconds of each in each round, the median of its repeats there."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(REST)
            clock = [time.perf_counter()]
            for _ in range(repeats):
                call()
                clock.append(time.perf_counter())
            taken[name].append(statistics.median(clock[i + 1] - clock[i] for i in range(repeats)))
    return taken


def without_slower(contenders: Mapping[str, Encode], sample: list[str]) -> dict[str, Encode]:
    """Of ONNX Runtime's two models, for each batch size, only the one that is faster on the sample."""
    chosen = dict(contenders)
    for size in BATCH_SIZES:
        trials = {name: partial(f, sample) for name, f in contenders.items() if name.endswith(f", {size}")}
        take_turns(trials, 1)
        fastest = {name: min(taken) for name, taken in take_turns(trials, 2).items()}
        for name in sorted(fastest, key=fastest.__getitem__)[1:]:
            del chosen[name]
    return chosen


def throughput(
    config: BertConfig, texts: list[str], lengths: Sequence[int], contenders: Mapping[str, Encode], rounds: int
) -> Rows:
    multiply = {name: products(config, dtype, packed) for name, (dtype, packed) in PRODUCTS.items()}
    # Their first runs, which warm them up.
    outputs = {name: F.normalize(torch.as_tensor(f(texts)).double()) for name, f in contenders.items()}
    take_turns(multiply, 1)
    taken = take_turns({name: partial(f, texts) for name, f in contenders.items()} | multiply, rounds)
    useful, product = operations(config, lengths), PRODUCT_REPEATS * linear_operations(config, PRODUCT_ROWS)
    rows = {}
    for name, output in outputs.items():
        rows[name] = {
            "seconds": statistics.median(taken[name]),
            "tokens/s": sum(lengths) / statistics.median(taken[name]),
            "times ours": ratio(taken[name], taken[FLOAT32]),
            "max difference": float((output - outputs[FLOAT32]).abs().max()),
            "min cosine": float((output * outputs[FLOAT32]).sum(1).min()),
        }
    for name, bare in ((FLOAT32, "oneDNN float32"), (BFLOAT16, "oneDNN bfloat16")):
        rows[name]["% of products"] = 100 * useful / product * ratio(taken[bare], taken[name])
    for name in (FLOAT32, *outputs, *PRODUCTS):
        done = product if name in PRODUCTS else useful
        rows.setdefault(name, {})["GFLOP/s"] = done / statistics.median(taken[name]) / 1e9
    return rows


def latency(contenders: Mapping[str, Encode], blocks: int) -> Rows:
    """Of one short sentence, tokenizing included, in blocks of 50 calls."""
    calls = {name: partial(f, [SENTENCE]) for name, f in contenders.items() if not name.endswith(" 32")}
    take_turns(calls, 1, repeats=50)
    taken = take_turns(calls, blocks, repeats=50)
    return {
        name: {"ms": 1000 * statistics.median(each), "times ours": ratio(each, taken[FLOAT32])}
        for name, each in taken.items()
    }


def same_bits(contenders: Mapping[str, Encode], texts: list[str]) -> Rows:
    """How many embeddings are the same to the last bit alone and all together."""
    rows = {}
    for name, encode in contenders.items():
        together = torch.as_tensor(encode(texts))
        alone = torch.cat([torch.as_tensor(encode([text])) for text in texts])
        same = int((alone == together).all(1).sum())
        rows[name] = {"identical": float(same), "of": float(len(texts))}
    return rows


def peak_memory(directory: Path, texts: list[str]) -> Rows:
    """What loading and encoding add to a fresh process, over the size of the weights file."""
    rows = {}
    size = (directory / "model.safetensors").stat().st_size
    for name, dtype in ((FLOAT32, "None"), (BFLOAT16, "bfloat16")):
        command = [sys.executable, "-c", PEAK_MEMORY, str(directory), dtype]
        done = subprocess.run(command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True)
        rows[name] = {"added MB": int(done.stdout) / 1e6, "over file size": int(done.stdout) / size}
    return rows


def measure(
    directory: Path, words: Sequence[str], share: int, arguments: argparse.Namespace
) -> Iterator[tuple[str, Rows]]:
    """Tables and their titles; of each corpus one `share`-th."""
    config = BertConfig.from_pretrained(directory)
    limit = min(512, config.max_position_embeddings)
    if sys.platform == "linux":
        for count in (1, 2000 // share):  # the weights and little else, and with activations
            texts = make_texts(words, "short", count)
            yield f"peak memory, {count:,} short sentence(s)", peak_memory(directory, texts)
    contenders = find_contenders(directory, limit)
    for kind, count in COUNTS.items():
        texts = make_texts(words, kind, count // share)
        lengths = [len(ids) for ids in Tokenizer.from_pretrained(directory).token_ids(texts, max_length=limit)]
        chosen = without_slower(contenders, texts[: len(texts) // 4 + 1])
        rows = throughput(config, texts, lengths, chosen, arguments.rounds)
        yield f"{kind}: {len(texts)} texts, {sum(lengths):,} tokens", rows
    yield "one short sentence", latency(contenders, arguments.rounds)
    compared = {name: f for name, f in contenders.items() if name in (FLOAT32, BFLOAT16, ST)}
    yield "same bits", same_bits(compared, make_texts(words, "short", 200))


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few texts, 2 rounds, MiniLM only")
    parser.add_argument("--model", help="a directory or name, instead of MiniLM and the bert-base-sized model")
    parser.add_argument("--rounds", type=int, help="default: 5, or 2 with --quick")
    parser.add_argument("--output", type=Path, default=Path("encode.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    warnings.filterwarnings("ignore", message=".* texts cut to")
    words = read_words()
    results: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    with tempfile.TemporaryDirectory() as temporary:
        name = arguments.model or "all-MiniLM-L6-v2"
        models = {name: (resolve(name), 32 if arguments.quick else 1)}
        if not (arguments.quick or arguments.model):
            models["bert-base size"] = (save_base_size(Path(temporary) / "base"), 5)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        for name, (directory, share) in models.items():
            print(f"\n== {name}")
            results[name] = {}
            for title, rows in measure(directory, words, share, arguments):
                results[name][title] = rows
                print_table(title, rows)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
