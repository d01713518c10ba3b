"""The directory of a training run.

config.json      the resolved options
metrics.jsonl    a line per step and per epoch
last/            the model and all that is needed to go on
best/            the model that did best on the validation set
report.json, report.md, *.png
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from heads.multitask import MultiTaskModel
from heads.training_state import Progress
from weights import CheckpointError
from weights.json_files import read_json, to_json
from weights.locks import locked
from weights.safetensors_files import HEADS, read_file, write_directory

PROGRESS = "training.json"
STATE = "training.safetensors"


class RunDirectory:
    """Reads and writes the files of one run. Whenever the process dies, nothing is left half-written, except
    perhaps the last line of metrics.jsonl.

    Raises:
        CheckpointError: a file cannot be written, or is not what `save` wrote.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.log_file = self.path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and keeps other processes out of it. Raises ValueError if one is at it."""
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "last"):
            yield

    def recover(self) -> None:
        """Puts back what a run that died between the two renames of `save` left aside, and clears up."""
        for name in ("best", "last"):
            fresh, old = self.path / f".{name}.new", self.path / f".{name}.old"
            if not (self.path / name).exists() and old.exists():
                old.rename(self.path / name)
            for leftover in (fresh, old):
                _remove(leftover)
        for leftover in self.path.glob(".saving-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, config: dict[str, Any]) -> None:
        """Writes config.json and an empty metrics.jsonl.

        First config.json, since a run that has it can be gone on with.
        """
        with _writing(self.path):
            self.write({"config.json": to_json(config)})
            self.log_file.touch()
            os.truncate(self.log_file, 0)

    def write(self, files: dict[str, bytes]) -> None:
        """Writes small files, each whole or not at all."""
        write_directory(self.path, files)

    def log(self, record: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl."""
        with _writing(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        text = self.log_file.read_text(encoding="utf-8")
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise CheckpointError(f"{self.log_file} is damaged, not every line is JSON: {error}") from error

    def save(
        self,
        name: str,
        model: MultiTaskModel,
        progress: Progress | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> None:
        """Replaces best/ or last/ as a whole."""
        fresh, old, place = self.path / f".{name}.new", self.path / f".{name}.old", self.path / name
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            model.save_pretrained(fresh)
            if progress is not None:
                with _writing(self.log_file), self.log_file.open("ab") as file:
                    os.fsync(file.fileno())  # it must not be shorter than this after a power cut
                    values = asdict(progress) | {"metrics_bytes": file.tell()}
                write_directory(fresh, {STATE: state or {}, PROGRESS: to_json(values)})
        except BaseException as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if isinstance(error, CheckpointError):
                hint = f"best/ and last/ are as last saved: free some room and --resume the run in {self.path}"
                raise CheckpointError(f"{error}; {hint}") from error
            raise
        with _writing(place):
            _remove(old)
            if os.path.lexists(place):  # it may be a link to what is gone
                place.rename(old)
            fresh.rename(place)
            _remove(old)

    def load(self, begun: Progress) -> tuple[Progress, dict[str, Tensor]]:
        """What `save("last", ...)` stored beside the model; (`begun`, {}) if nothing was saved yet.

        Raises:
            ValueError: other data, or another number of processes, than `begun` has.
        """
        last = self.path / "last"
        if not last.exists():
            lines = self.log_file.read_text(encoding="utf-8") if self.log_file.is_file() else ""
            # One epoch may be there whose run died before it was saved. (Its last line need not be whole JSON.)
            if lines.count('"trained": [') > 1:
                raise CheckpointError(f"{last} is not there any more, so the run cannot go on: begin another")
            return begun, {}
        values = read_json(last / PROGRESS)
        if values.keys() != {field.name for field in fields(Progress)}:
            raise CheckpointError(f"{last / PROGRESS} was not written by this version of train.py")
        saved = Progress(**values)
        for needed in [last / HEADS] + [self.path / "best"] * (saved.best is not None):
            if not needed.exists():
                raise CheckpointError(f"{needed} is not there any more, so the run cannot go on: begin another")
        others = saved.data.keys() | begun.data.keys()
        if changed := sorted(name for name in others if saved.data.get(name) != begun.data.get(name)):
            raise ValueError(f"--resume: these sets have changed since {self.path} began: {', '.join(changed)}")
        if saved.processes != begun.processes:
            raise ValueError(
                f"--resume: {self.path} has {saved.processes} processes, now there are {begun.processes}"
            )
        return saved, read_file(last / STATE)

    def rewind(self, progress: Progress) -> None:
        """Cuts metrics.jsonl back to what it was when `progress` was saved."""
        if not self.log_file.is_file() or self.log_file.stat().st_size < progress.metrics_bytes:
            raise CheckpointError(f"{self.log_file} is missing or shorter than it was when last/ was saved")
        os.truncate(self.log_file, progress.metrics_bytes)


def _remove(directory: Path) -> None:
    """If it is there; of a link the link alone."""
    if directory.is_symlink():
        directory.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def check_room(path: Path, needed: int) -> None:
    """Raises CheckpointError if fewer bytes than `needed` are free where a directory is, or will be."""
    with _writing(path):
        there = next(place for place in (path, *path.absolute().parents) if place.exists())
        free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(
            f"{path}: {free / 1e6:,.0f} MB are free, checkpoints may take {needed / 1e6:,.0f} MB"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An error of the disk names what could not be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error
