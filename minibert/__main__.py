"""python -m minibert encode | merge | fetch | convert | parity"""

import argparse
import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from minibert import parity
from minibert.devices import find_device
from minibert.encode_file import Shard, encode_file, merge, record_file, whole_or_gone
from minibert.memory import is_out_of_memory
from minibert.model import BertModel
from minibert.sentence_encoder import SentenceEncoder
from minibert.text_lines import Lines, read_lines
from weights import resolve
from weights.catalog import CATALOG, find
from weights.convert import convert
from weights.hub import MODULES, fetch_pooling, verify
from weights.safetensors_files import INDEX, PICKLE, SINGLE

DEFAULT_MODEL = "bert-base-uncased"
TABLES = (".csv", ".tsv", ".jsonl")
SHOWN = 10  # sentences whose numbers and cosines are printed


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done. 1: parity found a difference. 2: an error, in one sentence on stderr. 130: interrupted.
    141: nobody reads standard output any more.
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter still shows the rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status: int = arguments.run(arguments) or 0  # None of a command that can only succeed
        print(end="", flush=True)  # whether anybody reads the last lines is noticed now
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError) as error:  # CheckpointError and ModelNotFoundError among them
        print(f"minibert: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = ", try a smaller --batch-size" if "batch_size" in arguments else ""
        print(f"minibert: error: out of memory{hint}", file=sys.stderr)
        return 2


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"minibert: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minibert", description="BERT in pure PyTorch: sentence embeddings and checkpoints."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    model_help = (
        "a directory, org/name on the hub, or one of "
        f"{', '.join(entry.name for entry in CATALOG)} (default: %(default)s)"
    )

    encode = commands.add_parser("encode", help="turn sentences into vectors")
    encode.add_argument(
        "sentences",
        nargs="*",
        metavar="SENTENCE",
        help="sentences; or one text file with a sentence a line; or - (or nothing) for standard input",
    )
    encode.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model_help)
    encode.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write them to a .npy or .safetensors file"
    )
    encode.add_argument(
        "--batch-size", type=int, metavar="N", help="sentences per forward pass (default: what fills a budget)"
    )
    encode.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="what to compute in (default: as stored)"
    )
    encode.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto, a GPU if there is one)"
    )
    encode.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale each vector to length 1 (default: as the model says)",
    )
    encode.add_argument("--resume", action="store_true", help="go on with a stopped run of FILE.npy")
    encode.add_argument(
        "--shard",
        metavar="I/N",
        help="only part I of N, into FILE-0000I-of-0000N.npy (under torchrun: each process its own part)",
    )
    encode.set_defaults(run=_encode)

    joining = commands.add_parser("merge", help="join the shards of a .npy file, and check that all are there")
    joining.add_argument("output", type=Path, metavar="FILE.npy", help="as it was given to `encode -o`")
    joining.set_defaults(run=_merge)

    fetch = commands.add_parser("fetch", help="download a model once, or say where it lies")
    fetch.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=model_help)
    fetch.add_argument("--verify", action="store_true", help="compare its sha256 with the catalog's")
    fetch.set_defaults(run=_fetch)

    conversion = commands.add_parser("convert", help="pytorch_model.bin -> a directory with safetensors")
    conversion.add_argument("model", metavar="MODEL", help="a directory or name whose weights are a .bin file")
    conversion.add_argument("directory", metavar="NEW_DIRECTORY", help="where to write the result")
    conversion.set_defaults(run=_convert)

    checking = commands.add_parser("parity", help="compare with transformers, bit by bit (needs transformers)")
    checking.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model_help)
    checking.set_defaults(run=lambda arguments: parity.run(arguments.model))
    return parser


def _encode(arguments: argparse.Namespace) -> None:
    output: Path | None = arguments.output
    if output is not None:
        _check_output(output)
    file = _text_file(arguments.sentences)
    if file is not None:
        file.stat()  # if it is not there, that is said, whatever else is asked
    if file is not None and output is not None and output.suffix == ".npy" and file.is_file():
        _encode_file(arguments, file, output)
        return
    if arguments.resume or arguments.shard is not None:
        raise ValueError("--resume and --shard need a text file and -o FILE.npy")
    if output is not None and Shard.from_torchrun():
        raise ValueError(f"several processes would write {output}: give them a text file and -o FILE.npy")
    words = " ".join(arguments.sentences).split()
    if output is not None and file is None and len(words) == 1 and words != ["-"]:
        warnings.warn(f"there is no file {words[0]}: it is encoded as a sentence", stacklevel=1)
    sentences = _sentences(arguments.sentences, file)
    embeddings = _load(arguments).encode(sentences, arguments.batch_size, arguments.normalize)
    if output is not None:
        _write_embeddings(output, embeddings)  # before anything is printed: the reader may have gone
    _print_embeddings(sentences[:SHOWN], embeddings)
    if output is not None:
        _print_written(output, embeddings)


def _encode_file(arguments: argparse.Namespace, file: Path, output: Path) -> None:
    shard = Shard.parse(arguments.shard) if arguments.shard is not None else Shard.from_torchrun()
    written = encode_file(
        _load(arguments),
        file,
        output,
        batch_size=arguments.batch_size,
        normalize_embeddings=arguments.normalize,
        shard=shard,
        resume=arguments.resume,
    )
    embeddings = np.load(written, mmap_mode="r")
    if shard is None:
        _print_embeddings(list(Lines(file, 0, min(SHOWN, len(embeddings)))), embeddings)
    _print_written(written, embeddings)
    if shard is not None:
        print(f"once all are there: python -m minibert merge {output}")


