"""Models the tests share. Nothing here or in the tests reaches a network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minibert import Tokenizer
from weights import resolve

MINILM = "all-MiniLM-L6-v2"

# Odd sizes: two axes that are swapped by mistake cannot go unnoticed.
TINY = {
    "vocab_size": 97,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 19,
    "type_vocab_size": 3,
}
TINY_DISTILBERT = {
    "vocab_size": 97,
    "dim": 36,
    "n_heads": 3,
    "n_layers": 2,
    "hidden_dim": 37,
    "max_position_embeddings": 19,
}


# A shell has what runs in its background ignore Ctrl-C; here it is sent on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)


HAS_A_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def gpu_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only tests marked `gpu` see one: a CPU's numbers are compared, to the bit."""
    marked = request.node.get_closest_marker("gpu") is not None
    if marked and not HAS_A_GPU:
        pytest.skip("needs a GPU")
    with pytest.MonkeyPatch.context() as hidden:  # not the test's own, which may be undone in its middle
        if not marked:
            hidden.setattr(torch.cuda, "is_available", lambda: False)
            hidden.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts
        yield


@pytest.fixture(autouse=True)
def plots_or_none(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only runs of tests marked `plots` draw: it takes half a second, more than most of them train."""
    with pytest.MonkeyPatch.context() as patched:
        if request.node.get_closest_marker("plots") is None:
            patched.setattr("heads.report.draw", lambda *_: {})
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    return resolve(MINILM)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of odd sizes, made and written by transformers."""
    return save_random_bert(tmp_path_factory.mktemp("tiny"), **TINY)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A random BERT of three layers and odd sizes, dropout 0.1, with a real tokenizer."""
    return save_small(tmp_path_factory.mktemp("small"), minilm)


@pytest.fixture(scope="session")
def no_dropout(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """`small` without dropout."""
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_small(tmp_path_factory.mktemp("no_dropout"), minilm, **fields)


def save_small(directory: Path, minilm: Path, **fields: Any) -> Path:
    sizes = TINY | {"vocab_size": 30522, "num_hidden_layers": 3, "max_position_embeddings": 29}
    save_random_bert(directory, **sizes | fields)
    Tokenizer.from_pretrained(minilm).save_pretrained(directory)
    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first; those that start processes of their own (the `shell` fixture) are slow."""
    for item in items:
        if "shell" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def save_random_bert(directory: Path, **fields: Any) -> Path:
    from transformers import BertConfig, BertModel

    return save_random(BertModel, BertConfig(**fields), directory)


def save_random(architecture: Any, config: Any, directory: Path, seed: int = 0) -> Path:
    """Weights large enough that every piece matters: the published 0.02 would hide mistakes."""
    torch.manual_seed(seed)
    model = architecture(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    return directory
