"""The models that are held against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from minibert import BertModel
from tests.conftest import save_random_bert


@pytest.fixture(scope="session")
def base_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in bert-base-uncased's shape, which is the default of transformers' config."""
    return save_random_bert(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def base_width(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three layers, for what takes long: deeper ones repeat the same operations."""
    return save_random_bert(tmp_path_factory.mktemp("width"), num_hidden_layers=3)


@pytest.fixture(scope="session", params=["tiny", "minilm", pytest.param("base_size", marks=pytest.mark.slow)])
def directory(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(params=["eager", "sdpa"])
def attention(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load_both(directory: Path, attention: str, dtype: torch.dtype = torch.float32) -> tuple[BertModel, Any]:
    """Ours and transformers', both from the same file.

    From the same file matters: memory-mapped weights start where the file's header ends, and MKL
    sums a product with a single row in another order when a matrix is aligned differently.
    """
    ours = BertModel.from_pretrained(directory, attention=attention, dtype=dtype)
    reference = AutoModel.from_pretrained(directory, attn_implementation=attention, dtype=dtype).eval()
    return ours, reference
