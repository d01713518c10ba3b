"""How fast a GPU encodes in bfloat16, beside transformers and sentence-transformers and beside its products.

    python -m benchmarks.encode_gpu            all-MiniLM-L6-v2 and a bert-base-sized model: 3 minutes
    python -m benchmarks.encode_gpu --quick    an eighth of the texts, MiniLM only

The contenders take turns in one process; reported are medians, and medians of the ratios within a round
(2 is twice as long as ours, which is the compiled one). "% of products" is the useful arithmetic over the time,
as a share of the rate at which the GPU multiplies by the model's own matrices; "% of square" is of the rate of
one large square product. Token ids are ready but in the tables called `encode`, which starts from texts.
transformers and sentence-transformers come with the test extra.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.encode import (
    PRODUCT_REPEATS,
    linear_operations,
    machine,
    make_texts,
    operations,
    products,
    read_words,
    same_bits,
    take_turns,
)
from benchmarks.shared import Rows, print_table, ratio, save_base_size
from minibert import BertConfig, SentenceEncoder
from minibert.fast_inference import FastModel, run_texts, token_budget
from minibert.tokenizer import pad
from weights import resolve

EAGER, COMPILED = "ours", "ours, compiled"
BATCH_SIZES = (32, 512)  # of the others: their default, and large
SQUARE = 8192
COUNTS = {"short": 8192, "mixed": 2048}
LENGTH = 128
Ids = list[list[int]]


def finished(call: Callable[[], object]) -> Callable[[], None]:
    """The call, and waiting until the GPU has done what it asked for."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def square() -> Callable[[], object]:
    a, b = torch.randn(2, SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16)
    return lambda: [(a @ b).shape for _ in range(PRODUCT_REPEATS)]


def ours(encoder: SentenceEncoder, ids: Ids) -> Callable[[], object]:
    """Embeddings of texts whose ids are known."""
    fast = FastModel(encoder.model, encoder.dtype)

    def encode() -> list[Tensor]:
        with torch.inference_mode():
            batches = run_texts(fast, ids, compiled=encoder.compiled)
            return [packing.mean(hidden) for _, packing, hidden in batches]

    return encode


def theirs(model: Any, ids: Ids, batch_size: int) -> Callable[[], object]:
    """Embeddings by transformers' model in padded batches, cut in the order given."""
    batches = []
    for start in range(0, len(ids), batch_size):
        padded = pad(ids[start : start + batch_size], 0)
        batches.append({"input_ids": padded, "attention_mask": (padded != 0).long()})

    def encode() -> list[Tensor]:
        parts = []
        for batch in batches:
            inputs = {name: tensor.cuda() for name, tensor in batch.items()}
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return parts

    return encode


def find_encoders(directory: Path) -> dict[str, SentenceEncoder]:
    encoders = {}
    for name, compiled in ((EAGER, False), (COMPILED, True)):
        encoder = SentenceEncoder.from_pretrained(directory, dtype=torch.bfloat16, compile=compiled).cuda()
        encoder.tokenizer.max_length = min(512, encoder.model.config.max_position_embeddings)
        encoders[name] = encoder
    return encoders


def find_model(directory: Path) -> Any:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.bfloat16)
    return model.cuda().eval()


