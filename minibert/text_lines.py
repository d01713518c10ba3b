"""Text files, line by line."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path


def decoded(name: str, stream: Iterable[bytes]) -> Iterator[str]:
    """The lines as text, ends included. Raises UnicodeError, saying where, at what is not UTF-8."""
    for number, line in enumerate(stream, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = error.object[error.start]  # of a first line after its mark
            raise UnicodeError(
                f"{name}, line {number}: not UTF-8 (byte 0x{byte:02x} at position {error.start})"
            ) from error


def read_lines(name: str, stream: Iterable[bytes]) -> Iterator[str]:
    """One sentence a line; an empty line is an empty sentence, so that row i is always line i.

    Raises:
        ValueError: not UTF-8 (says where), or empty.
    """
    line = None
    for line in decoded(name, stream):
        yield line.rstrip("\r\n")
    if line is None:
        raise ValueError(f"{name} is empty: nothing to encode")


@dataclass(frozen=True)
class Lines:
    """The lines of a text file from `start` up to, not including, `stop`."""

    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as stream:
            yield from islice(read_lines(str(self.path), stream), self.start, self.stop)
