"""python -m minibert encode | fetch | convert | parity"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from weights import resolve
from weights.catalog import CATALOG, find
from weights.convert import convert
from weights.hub import verify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MODEL = "bert-base-uncased"
SHOWN = 10  # sentences whose numbers and cosines are printed


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    0: done. 1: parity found a difference. 2: an error, in one sentence on stderr. 130: interrupted.
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter still shows the rest
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError) as error:  # CheckpointError and ModelNotFoundError among them
        print(f"minibert: error: {error}", file=sys.stderr)
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
    encode.add_argument("--batch-size", type=int, metavar="N", help="sentences per forward pass (default: 32)")
    encode.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="scale each vector to length 1 (default: as the model says)",
    )
    encode.set_defaults(run=_encode)

    fetch = commands.add_parser("fetch", help="download a model once, or say where it lies")
    fetch.add_argument("model", nargs="?", default=DEFAULT_MODEL, metavar="MODEL", help=model_help)
    fetch.add_argument("--verify", action="store_true", help="compare its sha256 with the catalog's")
    fetch.set_defaults(run=_fetch)

    conversion = commands.add_parser("convert", help="pytorch_model.bin -> a directory with safetensors")
    conversion.add_argument("model", metavar="MODEL", help="a directory or name whose weights are a .bin file")
    conversion.add_argument("directory", type=Path, metavar="NEW_DIRECTORY", help="where to write the result")
    conversion.set_defaults(run=_convert)

    parity = commands.add_parser("parity", help="compare with transformers, bit by bit (needs transformers)")
    parity.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model_help)
    parity.set_defaults(run=_parity)
    return parser


def _encode(arguments: argparse.Namespace) -> int:
    output: Path | None = arguments.output
    if output is not None:
        _check_output(output)
    sentences = _read_sentences(arguments.sentences)
    from minibert.sentence_encoder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(arguments.model)
    embeddings = encoder.encode(sentences, arguments.batch_size, normalize_embeddings=arguments.normalize)
    if output is not None:
        _write_embeddings(output, embeddings)  # before anything is printed: the reader may have gone
    _print_embeddings(sentences, embeddings)
    if output is not None:
        print(f"\nwrote {output}: {embeddings.shape[0]} x {embeddings.shape[1]} float32")
    return 0


def _check_output(output: Path) -> None:
    """What can be known to fail is said before the work, not after it."""
    if output.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"cannot write {output}: its name must end in .npy or .safetensors")
    if output.is_dir():
        raise ValueError(f"cannot write {output}: it is a directory")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"cannot write {output}: {output.parent} is no directory that can be written to")


def _read_sentences(given: list[str]) -> list[str]:
    if not given and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("nothing to encode: give sentences, a text file, or pipe text in")
    if given in ([], ["-"]):
        return _lines("standard input", sys.stdin.buffer)
    # A file's name is not a sentence: reading it, or saying that it is not there, is what was meant.
    is_file = os.path.exists if len(given) == 1 else os.path.isfile  # False, not an error, for a long sentence
    files = [name for name in given if is_file(name) or name.endswith(".txt")]
    if not files:
        return given
    if len(given) > 1:
        raise ValueError(f"{files[0]} is a file among sentences: give one file alone, or pipe text in")
    with Path(given[0]).open("rb") as stream:
        return _lines(given[0], stream)


def _lines(name: str, stream: Iterable[bytes]) -> list[str]:
    """One sentence a line. An empty line is an empty sentence, so row i is always line i."""
    sentences = []
    for number, line in enumerate(stream, start=1):
        try:
            sentences.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start})"
            ) from error
    if not sentences:
        raise ValueError(f"{name} is empty: nothing to encode")
    return sentences


def _print_embeddings(sentences: list[str], embeddings: NDArray[np.float32]) -> None:
    print(f"embeddings: {embeddings.shape[0]} x {embeddings.shape[1]} {embeddings.dtype}")
    shown = range(min(len(sentences), SHOWN))
    for i in shown:
        numbers = " ".join(f"{x:8.4f}" for x in embeddings[i, :5])
        print(f"[{i}] {numbers} ...  {sentences[i]:.60}")
    if len(sentences) > SHOWN:
        print(f"... and {len(sentences) - SHOWN} more")
    lengths = (embeddings[: len(shown)] ** 2).sum(axis=1, keepdims=True) ** 0.5
    units = embeddings[: len(shown)] / lengths.clip(min=1e-12)
    print("\ncosine  " + " ".join(f"{f'[{i}]':>7}" for i in shown))
    for i in shown:
        print(f"{f'[{i}]':>6}  " + " ".join(f"{units[i] @ units[j]:7.4f}" for j in shown))


def _write_embeddings(output: Path, embeddings: NDArray[np.float32]) -> None:
    """Under a temporary name first, so that no half-written file can be taken for a whole one."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}{output.suffix}")
    try:
        if output.suffix == ".npy":
            import numpy as np

            np.save(temporary, embeddings)
        else:
            from safetensors.numpy import save

            temporary.write_bytes(save({"embeddings": embeddings}))
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _fetch(arguments: argparse.Namespace) -> int:
    directory = resolve(arguments.model)
    print(f"{arguments.model}: {directory}")
    if arguments.verify:
        entry = find(arguments.model)
        if entry is None:
            known = ", ".join(e.name for e in CATALOG)
            raise ValueError(f"{arguments.model} is not in the catalog ({known}), which pins no sha256 for it")
        verify(directory, entry)
        print(f"{entry.file}: sha256 {entry.sha256}, as pinned")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    convert(arguments.model, arguments.directory)
    print(f"wrote {arguments.directory}: load it with --model {arguments.directory}")
    return 0


def _parity(arguments: argparse.Namespace) -> int:
    from minibert.parity import run

    return run(arguments.model)


if __name__ == "__main__":
    sys.exit(main())