def _merge(arguments: argparse.Namespace) -> None:
    count = merge(arguments.output)
    print(f"wrote {arguments.output} from {count} shards, which can be removed")


def _load(arguments: argparse.Namespace) -> SentenceEncoder:
    device = find_device(arguments.device)
    encoder = SentenceEncoder.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype) if arguments.dtype else None
    )
    return encoder.to(device)


def _check_output(output: Path) -> None:
    """What can be known to fail is said before the work, not after it."""
    if output.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"cannot write {output}: its name must end in .npy or .safetensors")
    if output.is_dir():
        raise ValueError(f"cannot write {output}: it is a directory")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"cannot write {output}: {output.parent} is no directory that can be written to")


def _text_file(given: list[str]) -> Path | None:
    """The file that was given instead of sentences."""
    # A file's name is not a sentence: reading it, or saying that it is not there, is what was meant. One alone
    # may also be a pipe. (os.path's functions answer False for a long sentence, where Path's raise.)
    is_there = os.path.exists if len(given) == 1 else os.path.isfile
    files = [name for name in given if is_there(name) or _looks_like_a_file(name)]
    if files and len(given) > 1:
        raise ValueError(f"{files[0]} is a file among sentences: give one file alone, or pipe text in")
    if files and files[0].endswith(TABLES) and is_there(files[0]):
        warnings.warn(
            f"each line of {files[0]} is taken for a sentence, with names, separators and labels", stacklevel=1
        )
    return Path(files[0]) if files else None


def _looks_like_a_file(name: str) -> bool:
    return name.endswith(".txt") or (name.endswith(TABLES) and len(name.split()) == 1)


def _sentences(given: list[str], file: Path | None) -> list[str]:
    if file is not None:
        with file.open("rb") as stream:
            return list(read_lines(str(file), stream))
    if given not in ([], ["-"]):
        return given
    if sys.stdin is None or (not given and sys.stdin.isatty()):
        raise ValueError("nothing to encode: give sentences, a text file, or pipe text in")
    return list(read_lines("standard input", sys.stdin.buffer))


def _print_embeddings(sentences: list[str], embeddings: NDArray[np.float32]) -> None:
    """The numbers and cosines of the first embeddings, whose sentences are given."""
    print(f"embeddings: {embeddings.shape[0]} x {embeddings.shape[1]} {embeddings.dtype}")
    shown = range(len(sentences))
    for i in shown:
        numbers = " ".join(f"{x:8.4f}" for x in embeddings[i, :5])
        print(f"[{i}] {numbers} ...  {sentences[i]:.60}")
    if len(embeddings) > len(shown):
        print(f"... and {len(embeddings) - len(shown)} more")
    first = embeddings[: len(shown)]
    units = first / np.linalg.norm(first, axis=1, keepdims=True).clip(min=1e-12)
    print("\ncosine  " + " ".join(f"{f'[{i}]':>7}" for i in shown))
    for i in shown:
        print(f"{f'[{i}]':>6}  " + " ".join(f"{cosine:7.4f}" for cosine in units @ units[i]))


def _print_written(output: Path, embeddings: NDArray[np.float32]) -> None:
    print(f"\nwrote {output}: {embeddings.shape[0]} x {embeddings.shape[1]} float32")


def _write_embeddings(output: Path, embeddings: NDArray[np.float32]) -> None:
    """Under a temporary name first, so that no half-written file can be taken for a whole one."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}{output.suffix}")
    with whole_or_gone(temporary, output):
        if output.suffix == ".npy":
            content = io.BytesIO()
            np.save(content, embeddings)  # into a file it would not notice that the last bytes found no room
            temporary.write_bytes(content.getvalue())
            record_file(output).unlink(missing_ok=True)  # of an array that was here before
        else:
            temporary.write_bytes(save({"embeddings": embeddings}))
        temporary.replace(output)


def _fetch(arguments: argparse.Namespace) -> None:
    directory = resolve(arguments.model)
    if not any((directory / name).is_file() for name in (SINGLE, INDEX, PICKLE)):
        raise ValueError(f"{directory} has no weights that can be read, such as {SINGLE}")
    if not fetch_pooling(directory):  # which transformers may not have fetched
        warnings.warn(f"{directory} lacks {MODULES}, and the hub cannot be asked for it", stacklevel=1)
    print(f"{arguments.model}: {directory}")
    if arguments.verify:
        entry = find(arguments.model)
        if entry is None:
            known = ", ".join(e.name for e in CATALOG)
            raise ValueError(f"{arguments.model} is not in the catalog ({known}), which pins no sha256 for it")
        verify(directory, entry)
        print(f"{entry.file}: sha256 {entry.sha256}, as pinned")


def _convert(arguments: argparse.Namespace) -> None:
    convert(arguments.model, arguments.directory)
    BertModel.from_pretrained(arguments.directory)  # what else does not fit is said now
    print(f"wrote {arguments.directory}: load it with --model {arguments.directory}")


if __name__ == "__main__":
    sys.exit(main())
