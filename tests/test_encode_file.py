"""`python -m minibert encode FILE -o OUT.npy`: resumed, in shards and in blocks it gives the same file."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minibert import SentenceEncoder, sentence_encoder
from minibert.__main__ import main
from minibert.encode_file import Shard, encode_file, merge
from tests import forked
from weights.json_files import read_json
from weights.locks import locked

LINES = [f"sentence {i} " + "is long " * (i * 7 % 5) for i in range(23)]


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sentence_encoder, "BLOCK_SENTENCES", 4)
    (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n")
    return tmp_path / "in.txt"


def encode(model: Path, text: Path, *arguments: str, output: str = "out.npy") -> int:
    command = ["encode", "--model", str(model), str(text), "-o", str(text.with_name(output)), "--device", "cpu"]
    return main([*command, *arguments])


def files(text: Path) -> set[str]:
    return {path.name for path in text.parent.iterdir()} - {"in.txt"}


def assert_holds(text: Path, model: Path, lines: list[str]) -> None:
    """That out.npy is what `encode` gives for these lines."""
    expected = SentenceEncoder.from_pretrained(model).encode(lines)
    np.testing.assert_array_equal(np.load(text.with_name("out.npy")), expected)


def encode_and_stop(
    model: Path, text: Path, *arguments: str, after: int, error: BaseException | None = None
) -> int:
    """Lets so many blocks be computed, then raises; KeyboardInterrupt if no `error` is given."""
    whole = sentence_encoder._read_block

    def read_block(texts: Iterator[str]) -> list[str]:
        nonlocal after
        after -= 1
        if after < 0:  # a block is written before the next one is read
            raise error or KeyboardInterrupt
        return whole(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentence_encoder, "_read_block", read_block)
        return encode(model, text, *arguments)


def encode_in_two_shards(model: Path, text: Path, **output: str) -> None:
    for shard in ("1/2", "2/2"):
        assert encode(model, text, "--shard", shard, **output) == 0


def test_a_file_is_what_encode_gives(small: Path, text: Path) -> None:
    assert encode(small, text) == 0
    assert files(text) == {"out.npy", "out.npy.json"}
    assert_holds(text, small, LINES)


def test_a_stopped_run_goes_on_where_it_was(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode_and_stop(small, text, after=2) == 130
    assert "stopped after 8 of 23 rows: --resume goes on there" in capsys.readouterr().err
    assert files(text) == {"out.npy.part", "out.npy.part.json"}
    assert encode(small, text) == 2
    assert "out.npy.part holds 8 of 23 rows of a stopped run: go on with it with --resume, or remove it" in (
        capsys.readouterr().err
    )
    encoded: list[str] = []
    whole = sentence_encoder._read_block

    def read_block(texts: Iterator[str]) -> list[str]:
        block = whole(texts)
        encoded.extend(block)
        return block

    monkeypatch.setattr(sentence_encoder, "_read_block", read_block)
    assert encode(small, text, "--resume") == 0
    assert encoded == LINES[8:]
    assert files(text) == {"out.npy", "out.npy.json"}
    assert_holds(text, small, LINES)
    encoded.clear()
    assert encode(small, text, "--resume") == 0  # it is whole: nothing to do
    assert encoded == []


def test_a_disk_that_is_full_in_the_middle(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where there is no posix_fallocate, which takes all the room at first."""
    room = [4, 4]

    def fsync(_: int) -> None:
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room.pop()

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert encode(small, text) == 2
    assert "out.npy.part cannot be written: No space left on device" in capsys.readouterr().err
    assert read_json(text.with_name("out.npy.part.json"))["done"] == 8
    assert encode(small, text, "--resume") == 0
    assert_holds(text, small, LINES)
    encode_in_two_shards(small, text, output="all.npy")
    before = files(text)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert main(["merge", str(text.with_name("all.npy"))]) == 2
    assert "all.npy.merging cannot be written: No space left on device" in capsys.readouterr().err
    assert files(text) == before


