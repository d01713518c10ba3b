"""Makes minilm.json: numbers of all-MiniLM-L6-v2 computed by transformers and sentence-transformers.

python tests/goldens/make.py            writes minilm.json
python tests/goldens/make.py --check    compares what it would write with what is committed
"""

import json
import sys
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
]
TOLERANCE = 1e-5  # another CPU sums in another order


def goldens() -> dict[str, Any]:
    directory = resolve("all-MiniLM-L6-v2")
    batch = AutoTokenizer.from_pretrained(directory)(TEXTS, padding=True, return_tensors="pt")
    model = AutoModel.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
    embeddings = SentenceTransformer(str(directory), device="cpu").encode(TEXTS)
    return {
        "texts": TEXTS,
        "input_ids": batch["input_ids"].tolist(),
        "attention_mask": batch["attention_mask"].tolist(),
        "hidden_states[:][:, 1, 1:5]": [h[:, 1, 1:5].tolist() for h in output.hidden_states],
        "attentions[:][0, 1:4, 2, 3]": [a[0, 1:4, 2, 3].tolist() for a in output.attentions],
        "pooler_output[:, 1:5]": output.pooler_output[:, 1:5].tolist(),
        "embeddings[:, :8]": embeddings[:, :8].tolist(),
    }


def flat(value: Any) -> list[float]:
    return [x for part in value for x in flat(part)] if isinstance(value, list) else [value]


def check(made: dict[str, Any], committed: dict[str, Any]) -> None:
    assert made.keys() == committed.keys()
    for name, value in made.items():
        if name in ("texts", "input_ids", "attention_mask"):
            assert value == committed[name], name
        else:
            worst = max(abs(a - b) for a, b in zip(flat(value), flat(committed[name]), strict=True))
            assert worst <= TOLERANCE, f"{name} is off by {worst}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check(goldens(), json.loads(FILE.read_text()))
        print(f"{FILE.name}: as made")
    else:
        FILE.write_text(json.dumps(goldens(), indent=1, ensure_ascii=False) + "\n")
