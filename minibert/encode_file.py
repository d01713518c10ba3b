"""A text file becomes a .npy file of embeddings, block by block: in flat memory, resumable, in shards.

Beside each array lies a record of what it was made from, `out.npy.json`. Until it is whole the two are
called `out.npy.part` and `out.npy.part.json`, whose `done` says how many rows are on the disk.
"""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minibert.sentence_encoder import SentenceEncoder
from minibert.text_lines import Lines, read_lines
from weights.hub import sha256
from weights.json_files import read_json, to_json

SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})$")
MODEL_FILES = (".safetensors", ".json", ".txt")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`, each with as many lines as the others, or one more."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "i/n". Raises ValueError."""
        match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--shard {text}: give I/N, such as 1/4, with I from 1 to N")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_torchrun(cls) -> "Shard | None":
        """This process's, where torchrun started several."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ["RANK"]) + 1, count) if count > 1 else None

    def file(self, output: Path) -> Path:
        """out.npy -> out-00002-of-00004.npy."""
        return output.with_name(f"{output.stem}-{self.index:05}-of-{self.count:05}{output.suffix}")

    def rows(self, total: int) -> tuple[int, int]:
        """Its first line, and the one after its last."""
        return total * (self.index - 1) // self.count, total * self.index // self.count


def encode_file(
    encoder: SentenceEncoder,
    model_directory: Path,
    text: Path,
    output: Path,
    *,
    batch_size: int | None = None,
    normalize_embeddings: bool | None = None,
    shard: Shard | None = None,
    resume: bool = False,
) -> Path:
    """Writes (lines, H) float32, or a shard's part of it, and returns the file written.

    Args:
        model_directory: where `encoder` was loaded from; its files go into the record.
        resume: go on where a stopped run was; start if there is none; do nothing if it is whole.

    Raises:
        ValueError: the text is empty or not UTF-8; fewer lines than shards; a stopped run lies there
            and `resume` is false, or it was of another text, model or setting.
        OSError: a file cannot be read or written, or the disk has no room for the whole array.
    """
    lines, digest = _scan(text)
    start, stop = shard.rows(lines) if shard else (0, lines)
    if start == stop:
        raise ValueError(f"{text} has {lines} lines, too few for {shard.count if shard else 1} shards")
    normalize = encoder.normalize_embeddings if normalize_embeddings is None else normalize_embeddings
    task = {
        "text": digest,
        "model": _fingerprint(model_directory),
        "normalize_embeddings": normalize,
        "dtype": str(encoder.dtype or encoder.model.embeddings.word.weight.dtype).removeprefix("torch."),
        "hidden_size": encoder.model.config.hidden_size,
        "lines": lines,
        "start": start,
        "stop": stop,
    }
    target = shard.file(output) if shard else output
    part = Path(f"{target}.part")
    if resume and target.is_file() and _record(target).is_file():
        _check_same(target, task)
        return target
    done = _rows_done(part, task, resume)
    blocks = encoder.encode_blocks(Lines(text, start + done, stop), batch_size, normalize)
    if done == 0:
        _create(part, stop - start, encoder.model.config.hidden_size)
    array = np.lib.format.open_memmap(part, mode="r+")
    try:
        for block in blocks:
            array[done : done + len(block)] = block.float().cpu().numpy()
            array.flush()  # the rows before the record that counts them
            done += len(block)
            _write_record(part, task | {"done": done})
    except BaseException as error:
        if done == 0:
            part.unlink()
        elif isinstance(error, KeyboardInterrupt):
            print(f"\nstopped after {done} of {stop - start} rows: --resume goes on there", file=sys.stderr)
        raise
    part.replace(target)
    _record(part).replace(_record(target))
    return target


def merge(output: Path) -> int:
    """Joins the shards of `output`, which must all be whole and of one text, model and setting.

    Returns how many there were; they are left where they are.

    Raises:
        ValueError: a shard is missing or unfinished, or does not belong to the others.
    """
    shards = {}
    for file in sorted(output.parent.glob(f"{output.stem}-*-of-*{output.suffix}")):
        if match := SHARD_NAME.search(file.stem.removeprefix(output.stem)):
            shards[Shard(int(match[1]), int(match[2]))] = file
    counts = sorted({shard.count for shard in shards})
    if len(counts) != 1:
        found = f"shards of {' and of '.join(map(str, counts))}" if counts else "no shards"
        raise ValueError(f"cannot merge {output}: {found} found, such as {Shard(1, 4).file(output)}")
    wanted = [Shard(index, counts[0]) for index in range(1, counts[0] + 1)]
    if missing := [shard.file(output).name for shard in wanted if shard not in shards]:
        raise ValueError(f"cannot merge {output}: {', '.join(missing)} not there, or not finished")
    task = read_json(_record(shards[wanted[0]]))
    lines, width = task["lines"], task["hidden_size"]
    task |= {"start": 0, "stop": lines, "done": lines}
    for shard in wanted:
        start, stop = shard.rows(lines)
        _check_same(shards[shard], task | {"start": start, "stop": stop, "done": stop - start})
    part = Path(f"{output}.part")
    _create(part, lines, width)
    array = np.lib.format.open_memmap(part, mode="r+")
    for shard in wanted:
        start, stop = shard.rows(lines)
        array[start:stop] = np.load(shards[shard], mmap_mode="r")
    array.flush()
    part.replace(output)
    _write_record(output, task)
    return len(wanted)


def _scan(text: Path) -> tuple[int, str]:
    """How many lines, and the sha256 of them. What is wrong with the last line is said before the work."""
    digest, lines = hashlib.sha256(), 0
    with text.open("rb") as stream:
        for line in read_lines(str(text), stream):
            digest.update(line.encode() + b"\n")
            lines += 1
    return lines, digest.hexdigest()


def _fingerprint(directory: Path) -> str:
    """The sha256 of a model's files."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        if file.suffix in MODEL_FILES and file.is_file():
            digest.update(f"{file.name} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _record(file: Path) -> Path:
    return Path(f"{file}.json")


def _write_record(file: Path, record: dict[str, Any]) -> None:
    temporary = Path(f"{file}.json.{os.getpid()}")
    temporary.write_bytes(to_json(record))
    temporary.replace(_record(file))


def _rows_done(part: Path, task: dict[str, Any], resume: bool) -> int:
    """How many rows of this task an earlier run has left."""
    if not (part.is_file() and _record(part).is_file()):
        return 0
    done = int(read_json(_record(part)).get("done", 0))
    if not resume:
        raise ValueError(
            f"{part} holds {done} of {task['stop'] - task['start']} rows of a stopped run: "
            "go on with it with --resume, or remove it"
        )
    _check_same(part, task)
    return done


def _check_same(file: Path, task: dict[str, Any]) -> None:
    """Raises ValueError, saying what differs, unless the record of `file` agrees with `task`."""
    record = read_json(_record(file))
    changed = [f"{key} was {record.get(key)}, is {task[key]}" for key in task if record.get(key) != task[key]]
    if changed:
        raise ValueError(f"{file} was made otherwise: {'; '.join(changed)}")


def _create(file: Path, rows: int, width: int) -> None:
    """An array of zeros on the disk, all of whose room is taken now: a full disk is noticed before the work."""
    array: NDArray[np.float32] = np.lib.format.open_memmap(
        file, mode="w+", dtype=np.float32, shape=(rows, width)
    )
    del array
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)
            except OSError as error:
                file.unlink()
                raise OSError(error.errno, error.strerror, str(file)) from error
