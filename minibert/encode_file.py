"""A text file becomes a .npy file of embeddings, block by block: in flat memory, resumable, in shards.

Beside each array lies a record of what it was made from, `out.npy.json`. Until it is whole the two are
called `out.npy.part` and `out.npy.part.json`, whose `done` says how many rows are on the disk.
"""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minibert.sentence_encoder import SentenceEncoder, check_batch_size
from minibert.text_lines import Lines, read_lines
from weights.json_files import read_json, to_json
from weights.locks import locked

SHARD_NAME = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`; parts differ by one line at most."""

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
        return cls(int(os.environ.get("RANK", "0")) + 1, count) if count > 1 else None

    def file(self, output: Path) -> Path:
        """out.npy -> out-00002-of-00004.npy."""
        return output.with_name(f"{output.stem}-{self.index:05}-of-{self.count:05}{output.suffix}")

    def rows(self, total: int) -> tuple[int, int]:
        """Its first line, and the one after its last."""
        return total * (self.index - 1) // self.count, total * self.index // self.count


def encode_file(
    encoder: SentenceEncoder,
    text: str | Path,
    output: str | Path,
    *,
    batch_size: int | None = None,
    normalize_embeddings: bool | None = None,
    shard: Shard | None = None,
    resume: bool = False,
) -> Path:
    """Writes (lines, H) float32, or a shard's part of it, and returns the file written.

    With `resume` it goes on where a stopped run was; starts if there is none; does nothing if it is whole.

    Raises:
        ValueError: a batch_size below 1; the text is empty, not UTF-8, or changes meanwhile; fewer lines than
            shards; a stopped run lies there and `resume` is false, or it was of another text, model or setting;
            another process is at it; an encoder whose vectors are not as wide as its model's states.
        OSError: a file cannot be read or written, or the disk has no room for the whole array.
    """
    check_batch_size(batch_size)
    text, output = Path(text), Path(output)
    version = _version(text)
    lines, digest = _scan(text)
    if shard and lines < shard.count:
        raise ValueError(f"{text} has {lines} lines, too few for {shard.count} shards")
    start, stop = shard.rows(lines) if shard else (0, lines)
    width = encoder.model.config.hidden_size
    normalize = encoder.normalize_embeddings if normalize_embeddings is None else normalize_embeddings
    task = {
        "text": digest,
        "model": _fingerprint(encoder),
        "max_length": encoder.tokenizer.max_length,
        "pooling": encoder.pooling,
        "normalize_embeddings": normalize,
        "dtype": str(encoder.dtype or encoder.model.dtype).removeprefix("torch."),
        "hidden_size": width,
        "lines": lines,
        "start": start,
        "stop": stop,
    }
    target = shard.file(output) if shard else output
    part = Path(f"{target}.part")
    with locked(part):
        _tidy(part, target)
        if resume and not record_file(part).is_file() and target.is_file() and record_file(target).is_file():
            _matching_record(target, task | {"done": stop - start})
            return target
        done, cut = _rows_done(part, task, resume)
        blocks = encoder.blocks_and_cuts(Lines(text, start + done, stop), batch_size, normalize)
        if done == 0:
            _create(part, stop - start, width)
        try:
            for block, cut_here in blocks:
                if block.shape[1] != width:
                    raise ValueError(
                        f"this encoder's `forward` gives {block.shape[1]} numbers, its model has {width}: "
                        "write what its encode_blocks gives yourself"
                    )
                _write(part, done, block.float().cpu().numpy())  # the rows before the record that counts them
                _write_record(part, task | {"done": done + len(block), "cut": cut + cut_here})
                done += len(block)
                cut += cut_here
            if done < stop - start or _version(text) != version:
                record_file(part).unlink(missing_ok=True)  # nobody knows which rows are of which text
                raise ValueError(f"{text} was changed while it was read: encode it again")
        except BaseException as error:
            if not record_file(part).is_file():  # nothing to go on from
                part.unlink()
            if isinstance(error, KeyboardInterrupt):
                way = ": --resume goes on there" if done else ", before the first were written"
                print(f"\nstopped after {done} of {stop - start} rows{way}", file=sys.stderr)
            raise
        _publish(part, target)
    encoder.tokenizer.warn_if_cut(cut, stop - start)
    return target


def merge(output: Path) -> int:
    """Joins the shards of `output`, which must all be whole and of one text, model and setting.

    Returns how many there were; they are left where they are.

    Raises:
        ValueError: a shard is missing or unfinished, damaged, or does not belong to the others; another
            process is at it.
        OSError: a file cannot be read or written, or the disk has no room for the whole array.
    """
    if output.suffix != ".npy":
        raise ValueError(f"cannot merge {output}: give FILE.npy as `encode -o` was given it")
    shards, begun = _find_shards(output, ".npy"), _find_shards(output, ".npy.part")
    counts = sorted({shard.count for shard in shards or begun})
    if not counts:
        raise ValueError(f"cannot merge {output}: no shards found, such as {Shard(1, 4).file(output)}")
    if len(counts) > 1:
        found = " and ".join(f"of {count}" for count in counts)
        raise ValueError(f"cannot merge {output}: there are shards {found}, remove those of the other run")
    wanted = [Shard(index, counts[0]) for index in range(1, counts[0] + 1)]
    # whole ones may lie beside them that are an earlier run's
    if unfinished := [begun[shard].name for shard in wanted if shard in begun]:
        raise ValueError(f"cannot merge {output}: {unfinished[0]} is not finished, go on with it by --resume")
    if missing := [shard.file(output).name for shard in wanted if shard not in shards]:
        raise ValueError(f"cannot merge {output}: {', '.join(missing)} not there, or not finished")
    task = _read_record(shards[wanted[0]])
    lines, width = task["lines"], task["hidden_size"]
    del task["cut"]  # of each shard its own
    cut = 0
    for shard in wanted:
        start, stop = shard.rows(lines)
        part_of_task = task | {"start": start, "stop": stop, "done": stop - start}
        cut += _matching_record(shards[shard], part_of_task)["cut"]
    part = Path(f"{output}.merging")
    with locked(part):
        _create(part, lines, width)
        try:
            for shard in wanted:
                _write(part, shard.rows(lines)[0], np.load(shards[shard], mmap_mode="r"))
            _write_record(part, task | {"start": 0, "stop": lines, "done": lines, "cut": cut})
        except BaseException:
            part.unlink()
            raise
        _publish(part, output)
    return len(wanted)


def _find_shards(output: Path, suffix: str) -> dict[Shard, Path]:
    """The files beside `output` that are called as its shards, and end like this."""
    found = {}
    for file in output.parent.glob(f"{glob.escape(output.stem)}-*{suffix}"):
        if match := SHARD_NAME.fullmatch(file.name.removeprefix(output.stem).removesuffix(suffix)):
            found[Shard(int(match[1]), int(match[2]))] = file
    return found


def _version(text: Path) -> tuple[int, int]:
    """Differs once the file has been written to."""
    status = text.stat()
    return status.st_size, status.st_mtime_ns


def _scan(text: Path) -> tuple[int, str]:
    """How many lines, and the sha256 of them. What is wrong with the last line is said before the work."""
    digest, lines = hashlib.sha256(), 0
    with text.open("rb") as stream:
        for line in read_lines(str(text), stream):
            digest.update(line.encode() + b"\n")
            lines += 1
    return lines, digest.hexdigest()


def _fingerprint(encoder: SentenceEncoder) -> str:
    """The sha256 of all that a text's numbers depend on, beside the settings of a run."""
    digest = hashlib.sha256(to_json(encoder.model.config.to_dict()))
    for content in encoder.tokenizer.files().values():
        digest.update(content)
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())  # one may have no axis
    return digest.hexdigest()


def _tidy(part: Path, target: Path) -> None:
    """Finishes a `_publish` that was killed between its renames; removes a record whose array is gone."""
    if part.is_file():
        return
    if target.is_file() and not record_file(target).is_file():
        with suppress(ValueError):  # none there, or damaged
            record = _read_record(part)
            if record["done"] == record["stop"] - record["start"]:
                record_file(part).replace(record_file(target))
    record_file(part).unlink(missing_ok=True)


def record_file(file: Path) -> Path:
    """out.npy -> out.npy.json, what the array was made from."""
    return Path(f"{file}.json")


def _read_record(file: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(record_file(file)) if record_file(file).is_file() else {}
    numbers = ("lines", "hidden_size", "start", "stop", "done", "cut")
    complete = all(type(record.get(key)) is int for key in numbers)
    if not complete or not 0 < record["done"] <= record["stop"] - record["start"]:
        raise ValueError(f"{record_file(file)} is missing or damaged: remove {file.name} and encode it again")
    return record


def _write_record(file: Path, record: dict[str, Any]) -> None:
    temporary = Path(f"{file}.json.new")
    with whole_or_gone(temporary, record_file(file)):
        temporary.write_bytes(to_json(record))
        temporary.replace(record_file(file))


def _rows_done(part: Path, task: dict[str, Any], resume: bool) -> tuple[int, int]:
    """How many rows of this task an earlier run has left, and of how many of them the texts were cut."""
    if not record_file(part).is_file():
        return 0, 0
    if not resume:
        record = _read_record(part)
        raise ValueError(
            f"{part} holds {record['done']} of {record['stop'] - record['start']} rows of a stopped run: "
            f"go on with it with --resume, or remove it and {record_file(part).name}"
        )
    record = _matching_record(part, task)
    return record["done"], record["cut"]


def _matching_record(file: Path, task: dict[str, Any]) -> dict[str, Any]:
    """The record of `file`. Raises ValueError, saying what differs, unless it and the array are of `task`."""
    record = _read_record(file)
    changed = [
        f"another {key}" if key in ("text", "model") else f"{key} {record.get(key)} instead of {task[key]}"
        for key in task
        if record.get(key) != task[key]
    ]
    if changed:
        raise ValueError(
            f"{file} was made otherwise, with {', '.join(changed)}: remove it, or give another name"
        )
    shape = (task["stop"] - task["start"], task["hidden_size"])
    try:
        array = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove it and encode it again") from error
    if array.shape != shape or array.dtype != np.float32:
        raise ValueError(
            f"{file} holds {array.dtype} {array.shape}, not float32 {shape}: remove it and encode it again"
        )
    return record


def _create(file: Path, rows: int, width: int) -> None:
    """An array of zeros on the disk, all of whose room is taken now: a full disk is noticed before the work."""
    with whole_or_gone(file):
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(rows, width))
        if hasattr(os, "posix_fallocate"):
            with file.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


@contextmanager
def whole_or_gone(file: Path, name: Path | None = None) -> Iterator[None]:
    """A file is written in here; if that fails, it is removed. A disk's error calls it `name`, if given."""
    try:
        yield
    except BaseException as error:
        file.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{name or file} cannot be written: {error.strerror or error}") from error
        raise


def _write(file: Path, row: int, block: NDArray[np.float32]) -> None:
    """Rows of an array on the disk. (Where a map of it met a full disk, the process would be killed.)"""
    try:
        with file.open("r+b") as stream:
            np.lib.format.read_magic(stream)
            np.lib.format.read_array_header_1_0(stream)  # after which the rows begin
            stream.seek(row * block.shape[1] * block.itemsize, os.SEEK_CUR)
            stream.write(np.ascontiguousarray(block).data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error.strerror or error}") from error


def _publish(part: Path, target: Path) -> None:
    """Gives a whole array and its record their names. At no moment is the record another array's."""
    record_file(target).unlink(missing_ok=True)
    part.replace(target)
    record_file(part).replace(record_file(target))