def test_where_there_are_no_locks(small: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows a file that is open cannot be removed: there is to be none."""
    monkeypatch.setattr("weights.locks.fcntl", None)
    with locked(text):
        assert not files(text)
    assert encode(small, text) == 0


@pytest.mark.filterwarnings("default:.* texts cut to")
def test_texts_that_were_cut_before_a_stop_are_said(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "a " * 600
    text.write_text("\n".join([long, *LINES[1:20], long, long]) + "\n")
    with pytest.raises(SystemExit):  # as good as a kill
        encode_and_stop(small, text, after=2, error=SystemExit())
    capsys.readouterr()
    assert encode(small, text, "--resume") == 0
    assert "warning: 3 of 22 texts cut to " in capsys.readouterr().err
    assert read_json(text.with_name("out.npy.json"))["cut"] == 3
    encode_in_two_shards(small, text)
    assert "warning: 2 of 11 texts cut to " in capsys.readouterr().err
    assert main(["merge", str(text.with_name("out.npy"))]) == 0
    assert read_json(text.with_name("out.npy.json"))["cut"] == 3


@pytest.mark.slow
def test_a_killed_run_goes_on(small: Path, text: Path) -> None:
    code = f"""
import os, signal
from minibert import sentence_encoder
from minibert.__main__ import main
def read_block(texts, whole=sentence_encoder._read_block, done=[]):
    done.append(1)
    return whole(texts) if len(done) < 4 else os.kill(os.getpid(), signal.SIGKILL)
sentence_encoder.BLOCK_SENTENCES, sentence_encoder._read_block = 4, read_block
main({["encode", "--model", str(small), str(text), "-o", str(text.with_name("out.npy")), "--device", "cpu"]})
"""
    killed = forked.run(("-c", code), os.environ, text.parent)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_json(text.with_name("out.npy.part.json"))["done"] == 12
    assert encode(small, text, "--resume") == 0
    assert files(text) == {"out.npy", "out.npy.json"}
    assert_holds(text, small, LINES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--no-normalize"], "normalize_embeddings True instead of False"),
        (["--dtype", "bfloat16"], "dtype float32 instead of bfloat16"),
        ("text", "out.npy.part was made otherwise, with another text"),
        ("line", "out.npy.part was made otherwise, with another text"),
        ("pooling", "pooling mean instead of cls"),
        ("model", "out.npy.part was made otherwise, with another model"),
        ("tokenizer", "out.npy.part was made otherwise, with another model"),
    ],
)
def test_another_run_cannot_be_gone_on_with(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    assert encode_and_stop(small, text, "--normalize", after=1) == 130
    model = small
    if change == "text":
        text.write_text("\n".join(LINES[::-1]) + "\n")
    elif change == "line":  # a letter of the second one is the first one's
        text.write_text("\n".join([LINES[0] + LINES[1][0], LINES[1][1:], *LINES[2:]]) + "\n")
    elif change in ("model", "tokenizer", "pooling"):
        model = text.parent / "model"
        encoder = SentenceEncoder.from_pretrained(small)
        if change == "pooling":
            encoder.pooling = "cls"
        elif change == "model":
            with torch.no_grad():
                encoder.model.get_parameter("layers.1.feed_forward.up.bias")[5] += 1e-3
        else:
            encoder.tokenizer.backend.add_tokens(["unheard-of"])
        encoder.save_pretrained(model)
    options = change if isinstance(change, list) else ["--normalize"]
    assert encode(model, text, "--resume", *options) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_at_once_leaves_nothing(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode_and_stop(small, text, after=0, error=OSError("no more")) == 2
    assert encode(small, text, "--batch-size", "0") == 2
    text.write_bytes(b"fine\nb\xe4d\n")
    assert encode(small, text) == 2
    assert "in.txt, line 2: not UTF-8 (byte 0xe4 at position 1)" in capsys.readouterr().err
    assert files(text) == set()


def test_a_block_without_its_record_does_not_count(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = sys.modules["minibert.encode_file"]
    write, records = module._write_record, []

    def stopping(*record: Any) -> None:
        records.append(record)
        if len(records) == stop:
            raise KeyboardInterrupt
        write(*record)

    for stop, message in (
        (1, "stopped after 0 of 23 rows, before the first were written"),
        (3, "after 8 of 23"),
    ):
        records.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, "_write_record", stopping)
            assert encode(small, text) == 130
        assert message in capsys.readouterr().err
        assert bool(files(text)) == (stop > 1)
    assert encode(small, text, "--resume") == 0
    assert_holds(text, small, LINES)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no way to ask for room on the disk")
def test_a_full_disk_is_noticed_before_the_work(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert encode(small, text) == 2
    assert "out.npy.part cannot be written: No space left on device\n" in capsys.readouterr().err
    assert files(text) == set()


def test_where_a_model_lies_does_not_matter(small: Path, text: Path) -> None:
    assert encode_and_stop(small, text, after=1) == 130
    copy = text.parent / "copy"
    SentenceEncoder.from_pretrained(small).save_pretrained(copy)
    assert encode(copy, text, "--resume") == 0


def test_only_the_array_was_removed(small: Path, text: Path) -> None:
    """Its record must not make zeros of the next run's rows."""
    assert encode_and_stop(small, text, after=2) == 130
    text.with_name("out.npy.part").unlink()
    with pytest.raises(SystemExit):
        encode_and_stop(small, text, after=0, error=SystemExit())
    assert encode(small, text, "--resume") == 0
    assert_holds(text, small, LINES)


def test_a_kill_between_the_two_renames(small: Path, text: Path) -> None:
    assert encode(small, text) == 0
    text.with_name("out.npy.json").replace(text.with_name("out.npy.part.json"))
    before = text.with_name("out.npy").stat().st_mtime_ns
    assert encode(small, text, "--resume") == 0
    assert text.with_name("out.npy").stat().st_mtime_ns == before  # nothing was encoded again
    assert files(text) == {"out.npy", "out.npy.json"}


def test_a_record_whose_array_is_gone_is_not_an_older_arrays(small: Path, text: Path) -> None:
    assert encode_and_stop(small, text, "--normalize", after=2) == 130
    part = text.with_name("out.npy.part")
    part.replace(text.with_name("out.npy"))  # as large as the whole, but not that
    assert encode(small, text, "--normalize", "--resume") == 0
    assert files(text) == {"out.npy", "out.npy.json"}
    lengths = np.linalg.norm(np.load(text.with_name("out.npy")), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_a_whole_array_whose_record_says_otherwise(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(small, text) == 0
    record = text.with_name("out.npy.json")
    record.write_text(record.read_text().replace(f'"done": {len(LINES)}', '"done": 1'))
    assert encode(small, text, "--resume") == 2
    assert f"done 1 instead of {len(LINES)}" in capsys.readouterr().err


def test_a_damaged_record_whose_array_is_gone(small: Path, text: Path) -> None:
    for damage in ("", "{}"):
        text.with_name("out.npy.part.json").write_text(damage)
        assert encode(small, text) == 0
        assert files(text) == {"out.npy", "out.npy.json"}
    assert_holds(text, small, LINES)


def test_a_kill_while_an_older_array_is_replaced(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one's record must not be taken for the new one's."""
    assert encode(small, text) == 0
    text.write_text("\n".join(LINES[::-1]) + "\n")
    replace = Path.replace

    def then_die(path: Path, target: Path) -> None:
        replace(path, target)
        if path.name == "out.npy.part":
            raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", then_die)
        with pytest.raises(SystemExit):
            encode(small, text)
    assert files(text) == {"out.npy", "out.npy.part.json"}
    assert encode(small, text, "--resume") == 0
    assert files(text) == {"out.npy", "out.npy.json"}
    assert_holds(text, small, LINES[::-1])


def test_a_stopped_run_counts_for_more_than_an_older_whole_one(small: Path, text: Path) -> None:
    assert encode(small, text) == 0
    text.write_text("\n".join(LINES[::-1]) + "\n")
    assert encode_and_stop(small, text, after=2) == 130
    assert encode(small, text, "--resume") == 0
    assert_holds(text, small, LINES[::-1])


@pytest.mark.parametrize("shard", [[], ["--shard", "2/2"]], ids=["whole", "shard"])
@pytest.mark.parametrize("lines", [LINES[:6], LINES[::-1]], ids=["shorter", "other"])
def test_a_text_that_changes_meanwhile(
    small: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    shard: list[str],
) -> None:
    whole = sentence_encoder._read_block

    def read_block(texts: Iterator[str]) -> list[str]:
        text.write_text("\n".join(lines) + "\n")
        return whole(texts)

    monkeypatch.setattr(sentence_encoder, "_read_block", read_block)
    assert encode(small, text, *shard) == 2
    assert "in.txt was changed while it was read: encode it again" in capsys.readouterr().err
    assert files(text) == set()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda out: out.with_name("out.npy.json").write_text("{}"),
            "out.npy.json is missing or damaged: remove",
        ),
        (lambda out: out.write_bytes(out.read_bytes()[:-40]), "out.npy is damaged ("),
        (lambda out: out.write_bytes(b""), "out.npy is damaged ("),
        (
            lambda out: np.save(out, np.zeros((1, 36), np.float32)),
            "out.npy holds float32 (1, 36), not float32 (23, 36)",
        ),
        (lambda out: np.save(out, np.zeros((23, 36))), "out.npy holds float64 (23, 36), not float32 (23, 36)"),
    ],
)
def test_a_damaged_result_is_not_called_whole(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str], damage: Any, message: str
) -> None:
    assert encode(small, text) == 0
    damage(text.with_name("out.npy"))
    assert encode(small, text, "--resume") == 2
    assert message in capsys.readouterr().err


def test_another_array_of_that_name_does_not_keep_the_record(small: Path, text: Path) -> None:
    assert encode(small, text) == 0
    assert main(["encode", "--model", str(small), "a sentence", "-o", str(text.with_name("out.npy"))]) == 0
    assert files(text) == {"out.npy"}
    assert encode(small, text, "--resume") == 0
    assert len(np.load(text.with_name("out.npy"))) == 23


def test_a_file_of_the_user_stays(small: Path, text: Path) -> None:
    mine = text.with_name("out.safetensors.json")
    mine.write_text("mine")
    assert encode(small, text, output="out.safetensors") == 0
    assert mine.read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_processes_do_not_write_one_file(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    with text.with_name("out.npy.part.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert encode(small, text) == 2
        assert "out.npy.part is being written by another process" in capsys.readouterr().err
    assert encode(small, text) == 0
    assert encode(small, text, "--shard", "1/1") == 0
    with text.with_name("out.npy.merging.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["merge", str(text.with_name("out.npy"))]) == 2
        assert "out.npy.merging is being written by another process" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(OSError, match="error") if number == errno.EIO else nullcontext(),
        locked(tmp_path / "x"),
    ):
        pass


def test_a_lock_of_a_file_that_is_gone_locks_nothing(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process removes its lock file, and a third makes a new one, between our opening and locking it."""
    import fcntl

    lock, flock = text.with_name("out.npy.part.lock"), fcntl.flock

    def late(*arguments: Any) -> None:
        lock.unlink()
        if third.pop():
            lock.write_bytes(b"")
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    third = [True, False]
    while third:
        assert encode(small, text) == 2
        assert "out.npy.part is being written by another process" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- shards


def test_shards_of_a_longer_name_are_others(small: Path, text: Path) -> None:
    for shard in ("1/2", "2/2"):
        assert encode(small, text, "--shard", shard, output="out.npy") == 0
        assert encode(small, text, "--shard", shard, "--normalize", output="out-v2.npy") == 0
    assert main(["merge", str(text.with_name("out.npy"))]) == 0
    assert_holds(text, small, LINES)


def test_a_damaged_shard_is_named(small: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode_in_two_shards(small, text)
    np.save(text.with_name("out-00002-of-00002.npy"), np.zeros((1, 36), np.float32))
    assert main(["merge", str(text.with_name("out.npy"))]) == 2
    assert "out-00002-of-00002.npy holds float32 (1, 36), not float32 (12, 36)" in capsys.readouterr().err
    assert not any("merging" in name for name in files(text))


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_merged_shards_are_the_file(small: Path, text: Path, count: int) -> None:
    assert encode(small, text) == 0
    for index in range(count, 0, -1):
        assert encode(small, text, "--shard", f"{index}/{count}", output="parts[1].npy") == 0
    assert main(["merge", str(text.with_name("parts[1].npy"))]) == 0
    assert text.with_name("parts[1].npy").read_bytes() == text.with_name("out.npy").read_bytes()
    assert read_json(text.with_name("parts[1].npy.json")) == read_json(text.with_name("out.npy.json"))


def test_a_merge_that_is_interrupted_leaves_nothing(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_in_two_shards(small, text)
    before = files(text)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minibert.encode_file._write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(text.with_name("out.npy"))
    assert files(text) == before


class Projected(SentenceEncoder):
    """With a part of its own behind the pooling."""

    def __init__(self, *arguments: Any, width: int = 36, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.dense = nn.Linear(36, width)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        return self.scale * self.dense(super().forward(*inputs, **named))  # type: ignore[no-any-return]


def test_an_encoder_with_a_part_of_its_own(small: Path, text: Path) -> None:
    encoder = Projected.from_pretrained(small)
    output = str(text.with_name("out.npy"))
    encode_file(encoder, str(text), output)
    np.testing.assert_array_equal(np.load(output), encoder.encode(LINES))
    for index in (1, 2):
        encoder = Projected.from_pretrained(small)  # with other numbers in `dense`
        encode_file(encoder, text, text.with_name("parts.npy"), shard=Shard(index, 2))
    narrow = Projected(encoder.model, encoder.tokenizer, width=5)
    with pytest.raises(ValueError, match="this encoder's `forward` gives 5 numbers, its model has 36: write"):
        encode_file(narrow, text, text.with_name("narrow.npy"))
    assert "narrow.npy.part" not in files(text)
    with pytest.raises(
        ValueError, match=r"00002.npy was made otherwise, with another model: remove it, or give"
    ):
        merge(text.with_name("parts.npy"))


def test_processes_of_torchrun_take_a_shard_each(
    small: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert encode(small, text, output="out.safetensors") == 2
    assert "several processes would write " in capsys.readouterr().err
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert encode(small, text) == 0
    assert {"out-00001-of-00002.npy", "out-00002-of-00002.npy"} < files(text)
    assert main(["merge", str(text.with_name("out.npy"))]) == 0
    assert np.load(text.with_name("out.npy")).shape[0] == 23


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "no shards found, such as "),
        (["1/2 stopped"], "out-00001-of-00002.npy.part is not finished, go on with it by --resume"),
        (
            ["1/2", "2/2", "2/2 stopped"],
            "out-00002-of-00002.npy.part is not finished, go on with it by --resume",
        ),
        (["1/3", "3/3"], "out-00002-of-00003.npy not there, or not finished"),
        (["1/2", "2/2", "1/3"], "there are shards of 2 and of 3, remove those of the other run"),
    ],
)
def test_what_cannot_be_merged(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str], shards: list[str], message: str
) -> None:
    text.with_name("out-of-it-00001-of-00002.npy.part").touch()  # another array's
    for shard, _, stopped in (each.partition(" ") for each in shards):
        if stopped:
            assert encode_and_stop(small, text, "--shard", shard, after=1) == 130
        else:
            assert encode(small, text, "--shard", shard) == 0
    assert main(["merge", str(text.with_name("out.npy"))]) == 2
    assert message in capsys.readouterr().err
    assert "out.npy" not in files(text)


def test_shards_of_different_runs_are_not_merged(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(small, text, "--shard", "1/2", "--normalize") == 0
    assert encode(small, text, "--shard", "2/2", "--no-normalize") == 0
    assert main(["merge", str(text.with_name("out.npy"))]) == 2
    assert "out-00002-of-00002.npy was made otherwise, with normalize_embeddings False instead of True" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/2"], "--shard 0/2: give I/N, such as 1/4, with I from 1 to N"),
        (["--shard", "3/2"], "--shard 3/2: give I/N"),
        (["--shard", "two"], "--shard two: give I/N"),
        (["--shard", "1/24"], "in.txt has 23 lines, too few for 24 shards"),
        (["--shard", "24/24"], "in.txt has 23 lines, too few for 24 shards"),
        (["--device", "tpu"], "--device tpu: "),
    ],
)
def test_bad_options(
    small: Path, text: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert encode(small, text, *arguments) == 2
    assert message in capsys.readouterr().err
    assert files(text) == set()


def test_resume_and_shard_need_files(small: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", "--model", str(small), "a sentence", "--resume"]) == 2
    assert encode(small, text, "--shard", "1/2", output="out.safetensors") == 2
    assert capsys.readouterr().err.count("--resume and --shard need a text file and -o FILE.npy") == 2
    assert encode(small, text, "--shard", "") == 2  # as with a variable that is not set
    assert "--shard : give I/N, such as 1/4" in capsys.readouterr().err
    assert encode(small, text.with_name("gone.txt"), "--resume") == 2
    assert "No such file or directory: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ streaming


def test_a_generator_is_read_block_by_block(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_encoder, "BLOCK_SENTENCES", 4)
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in LINES:
            read += 1
            yield line

    encoder = SentenceEncoder.from_pretrained(small)
    rows, ahead = 0, []
    for block in encoder.encode_blocks(lines()):
        rows += len(block)
        ahead.append(read - rows)
    assert rows == len(LINES)
    assert max(ahead) == 0
    np.testing.assert_array_equal(encoder.encode(lines()), encoder.encode(LINES))


def test_one_call_is_made_ahead_in_a_thread() -> None:
    taken = 0
    made = [threading.Event() for _ in range(5)]

    def call(number: int) -> tuple[int, int]:
        made[number].set()
        return number, threading.get_ident()

    def calls() -> Iterator[Callable[[], tuple[int, int]]]:
        nonlocal taken
        for number in range(5):
            taken += 1
            yield partial(call, number)

    threads = set()
    for expected, (number, thread) in enumerate(sentence_encoder._one_ahead(calls())):
        assert number == expected
        assert taken == min(number + 2, 5)  # no more than one ahead
        assert made[min(number + 1, 4)].wait(10)  # and that one is made while this one is in use
        threads.add(thread)
    assert number == 4
    assert threading.get_ident() not in threads


def test_a_block_ahead_gives_the_same(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SentenceEncoder.from_pretrained(small)
    expected = encoder.encode(LINES)
    monkeypatch.setattr(sentence_encoder, "BLOCK_SENTENCES", 4)
    monkeypatch.setattr(SentenceEncoder, "_on_gpu", lambda _: True)
    np.testing.assert_array_equal(encoder.encode(LINES), expected)
    assert [len(block) for block in encoder.encode_blocks(iter(LINES))] == [4, 4, 4, 4, 4, 3]
    assert encoder.encode([]).shape == (0, 36)


def test_what_fails_ahead_is_raised_in_its_turn() -> None:
    results = sentence_encoder._one_ahead([partial(int, "1"), partial(int, "two"), partial(int, "3")])
    assert next(results) == 1
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_long_texts_make_small_blocks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_encoder, "BLOCK_CHARACTERS", 30)
    encoder = SentenceEncoder.from_pretrained(small)
    assert [len(block) for block in encoder.encode_blocks(["x" * 30, "a", "b" * 29, "c"])] == [1, 2, 1]


def test_errors_and_warnings_count_over_all_blocks(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentence_encoder, "BLOCK_SENTENCES", 2)
    encoder = SentenceEncoder.from_pretrained(small)
    encoder.tokenizer.max_length = 4
    with pytest.warns(UserWarning, match="^3 of 5 texts cut to 4 tokens$"):
        encoder.encode(["a b c", "a", "a b c d", "", "a b c d e f"])
    with pytest.raises(TypeError, match="text 3 is int"):
        encoder.encode(["a", "b", "c", 4])  # type: ignore[list-item]
