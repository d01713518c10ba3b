"""python -m minibert, as a stranger would call it."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from tqdm import tqdm

from minibert import SentenceEncoder
from minibert.__main__ import main
from tests.conftest import TINY, save_random_bert
from tests.full_disk import no_file_beyond
from tests.terminal import shown_on_a_terminal

MODEL = ["--model", "all-MiniLM-L6-v2", "--device", "cpu"]  # a GPU's last bits are others
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A fast brown animal leaps above a sleepy dog.",
    "The sky is blue and clear today.",
]


@pytest.fixture(scope="module")
def expected(minilm: Path) -> np.ndarray:
    return SentenceEncoder.from_pretrained(minilm).encode(SENTENCES)


def standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_encode_prints_shape_numbers_and_cosines(
    expected: np.ndarray, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    assert main(["encode", *MODEL, *SENTENCES, "-o", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("embeddings: 3 x 384 float32\n")
    assert f"[0] {expected[0, 0]:8.4f} {expected[0, 1]:8.4f}" in printed
    assert f"{expected[0] @ expected[1]:7.4f}" in printed
    assert f"wrote {output}: 3 x 384 float32" in printed
    np.testing.assert_array_equal(np.load(output), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out.npy"]


def test_encode_writes_safetensors(expected: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    assert main(["encode", *MODEL, *SENTENCES, "-o", str(output)]) == 0
    np.testing.assert_array_equal(load_file(output)["embeddings"], expected)


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("way", ["file", "-", "nothing"])
def test_encode_reads_lines(
    expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, ends: str
) -> None:
    content = ("\ufeff" + ends.join(SENTENCES) + ends).encode()
    (tmp_path / "in.txt").write_bytes(content)
    standard_input(monkeypatch, content)
    given = {"file": [str(tmp_path / "in.txt")], "-": ["-"], "nothing": []}[way]
    assert main(["encode", *MODEL, *given, "-o", str(tmp_path / "out.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected)


def test_row_i_is_line_i_even_if_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standard_input(monkeypatch, b"one\n\nthree\xe2\x80\xa8still three\n")  # U+2028 does not end a line
    assert main(["encode", *MODEL, "-o", str(tmp_path / "out.npy")]) == 0
    assert np.load(tmp_path / "out.npy").shape == (3, 384)


@pytest.mark.filterwarnings("default:there is no file")
def test_a_word_with_an_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out.npy")
    assert main(["encode", *MODEL, "texts/mine", "-o", output]) == 0
    assert "warning: there is no file texts/mine: it is encoded as a sentence" in capsys.readouterr().err
    assert main(["encode", *MODEL, "two words", "-o", output]) == 0
    assert "warning" not in capsys.readouterr().err


def test_normalize_and_batch_size(expected: np.ndarray, tmp_path: Path) -> None:
    output = str(tmp_path / "out.npy")
    assert main(["encode", *MODEL, *SENTENCES, "-o", output, "--no-normalize", "--batch-size", "1"]) == 0
    raw = np.load(output)
    assert (np.linalg.norm(raw, axis=1) > 1.1).all()
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), expected, atol=5e-7)


@pytest.mark.filterwarnings("default:.*texts cut to")
def test_a_long_sentence_is_no_file_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", *MODEL, "The report is now results.csv"]) == 0
    assert main(["encode", *MODEL, "word " * 100]) == 0
    assert main(["encode", *MODEL, "word " * 300]) == 0
    assert capsys.readouterr().err == "minibert: warning: 1 of 1 texts cut to 256 tokens\n"


@pytest.mark.filterwarnings("default:each line of")
def test_a_table_is_lines_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.csv").write_text("text,label\nhello,0\n")
    assert main(["encode", *MODEL, str(tmp_path / "mine.csv")]) == 0
    said = capsys.readouterr()
    assert f"warning: each line of {tmp_path / 'mine.csv'} is taken for a sentence" in said.err
    assert "embeddings: 2 x 384" in said.out


def test_long_input_is_shown_in_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["encode", *MODEL, *map(str, range(25))]) == 0
    printed = capsys.readouterr().out
    assert "embeddings: 25 x 384" in printed
    assert "... and 15 more" in printed


def test_progress_bar_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a sentence\n" * 9)
    command = ["encode", *MODEL, str(tmp_path / "in.txt"), "--batch-size", "2"]
    delays = []

    def at_once(*, delay: float, **settings: Any) -> Any:
        delays.append(delay)
        return tqdm(**settings)

    monkeypatch.setattr("tqdm.tqdm", at_once)
    assert main(command) == 0
    assert capsys.readouterr().err == ""
    shown = shown_on_a_terminal(lambda: main(command))
    assert "encode:" in shown
    assert "9/9" in shown
    assert " sentences/s" in shown
    assert delays == [1]  # second, in which most are done


def test_closed_streams(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("a sentence\n")
    encode = f"exec {sys.executable} -m minibert encode {' '.join(MODEL)}"
    silent = subprocess.run(
        f"{encode} in.txt -o out.npy >&-", shell=True, cwd=tmp_path, capture_output=True, text=True
    )
    assert (silent.returncode, silent.stderr) == (0, "")
    assert np.load(tmp_path / "out.npy").shape == (1, 384)
    deaf = subprocess.run(f"{encode} - <&-", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert deaf.returncode == 2
    assert deaf.stderr.startswith("minibert: error: nothing to encode: give sentences, a text file, or pipe")


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["-o", "out.txt", "a"], b"", "cannot write out.txt: its name must end in .npy or .safetensors"),
        (["-o", "no/such/out.npy", "a"], b"", "no/such is no directory that can be written to"),
        (["missing.csv", "-o", "out.npy"], b"", "No such file or directory: 'missing.csv'"),
        (["missing.txt"], b"", "No such file or directory: 'missing.txt'"),
        (["."], b"", "Is a directory: '.'"),
        (["a sentence", "missing.txt"], b"", "missing.txt is a file among sentences: give one file alone"),
        (["--model", "", "a"], b"", "no model ''"),
        (["--model", "x" * 300, "a"], b"", "no model 'xxx"),
        (["--batch-size", "0", "a"], b"", "batch_size is 0, it must be an integer from 1 up"),
        (["-"], b"", "standard input is empty: nothing to encode"),
        (["-"], b"fine\nb\xe4d\n", "standard input, line 2: not UTF-8 (byte 0xe4 at position 1)"),
        (["-"], b"\xef\xbb\xbfb\xe4d\n", "standard input, line 1: not UTF-8 (byte 0xe4 at position 1)"),
        (["a\udcff"], b"", "text 0 is not valid Unicode"),
        (["--model", "no-such-model", "a"], b"", "no model 'no-such-model'"),
        (["--device", "meta", "a"], b"", "--device meta: it must be auto, cpu, cuda or cuda:N"),
        (["--device", "cuda:99", "a"], b"", "--device cuda:99: "),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    content: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    standard_input(monkeypatch, content)
    assert main(["encode", *MODEL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("minibert: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out.npy", "out.safetensors"])
def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """Also if only the last few bytes find no room: what was there before stays."""
    command = ["encode", *MODEL, "a sentence", "-o", str(tmp_path / name)]
    for before in ([], [name]):
        with no_file_beyond(1500):  # of 1,600 or more
            assert main(command) == 2
        error = capsys.readouterr().err
        assert error == f"minibert: error: {tmp_path / name} cannot be written: File too large\n"
        assert [path.name for path in tmp_path.iterdir()] == before
        assert main(command) == 0
    assert (tmp_path / name).stat().st_size > 1536


@pytest.mark.parametrize("kind", ["GPU", "cuBLAS", "CPU"])
def test_out_of_memory_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def forward(*_: object) -> None:
        if kind == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has ...")
        if kind == "cuBLAS":
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
        torch.empty(2**55)

    monkeypatch.setattr("minibert.fast_inference._run", forward)
    assert main(["encode", *MODEL, "a"]) == 2
    assert capsys.readouterr().err == "minibert: error: out of memory, try a smaller --batch-size\n"


def test_parity_command(
    capsys: pytest.CaptureFixture[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["parity", "--model", str(tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 40
    assert all(line.endswith("all bits equal") for line in lines)
    # and it must be able to fail, and say where
    monkeypatch.setattr("minibert.layers.ACTIVATIONS", {"gelu": lambda x: x.relu()})
    assert main(["parity", "--model", str(tiny)]) == 1
    assert "first layer 0: differs by up to" in capsys.readouterr().out.splitlines()[0]


def test_parity_of_an_old_model_of_one_position(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Its config does not say its model_type, which transformers would guess from the directory's name."""
    model = save_random_bert(tmp_path / "hubert", **TINY | {"max_position_embeddings": 1})
    config = json.loads((model / "config.json").read_text())
    del config["model_type"]
    (model / "config.json").write_text(json.dumps(config))
    assert main(["parity", "--model", str(model)]) == 0
    assert capsys.readouterr().out.count("all bits equal") == 40


def test_what_cannot_be_loaded_is_not_said_to_be_converted(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_bytes((tiny / "config.json").read_bytes())
    tensors = load_tensors(tiny / "model.safetensors")
    torch.save(tensors, tmp_path / "old/pytorch_model.bin")
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    assert main(["convert", old, new]) == 0
    assert capsys.readouterr().out == f"wrote {new}: load it with --model {new}\n"
    del tensors["encoder.layer.1.output.dense.weight"]
    torch.save(tensors, tmp_path / "old/pytorch_model.bin")
    assert main(["convert", old, new]) == 2
    assert "the weights do not fit: missing encoder.layer.1.output.dense.weight" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main(["convert", old, ""]) == 2  # a variable that is not set is not the working directory
    assert "directory is '', it must be the path of one to save into" in capsys.readouterr().err


def test_console_script_and_help() -> None:
    script = Path(sys.executable).with_name("minibert")
    shown = subprocess.run([script, "encode", "--help"], capture_output=True, text=True, check=True).stdout
    assert "one text file with a sentence a line" in " ".join(shown.split())
