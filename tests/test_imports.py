"""What importing costs, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LATER = ("transformers", "sentence_transformers", "huggingface_hub", "tokenizers", "scipy", "sklearn", "pandas")


def test_importing_pulls_in_nothing_before_it_is_needed() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)
import minibert, heads, weights
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & set({LATER})))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_encoding_needs_neither_transformers_nor_the_hub() -> None:
    code = """
import sys
from minibert import SentenceEncoder
SentenceEncoder.from_pretrained("all-MiniLM-L6-v2").encode("hello")
unwanted = ("transformers", "sentence_transformers", "huggingface_hub", "torch._dynamo")
print([name for name in unwanted if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [("weights", ("minibert", "heads", "train")), ("minibert", ("heads", "train")), ("heads", ("train",))],
)
def test_nothing_imports_upward(room: str, forbidden: tuple[str, ...]) -> None:
    for path in (ROOT / room).glob("*.py"):
        tops = {name.partition(".")[0] for name in imports(path)}
        assert not tops & set(forbidden), path
        assert "transformers" not in tops or path.name == "parity.py"


@pytest.mark.parametrize("file", ["embeddings", "attention", "layers", "model"])
def test_the_textbook_needs_torch_only(file: str) -> None:
    tops = {name.partition(".")[0] for name in imports(ROOT / "minibert" / f"{file}.py")}
    assert tops <= {"torch", "minibert", "math", "collections", "dataclasses", "pathlib", "typing", "weights"}
    assert "weights" not in tops or file == "model"


def test_weights_knows_no_module() -> None:
    for path in (ROOT / "weights").glob("*.py"):
        assert not {name for name in imports(path) if name.startswith("torch.nn")}, path
        assert "nn.Module" not in path.read_text() or path.name == "__init__.py"
