"""train.py as a stranger would call it, on small random models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train

ROOT = Path(__file__).parents[2]
STATE = (
    "metrics.jsonl report.json report.md config.json best/model.safetensors best/heads.safetensors "
    "last/model.safetensors last/heads.safetensors last/heads.json last/training.safetensors last/training.json"
).split()

a_new_head_may_be_frozen = pytest.mark.filterwarnings("default:--freeze .* leaves the new head")

Main = Callable[..., Path]


def command(model: Path, output: Path, options: str = "") -> list[str]:
    return f"--model {model} --data dummy --epochs 3 --batch-size 48 --output {output} {options}".split()


@pytest.fixture
def main(small: Path, tmp_path: Path) -> Main:
    """Trains `small` on dummy data into a directory of this name; the options are one string."""

    def run(name: str, options: str = "", *, status: int = 0) -> Path:
        assert train.main(command(small, tmp_path / name, options)) == status
        return tmp_path / name

    return run


def steps(run: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "losses" in r]


def epochs(run: Path) -> list[dict[str, Any]]:
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "validation" in r]


def assert_same_run(a: Path, b: Path) -> None:
    assert {name for name in STATE if (a / name).read_bytes() != (b / name).read_bytes()} == set()


def table(path: Path, rows: list[tuple[str, ...]]) -> Path:
    path.write_text("".join(",".join(row) + "\n" for row in rows))
    return path
