"""Makes minilm.json: numbers of all-MiniLM-L6-v2 computed by transformers and sentence-transformers.

python tests/goldens/make.py            writes minilm.json
python tests/goldens/make.py --check    compares what it would write with what is committed
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

from weights import resolve

FILE = Path(__file__).with_name("minilm.json")
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Is it going to rain tomorrow?",
    "Ünïcödé, 中文 and [MASK] 😀!",
    "",
    "Of the texts this is the long one: " + "it goes on and on, and " * 6 + "ends.",
]
LONG = "the cat sat on the mat and " * 60  # cut to 256 tokens, as sentence-transformers does
PAIR = ("Where is the second text?", "It has token type 1.")
TOLERANCE = 1e-5  # another CPU sums in another order


def goldens() -> dict[str, Any]:
    directory = resolve("all-MiniLM-L6-v2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    left = tokenizer(TEXTS[:3], padding=True, padding_side="left", return_tensors="pt")
    pair = tokenizer(*PAIR, return_tensors="pt")
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        of_left = model(**left)
        of_pair = model(**pair)
    mask = batch["attention_mask"][:, :, None]
    means = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
    encoder = SentenceTransformer(str(directory), device="cpu")
    return {
        "texts": TEXTS,
        "input_ids": batch["input_ids"].tolist(),
        "attention_mask": batch["attention_mask"].tolist(),
        "hidden_states[:][:, 1, 1:5]": [h[:, 1, 1:5].tolist() for h in output.hidden_states],
        "last_hidden_state[4, ::7, 1:5]": output.last_hidden_state[4, ::7, 1:5].tolist(),
        "attentions[:][:3, 1:4, 2, 3]": [a[:3, 1:4, 2, 3].tolist() for a in output.attentions],
        "pooler_output[:, 1:5]": output.pooler_output[:, 1:5].tolist(),
        "means[:, :8]": means[:, :8].tolist(),
        "embeddings[:, :8]": encoder.encode(TEXTS)[:, :8].tolist(),
        "long text": LONG,
        "long text's embedding[:8]": encoder.encode(LONG)[:8].tolist(),
        "left-padded input_ids": left["input_ids"].tolist(),
        "left-padded attention_mask": left["attention_mask"].tolist(),
        "left-padded last_hidden_state[:, -4, 1:5]": of_left.last_hidden_state[:, -4, 1:5].tolist(),
        "pair": PAIR,
        "pair's input_ids": pair["input_ids"].tolist(),
        "pair's token_type_ids": pair["token_type_ids"].tolist(),
        "pair's last_hidden_state[0, ::3, 1:5]": of_pair.last_hidden_state[0, ::3, 1:5].tolist(),
        "pair's pooler_output[0, 1:5]": of_pair.pooler_output[0, 1:5].tolist(),
    }


def flat(value: Any) -> list[float]:
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


def check(made: dict[str, Any], committed: dict[str, Any]) -> None:
    assert made.keys() == committed.keys()
    for name, value in json.loads(json.dumps(made)).items():
        if "[" not in name:  # no slice of floats
            assert value == committed[name], name
        else:
            worst = max(abs(a - b) for a, b in zip(flat(value), flat(committed[name]), strict=True))
            assert worst <= TOLERANCE, f"{name} is off by {worst}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        check(goldens(), json.loads(FILE.read_text()))
        print(f"{FILE.name}: as made")
    else:
        lines = (f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in goldens().items())
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