def compare(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    waiting = {name: finished(call) for name, call in calls.items()}
    take_turns(waiting, 1)  # the first time warms them up, and compiles ours
    return take_turns(waiting, rounds)


def forward_alone(
    config: BertConfig, ids: Ids, encoders: Mapping[str, SentenceEncoder], model: Any, rounds: int
) -> Rows:
    """Ids -> embeddings; how much of the rates of bare products that is."""
    longest_first = sorted(ids, key=len, reverse=True)
    calls = {name: ours(encoder, ids) for name, encoder in encoders.items()}
    for size in BATCH_SIZES:
        calls[f"transformers, {size}"] = theirs(model, ids, size)
        if longest_first != ids:
            calls[f"the same, sorted, {size}"] = theirs(model, longest_first, size)
    tokens = token_budget(config, torch.device("cuda"))
    multiply = products(config, torch.bfloat16, packed=False, rows=tokens, device="cuda")
    taken = compare(calls | {"products": multiply, "square": square()}, rounds)
    work = dict.fromkeys(calls, operations(config, [len(row) for row in ids]))
    bare = {"products": linear_operations(config, tokens), "square": 2 * SQUARE**3}
    work |= {name: PRODUCT_REPEATS * count for name, count in bare.items()}
    rates = {name: [work[name] / seconds / 1e12 for seconds in taken[name]] for name in taken}
    rows = {}
    for name, rate in rates.items():
        rows[name] = {"TFLOP/s": statistics.median(rate)}
        if name in calls:
            rows[name] |= {
                "ms": 1000 * statistics.median(taken[name]),
                "tokens/s": sum(map(len, ids)) / statistics.median(taken[name]),
                "times ours": ratio(taken[name], taken[COMPILED]),
                "% of products": 100 * ratio(rate, rates["products"]),
                "% of square": 100 * ratio(rate, rates["square"]),
            }
    return rows


def from_texts(
    directory: Path, texts: list[str], tokens: int, encoders: Mapping[str, SentenceEncoder], rounds: int
) -> Rows:
    from sentence_transformers import SentenceTransformer

    calls: dict[str, Callable[[], object]] = {
        name: partial(encoder.encode, texts) for name, encoder in encoders.items()
    }
    other = SentenceTransformer(str(directory), device="cuda", model_kwargs={"dtype": torch.bfloat16})
    other.max_seq_length = encoders[EAGER].tokenizer.max_length
    for size in BATCH_SIZES:
        calls[f"sentence-transf., {size}"] = partial(other.encode, texts, batch_size=size)
    calls["tokenizing alone"] = partial(encoders[EAGER].tokenizer.token_ids, texts)
    taken = compare(calls, rounds)
    return {
        name: {
            "ms": 1000 * statistics.median(each),
            "tokens/s": tokens / statistics.median(each),
            "times ours": ratio(each, taken[COMPILED]),
        }
        for name, each in taken.items()
    }


def measure(directory: Path, words: list[str], share: int, rounds: int) -> dict[str, Rows]:
    config = BertConfig.from_pretrained(directory)
    encoders, model = find_encoders(directory), find_model(directory)
    results: dict[str, Rows] = {}

    def report(title: str, rows: Rows) -> None:
        results[title] = rows
        print_table(title, rows)

    generator = torch.Generator().manual_seed(0)
    shape = (COUNTS["mixed"] // share, LENGTH)
    equal = torch.randint(1000, min(20_000, config.vocab_size), shape, generator=generator).tolist()
    report(f"{len(equal)} texts of {LENGTH} tokens", forward_alone(config, equal, encoders, model, rounds))
    for kind, count in COUNTS.items():
        texts = make_texts(words, kind, count // share)
        ids = encoders[EAGER].tokenizer.token_ids(texts)
        tokens = sum(map(len, ids))
        title = f"{kind}: {len(texts)} texts, {tokens:,} tokens"
        report(f"{title}, ids known", forward_alone(config, ids, encoders, model, rounds))
        report(f"{title}, encode", from_texts(directory, texts, tokens, encoders, rounds))
    texts = make_texts(words, "short", 150) + make_texts(words, "mixed", 50)
    rows = same_bits({name: encoder.encode for name, encoder in encoders.items()}, texts)
    wide = SentenceEncoder.from_pretrained(directory).cuda()
    wide.tokenizer.max_length = encoders[EAGER].tokenizer.max_length
    expected = wide.encode(texts, convert_to_tensor=True)
    for name, encoder in encoders.items():
        cosines = F.cosine_similarity(encoder.encode(texts, convert_to_tensor=True), expected)
        rows[name]["min cosine"] = float(cosines.min())
    report("same bits", rows)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the texts, MiniLM only")
    parser.add_argument("--model", help="a directory or name, instead of MiniLM and the bert-base-sized model")
    parser.add_argument("--rounds", type=int, help="default: 5")
    parser.add_argument("--output", type=Path, default=Path("encode_gpu.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; benchmarks.encode measures on a CPU")
    for library in ("transformers", "sentence_transformers"):
        if importlib.util.find_spec(library) is None:
            raise SystemExit(f'{library} is not installed: pip install -e ".[test]"')
    warnings.filterwarnings("ignore", message=".* texts cut to")
    words, share = read_words(), 8 if arguments.quick else 1
    results: dict[str, Any] = {"machine": machine() | {"GPU": torch.cuda.get_device_name()}}
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    with tempfile.TemporaryDirectory() as temporary:
        name = arguments.model or "all-MiniLM-L6-v2"
        models = {name: resolve(name)}
        if not (arguments.quick or arguments.model):
            models["bert-base size"] = save_base_size(Path(temporary) / "base")
        for name, directory in models.items():
            print(f"\n== {name}")
            results[name] = measure(directory, words, share, arguments.rounds or 5)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {arguments.output}")


if __name__ == "__main__":
    main()
