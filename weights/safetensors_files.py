"""Validated reading and all-or-nothing writing of safetensors directories.

Reading maps the file into memory: the tensors are private, copy-on-write views of it, so nothing
is copied until it is used and training never touches the file.
Format: 8 bytes little-endian header length, a JSON header, then the raw tensors.
"""

import json
import os
import shutil
from collections.abc import Container, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights.json_files import CheckpointError, read_json
from weights.locks import taking_turns

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
HEADS = "heads.json"  # which a MultiTaskModel writes beside its encoder
NOT_LOADED = (PICKLE, "pytorch_model.bin.index.json", "tf_model.h5", "model.ckpt.index")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its published key, memory-mapped.

    Reads `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: no safetensors file, or one that is damaged, truncated or not what its
            name says; a shard that is missing or does not hold what the index promises.
    """
    if (directory / SINGLE).is_file():
        return read_file(directory / SINGLE)
    if (directory / INDEX).is_file():
        return _read_shards(directory / INDEX)
    other = next((name for name in NOT_LOADED if (directory / name).is_file()), None)
    if other == PICKLE:
        raise CheckpointError(
            f"{directory} holds its weights only as {PICKLE} (a pickle, which is not loaded): "
            f"convert it with `python -m minibert convert {directory} NEW_DIRECTORY` and load that"
        )
    found = f"only {other}" if other else f"neither {SINGLE} nor {INDEX}"
    inside = min((path.parent for path in directory.glob(f"[!.]*/{SINGLE}")), default=None)
    way_out = f"give {inside} instead" if inside else f"a model directory needs {SINGLE}"
    raise CheckpointError(f"{directory} holds {found}: {way_out}")


def read_index(index: Path) -> dict[str, str]:
    """Which shard holds each tensor. Raises CheckpointError where the index does not say."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it does not say which shard holds what")
    return {key: str(shard) for key, shard in weight_map.items()}


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = read_index(index)
    shards = sorted(set(weight_map.values()))
    # a path that leads out of the directory is none that was published
    missing = [s for s in shards if ".." in s or Path(s).anchor or not (index.parent / s).is_file()]
    if missing:
        raise CheckpointError(f"{index} lists shards that are not there: {', '.join(missing)}")
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in shards:
        try:
            held = read_file(index.parent / shard)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            tensors |= {key: t for key, t in held.items() if weight_map.get(key, shard) == shard}
    if problems:
        raise CheckpointError("; ".join(problems))
    if absent := sorted(set(weight_map) - set(tensors)):
        raise CheckpointError(
            f"{index} lists {len(absent)} tensors that no shard holds, the first is {absent[0]}"
        )
    return tensors


def read_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by its key, memory-mapped. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} {_what_it_is(path)} ({error}): fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def why_no_weights(path: Path) -> str | None:
    """What a file is instead of weights, told by its first bytes; None if it may hold some."""
    with path.open("rb") as file:
        head = file.read(256)
    if not head:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer of a few bytes, not the weights it points to"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page saved under this name, not weights"
    return None


def _what_it_is(path: Path) -> str:
    """Says why safetensors refuses a file, from its size and first bytes."""
    if reason := why_no_weights(path):
        return reason
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        header = file.read(header_size) if header_size <= size - 8 else b""
    if start.startswith((b"PK", b"\x80\x02")):
        return "is a PyTorch pickle under this name, not safetensors"
    try:
        ends = [v["data_offsets"][1] for k, v in json.loads(header).items() if k != "__metadata__"]
        promised = 8 + header_size + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return f"is not a whole safetensors file, its {size} bytes hold no valid header"
    if size < promised:
        return f"is truncated, it holds {size} of the {promised} bytes its header promises"
    return "is a damaged safetensors file"


def as_directory(directory: str | Path) -> Path:
    """As a path. Raises ValueError for what names none: None, or "" (of a variable that is not set)."""
    if not isinstance(directory, str | os.PathLike) or not os.fspath(directory):
        raise ValueError(f"directory is {directory!r:.40}, it must be the path of one to save into")
    return Path(directory)


def write_directory(directory: Path, files: Mapping[str, bytes | Mapping[str, Tensor] | None]) -> None:
    """Writes files (relative name -> bytes, or tensors as safetensors); if one cannot be, none changes.

    None means that there is to be no file of this name: one of an earlier model is removed.

    Everything is written and flushed to a temporary place first. A new directory then appears in one
    rename. In an existing one a single file is replaced whole; of several the old ones are put aside before
    the new ones come, config.json being the first to go and the last to come: without it nobody loads some
    old and some new ones. Processes that save into one directory take turns.

    Raises:
        CheckpointError: the destination cannot be written, or holds heads, which would stand on another
            encoder.
        TypeError: neither bytes nor tensors.
    """
    directory = Path(os.path.realpath(directory))  # `..` and links have no place to rename to
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give a directory to save into")
    if taken := next((name for name in files if (directory / name).is_dir()), None):
        raise CheckpointError(f"{directory} cannot be written: its {taken} is a directory")
    for name, content in files.items():
        tensors = content.values() if isinstance(content, Mapping) else []
        if not isinstance(content, bytes | Mapping | None) or not all(isinstance(t, Tensor) for t in tensors):
            raise TypeError(f"{name} is a {type(content).__name__}, it must be bytes, or tensors by name")
    _refuse_heads(directory, files)
    place = directory if directory.is_dir() else directory.parent  # on the same file system in either case
    # not tempfile's: on Windows what is moved out of one can be read by its owner alone
    fresh = place / f".saving-{os.urandom(4).hex()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        for name, content in files.items():
            if content is not None:
                _write(fresh / name, content)
        if not _renamed(fresh, directory):
            with taking_turns(directory):
                _refuse_heads(directory, files)  # which another process may have saved meanwhile
                _exchange(fresh, directory, list(files))
    except (OSError, SafetensorError) as error:  # a full disk comes as the latter
        raise CheckpointError(f"{directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def last_save(directory: Path) -> tuple[int, int] | None:
    """A mark that differs after each `write_directory` of a model; None in the middle of one."""
    try:
        status = (directory / "config.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def check_same_save(directory: Path, mark: tuple[int, int] | None) -> None:
    """Raises CheckpointError unless all that was read since `last_save` gave this mark is of one save."""
    if last_save(directory) != mark:
        raise CheckpointError(f"{directory} was saved to while it was read: load it again")


def _refuse_heads(directory: Path, files: Container[str]) -> None:
    if SINGLE in files and HEADS not in files and (directory / HEADS).exists():
        raise CheckpointError(
            f"{directory} holds heads of another encoder: give another directory, or remove its {HEADS}"
        )


def _renamed(fresh: Path, directory: Path) -> bool:
    """Makes it the directory, unless there is one, which another process may have made just now."""
    if directory.is_dir():
        return False
    try:
        fresh.rename(directory)
    except OSError:
        if not directory.is_dir() or not fresh.is_dir():
            raise
        return False
    return True


def _exchange(fresh: Path, directory: Path, names: list[str]) -> None:
    """Puts the files of `fresh` in the place of the old ones; if one cannot be, all old ones come back."""
    if len(names) == 1 and (fresh / names[0]).exists():
        (fresh / names[0]).replace(directory / names[0])  # at no moment is there none
        return
    names = sorted(names, key=lambda name: name == "config.json")
    old, begun = Path(f"{fresh}.old"), []  # not in `fresh`, which goes: what cannot come back stays
    try:
        for name in reversed(names):
            _move(name, directory, old)
        for name in names:
            begun.append(name)
            _move(name, fresh, directory)
    except BaseException:
        try:
            for name in reversed(begun):
                if os.path.lexists(directory / name):
                    (directory / name).unlink()
            for name in names:
                _move(name, old, directory)
        except OSError as error:
            raise OSError(f"{error}; what was there before lies in {old}") from error
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move(name: str, source: Path, target: Path) -> None:
    """A file, if it is there."""
    if os.path.lexists(source / name):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).replace(target / name)


def _write(path: Path, content: bytes | Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.touch()
        permissions = path.stat().st_mode  # safetensors would leave the file readable by its owner only
        # some programs refuse a file that does not say "pt"
        save_file(_unshared(content), path, metadata={"format": "pt"})
        path.chmod(permissions)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own, as safetensors wants it: tied weights are written twice."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        memory = whole.untyped_storage().data_ptr()
        separate[key] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return separate
