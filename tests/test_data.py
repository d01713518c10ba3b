"""Files of labelled sentences, and the batches made of them."""

import csv
import json
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heads import MISSING
from heads.data import (
    SentenceDataset,
    dummy_examples,
    epoch_batches,
    fingerprint,
    label_names,
    stratified_split,
)
from heads.options import read_options
from heads.report import print_sets
from heads.sets import read_sets
from heads.tables import DEMO, DataError, Example, read_examples
from minibert import Tokenizer

TASKS = {"type": "kind", "mood": "feeling"}
ROWS = [("Is it?", "q", ""), ('He said "no", twice.', "", "bad"), ("Ärger über\u2028Zeilen", "s", "bad")]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_three_formats_hold_the_same(tmp_path: Path) -> None:
    names = ("text", "kind", "feeling")
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([names, *ROWS])
    write(tmp_path / "a.tsv", "\n".join("\t".join(row) for row in [names, *ROWS]) + "\n")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in ROWS]
    lines[0] = '{"text": "Is it?", "kind": "q", "feeling": null}'
    lines[1] = '{"feeling": "bad", "text": "He said \\"no\\", twice."}'
    write(tmp_path / "a.jsonl", "\n".join(lines) + "\n\n")
    expected = [(text, {t: v for t, v in (("type", a), ("mood", b)) if v}) for text, a, b in ROWS]
    for suffix, first in (("csv", 2), ("tsv", 2), ("jsonl", 1)):
        path = tmp_path / f"a.{suffix}"
        examples = read_examples(path, "text", TASKS)
        assert [(e.text, e.labels) for e in examples] == expected
        assert [e.where for e in examples] == [f"{path}, line {first + i}" for i in range(3)]


def test_lines_are_counted_in_the_file_not_in_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,kind\n"two\nlines",x\n\n"next, please",y\n')
    examples = read_examples(path, "text", {"type": "kind"})
    assert [(e.text, e.where[-6:]) for e in examples] == [("two\nlines", "line 2"), ("next, please", "line 5")]
    # and spaces around a column's name or a label do not count
    path = write(tmp_path / "b.csv", '"a\nkind", text\n x ,one\n ,two\n')
    examples = read_examples(path, "text", {"type": "a\nkind"})
    assert [(e.labels, e.where[-6:]) for e in examples] == [({"type": "x"}, "line 3"), ({}, "line 4")]


def test_other_columns_can_hold_anything(tmp_path: Path) -> None:
    rows = '{"text": "a", "kind": "x", "score": 0.3, "tags": ["y"], "more": {"z": "\\ud800"}}\n'
    (example,) = read_examples(write(tmp_path / "a.jsonl", rows), "text", {"type": "kind"})
    assert (example.text, example.labels) == ("a", {"type": "x"})
    (example,) = read_examples(write(tmp_path / "a.CSV", "text,kind,,\na,x,,\n"), "text", {"type": "kind"})
    assert (example.text, example.labels) == ("a", {"type": "x"})


def test_columns_that_only_some_rows_have(tmp_path: Path) -> None:
    rows = '{"text": "a", "kind": "x"}\n{"text": "b", "split": "test"}\n{"text": "c"}\n'
    examples = read_examples(write(tmp_path / "a.jsonl", rows), "text", {"type": "kind"}, split="split")
    assert [(e.labels, e.split) for e in examples] == [({"type": "x"}, ""), ({}, "test"), ({}, "")]


def test_rows_marked_for_another_set_are_not_used(tmp_path: Path) -> None:
    rows = [f"text {i},{'xy'[i % 2]},{['train', 'validation', 'test', ''][i % 4]}\n" for i in range(8)]
    path = write(tmp_path / "a.csv", "".join(["text,kind,split\n", *rows]))
    options = ["--task", "type=kind", "--model", "m"]
    for name, numbers in (("test", "26"), ("validation", "15")):
        sets, _ = read_sets(read_options(["--eval-only", f"--{name}", str(path), *options]))
        assert [example.text for example in sets[name]] == [f"text {i}" for i in numbers]
    some = write(tmp_path / "c.csv", "text,kind,split\na,x,train\nb,y,\n")
    sets, _ = read_sets(
        read_options(["--eval-only", "--test", str(path), "--test", str(some), *options])  # each file by itself
    )
    assert [example.text for example in sets["test"]] == ["text 2", "text 6", "b"]
    other = write(tmp_path / "b.csv", "text,kind,split\na,x,train\nb,y,train\n")
    with pytest.raises(DataError, match=r"--test: .*b.csv, line 2 is marked train, and no row test"):
        read_sets(read_options(["--train", str(other), "--test", str(other), *options]))
    with pytest.raises(DataError, match=r"--split kinds: no row of any file has something in that column"):
        read_sets(read_options(["--train", str(other), "--split", "kinds", *options]))
    renamed = write(tmp_path / "d.csv", "text,kind,part\na,x,train\nb,y,train\nb2,y,validation\nc,y, test \n")
    renamed = renamed.rename(tmp_path / "type=d.csv")  # a file before it is a task and a file
    sets, _ = read_sets(read_options(["--train", str(renamed), "--split", "part", *options]))
    assert [example.text for example in sets["test"]] == ["c"]
    with pytest.raises(DataError, match=r"a.csv, line 4 is marked test, but --test is given too"):
        read_sets(read_options(["--train", str(path), "--test", str(path), *options]))


def test_sentences_that_are_trained_on_prove_little(tmp_path: Path) -> None:
    train = write(tmp_path / "a.csv", "text,kind\nOne,x\ntwo,y\nthree,x\nfour,y\n")
    test = write(tmp_path / "b.csv", "text,kind\nfive,x\none ,y\n")
    options = ["--train", str(train), "--validation", str(train), "--task", "type=kind"]
    with pytest.warns(UserWarning, match=r"4 of 4 validation .* are among those for training.*a.csv, line 2\)"):
        read_sets(read_options(options))
    options[2:4] = ["--test", str(test), "--validation-fraction", "0.25"]
    with pytest.warns(UserWarning, match=r"1 of 2 test sentences are among those .*b.csv, line 3\)"):
        read_sets(read_options(options))
    sets, _ = read_sets(read_options([*options[:2], *options[6:], "--validation-fraction", "0.5"]))
    assert len(sets["validation"]) == 2


def test_a_file_that_may_be_for_one_task(tmp_path: Path) -> None:
    """Where each task has its file, one without the task's name counts for all."""
    a = write(tmp_path / "a.csv", "text,label\none,0\ntwo,1\n")
    b = write(tmp_path / "b.csv", "text,label\nthree,0\nfour,1\n")
    c = write(tmp_path / "c.csv", "text,label\nfive,0\nsix,1\n")
    options = ["--train", f"a={a}", "--train", f"b={b}", "--task", "a=label", "--task", "b=label"]
    with pytest.warns(
        UserWarning, match=r"--validation .*c.csv: a and b both take their labels from its column"
    ):
        read_sets(read_options([*options, "--validation", str(c)]))
    sets, _ = read_sets(read_options([*options, "--validation", f"b={c}"]))
    sources = {example.text: example.source for example in sets["train"]}
    assert sources == {"one": 0, "two": 0, "three": 1, "four": 1}


def test_many_labels_in_a_line(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = (*"abcdefghi", "two\nlines")
    examples = [Example("t", {"kind": name}) for name in names + names[2:]]
    dataset = SentenceDataset(examples, Tokenizer.from_pretrained(minilm), {"kind": names, "x": ()})
    print_sets({"train": dataset}, {"kind": names, "x": ()})
    kinds, others = capsys.readouterr().out.splitlines()[1:]
    assert kinds == "  kind         c 2, d 2, e 2, f 2, g 2, h 2, i 2, two lines 2, and 2 more"
    assert others == "  x            no label"


def test_labels_of_json_can_be_numbers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        '{"text": "a", "kind": 10}\n{"text": "b", "kind": 9}\n{"text": "c", "kind": true}\n',
    )
    examples = read_examples(path, "text", {"type": "kind"})
    assert [e.labels["type"] for e in examples] == ["10", "9", "true"]
    assert label_names(examples[:2], ["type"]) == {"type": ("9", "10")}
    assert label_names(examples, ["type"]) == {"type": ("10", "9", "true")}
    alike = [Example("a", {"type": label}) for label in ("1", "001", "01", "0")]
    assert label_names(alike, ["type"]) == {"type": ("0", "001", "01", "1")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "cannot tell what {} is: its name must end in .csv, .tsv or .jsonl"),
        ("a.csv", "", "{} holds no examples"),
        ("a.csv", "text,kind,feeling\n", "{} holds no examples"),
        ("a.csv", "sentence,kind\nx,y\n", "{}, line 1: no column 'text', there are: sentence, kind"),
        ("a.csv", "text,kind\nx,y\n", "{}, line 1: no column 'feeling', there are: text, kind"),
        (
            "a.csv",
            "text;kind\nx;y\n",
            "{}, line 1: columns are separated by ';', in a .csv it must be by commas",
        ),
        ("a.tsv", "text,kind\nx,y\n", "{}, line 1: columns are separated by ',', in a .tsv it must be by tabs"),
        ("a.csv", "text,text\nx,y\n", "{}, line 1: two columns are named 'text'"),
        ("a.csv", "text,kind,feeling\na,b,c\nd,e\n", "{}, line 3: 2 cells, but line 1 names 3 columns"),
        ("a.csv", "text,kind,feeling\na,b,c,d\n", "{}, line 2: 4 cells, but line 1 names 3 columns"),
        ("a.tsv", "text\tkind\tfeeling\na\tb\n", "{}, line 2: 2 cells, but line 1 names 3 columns"),
        ("a.csv", "text,kind,feeling\n \t,b,c\n", "{}, line 2: the text (column 'text') is empty"),
        ("a.csv", b"text,kind,feeling\na,b,c\n\xe4,b,c\n", "{}, line 3: not UTF-8 (byte 0xe4 at position 0)"),
        ("a.csv", 'text,kind,feeling\n"a"b,b,c\n', "{}, line 2: something follows a cell's closing quote"),
        ("a.csv", 'text,kind,feeling\n"a,b,c\n', "{}, line 2: a quote is opened and not closed"),
        (
            "a.csv",
            'text,kind,feeling\na,b,c\n"a,b,c\na,b,c\n',
            "{}, line 3 (line 4 still belongs to it): a quote is opened and not closed",
        ),
        (
            "a.csv",
            'text,kind,feeling\n"a,b,c\na,b,c\n"d" e,b,c\n',
            "{}, line 2 (line 4 still belongs to it): something follows a cell's closing quote",
        ),
        ("a.csv", "text,kind,feeling\ra,b,c\r", "{}, line 1: a carriage return stands alone: save the file"),
        ("a.csv", f"text,kind,feeling\n{'a' * 140_000},b,c\n", "{}, line 2: field larger than field limit"),
        ("a.jsonl", "{", "{}, line 1: not a JSON object (Expecting"),
        ("a.jsonl", "[" * 100_000, "{}, line 1: not a JSON object (maximum recursion"),
        ("a.jsonl", '{"text": "a", "kind": "x"}', "{} has no column 'feeling' for mood, it has: kind, text"),
        ("a.jsonl", "[1]", "{}, line 1: not a JSON object (it is a list)"),
        (
            "a.jsonl",
            '{"text": ["x"], "kind": 1}',
            "{}, line 1: ['x'] is neither a string nor an integer nor a boolean, as text and labels must be",
        ),
        (
            "a.jsonl",
            '{"text": "a", "kind": "x"}\n{"kind": "y"}',
            "{}, line 2: no column 'text', there are: kind",
        ),
        ("a.jsonl", '{"text": "\\ud800"}', "{}, line 1: not valid Unicode, it has a lone surrogate"),
        (
            "a.csv",
            "text,kind,feeling,split\na,b,c,dev\n",
            "{}, line 2: split is 'dev', it must be train, validation",
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_examples(path, "text", TASKS)
    assert message.format(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quotes_are_part_of_a_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.TSV", 'text\tkind\nplain\tx\n"He said ""no"""\tx\n')
    with pytest.warns(UserWarning, match=r"a\.TSV, line 3: the quotes around the text belong to it"):
        examples = read_examples(path, "text", {"type": "kind"})
    assert examples[1].text == '"He said ""no"""'
    alone = write(tmp_path / "b.tsv", 'text\tkind\n"\tx\n')  # which is no pair
    assert [e.text for e in read_examples(alone, "text", {"type": "kind"})] == ['"']
    csv = write(tmp_path / "a.csv", 'text,kind\n"He said ""no""",x\n"""No""",x\n')
    assert [e.text for e in read_examples(csv, "text", {"type": "kind"})] == ['He said "no"', '"No"']


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        read_examples(tmp_path / "a.csv", "text", TASKS)
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_examples(tmp_path / "b.csv", "text", TASKS)


def test_labels_come_from_training(minilm: Path) -> None:
    train = [Example("a", {"t": "y"}), Example("b", {"t": "x"}), Example("c", {})]
    names = label_names(train, ["t"])
    assert names == {"t": ("x", "y")}
    numbers = [Example("a", {"t": number}) for number in ("10", "-2", "0", "-11", "9")]
    assert label_names(numbers, ["t"]) == {"t": ("-11", "-2", "0", "9", "10")}
    dataset = SentenceDataset(train, Tokenizer.from_pretrained(minilm), names)
    assert dataset.labels["t"].tolist() == [1, 0, MISSING]
    with pytest.raises(DataError, match=r"dev\.csv, line 7: t is 'z', the known labels are x, y"):
        SentenceDataset([Example("d", {"t": "z"}, "dev.csv, line 7")], Tokenizer.from_pretrained(minilm), names)
    names = {"t": ("caf\u00e9", "tea")}
    with pytest.raises(
        DataError, match=r"line 2: t is 'cafe\\u0301', and in training 'caf\\xe9': write them in one"
    ):
        SentenceDataset([Example("d", {"t": "cafe\u0301"}, "line 2")], Tokenizer.from_pretrained(minilm), names)
    with pytest.raises(DataError, match="only the label 'y' for t: there must be two or more"):
        label_names(train[:1], ["t"])
    with pytest.raises(DataError, match="no label at all for u"):
        label_names(train, ["u"])


def test_stratified_split() -> None:
    examples = [Example(str(i), {"t": "abc"[min(i % 7, 2)]}) for i in range(200)] + [
        Example("rare", {"t": "d"})
    ]
    rest, held = stratified_split(examples, 0.2)
    assert sorted(e.text for e in rest + held) == sorted(e.text for e in examples)
    assert len(held) == 40
    whole, part = (Counter(e.labels["t"] for e in some) for some in (examples, held))
    assert all(abs(part[label] - 0.2 * whole[label]) < 1 for label in whole)
    assert [e.text for e in held if e.text != "rare"] == sorted((e.text for e in held), key=int)
    assert stratified_split(examples, 0.2) == (rest, held)
    with pytest.raises(DataError, match=r"none of 2 different texts can be held out, 2 of 2 labels come only"):
        stratified_split(examples[:2], 0.1)
    assert [len(some) for some in stratified_split(examples[2:6], 0.1)] == [3, 1]


def test_a_text_in_two_files_is_held_out_in_both_or_in_none() -> None:
    a = [Example(str(i), {"a": "xyz"[i % 3]}, source=0) for i in range(90)]
    b = [Example(str(i), {"b": "uv"[i % 2]}, source=1) for i in range(60, 150)]
    rest, held = stratified_split(a + b, 0.1)
    assert not {e.text for e in rest} & {e.text for e in held}
    assert len({e.text for e in held}) == 15
    both = {e.text for e in a} & {e.text for e in b}
    times = Counter(e.text for e in held if e.text in both)
    assert times
    assert set(times.values()) == {2}
    assert Counter(e.source for e in rest + held) == {0: 90, 1: 90}
    # and as much of each of ten files with the same labels
    alike = [Example(str(i), {"a": "xy"[i % 2]}, source=i // 20) for i in range(200)]
    assert set(Counter(e.source for e in stratified_split(alike, 0.1)[1]).values()) == {2}
    only = [Example("one", {"a": "x"}, source=0), Example("one", {"a": "x"}, source=1)]
    rest, held = stratified_split([*only, *[Example(str(i), {"a": "y"}) for i in range(30)]], 0.5)
    assert [e.text for e in rest if e.labels["a"] == "x"] == ["one", "one"]  # its label is nowhere else


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("text number {}", "Text number {}"),
        ("text number {}", "text number  {} "),
        ("caf\u00e9 number {}", "cafe\u0301 number {}"),  # which a tokenizer makes the same ids of
        ("text number {}", "\ufefftext num\u00adber\u200b {}"),
    ],
)
def test_another_spelling_is_no_other_text(first: str, second: str) -> None:
    forms = (first, second)
    examples = [Example(form.format(i), {"a": "xy"[i % 2]}) for form in forms for i in range(100)]
    rest, held = stratified_split(examples, 0.1)
    numbers = [{e.text.split()[-1] for e in some} for some in (rest, held)]
    assert not numbers[0] & numbers[1]
    assert len(held) == 20


@pytest.mark.parametrize(
    ("labels", "warning"),
    [
        (["pos", "neg", "nan"], "'nan' is a label of a: if it means none, empty the cells"),
        (["1", "0", "1.0"], "'1' and '1.0' are two labels of a: write them in one way if they are one"),
        (["New York", "new  york"], "'New York' and 'new  york' are two labels of a: write them in one way"),
        (
            ["caf\u00e9", "cafe\u0301"],
            r"'cafe\\u0301' and 'caf\\xe9' are two labels of a: write them in one way",
        ),
        (["good", "good\u200b"], r"'good' and 'good\\u200b' are two labels of a: write them in one way"),
    ],
)
def test_labels_as_other_programs_write_them(labels: list[str], warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        label_names([Example("text", {"a": label}) for label in labels], ["a"])
    label_names([Example("text", {"a": label}) for label in ("1.0", "2.0", "none")], ["a"])


@pytest.mark.parametrize("long", [False, True])
def test_a_text_in_several_rows_is_held_out_in_all_or_in_none(long: bool) -> None:
    """Rows that come twice, or a row for each task."""
    rows = [(str(i), {"a": "xy"[i % 2]}, {"b": "uv"[i % 3 > 0]}) for i in range(100)]
    examples = [Example(text, first) for text, first, _ in rows]
    examples += [Example(text, second if long else first) for text, first, second in rows]
    rest, held = stratified_split(examples, 0.1)
    assert not {e.text for e in rest} & {e.text for e in held}
    assert (len(rest), len(held)) == (180, 20)


def test_rare_combinations_are_split_as_well() -> None:
    """500 combinations of labels that occur once, and 100 examples alike: the latter do not make up for them."""
    rare = [Example(str(i), {"a": str(i % 25), "b": str(i // 25)}) for i in range(500)]
    rest, held = stratified_split(rare + [Example(str(i), {"a": "z", "b": "z"}) for i in range(500, 600)], 0.1)
    assert len(held) == 60
    assert sum(e.labels["a"] == "z" for e in held) == 10
    # every label stays in training: here each occurs once but for one
    rest, held = stratified_split([Example(str(i), {"a": str(max(0, i - 20))}) for i in range(40)], 0.5)
    assert {e.labels["a"] for e in rest} == {str(i) for i in range(20)}
    assert 0 < len(held) <= 20
    # and here twice, each time beside another
    twice = [Example(str(i), {"a": str(i // 2), "b": "xy"[i % 2]}) for i in range(40)]
    rest, held = stratified_split(twice, 0.99)
    assert [e.labels["a"] for e in rest] == [str(i) for i in range(20)]


def labels_of_three_tasks(chance: random.Random) -> dict[str, str]:
    urgent = "yes" if chance.random() < 0.08 else "no"
    return {"topic": chance.choice("abcdefghij"), "team": chance.choice("klmnopqrst"), "urgent": urgent}


def labels_often_missing(chance: random.Random) -> dict[str, str]:
    mood = {"mood": chance.choice("pn")} if chance.random() < 0.08 else {}
    return {"topic": chance.choice("abcdefghij"), "team": chance.choice("klmnopqrst"), **mood}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("labels", [labels_of_three_tasks, labels_often_missing])
def test_every_label_gets_its_share(labels: Callable[[random.Random], dict[str, str]], seed: int) -> None:
    """Though most combinations of labels are rarer than one in ten texts held out."""
    chance = random.Random(seed)
    examples = [Example(str(i), labels(chance)) for i in range(1000)]
    _, held = stratified_split(examples, 0.1)
    assert len(held) == 100
    whole, part = (Counter(label for e in some for label in e.labels.items()) for some in (examples, held))
    assert max(abs(part[label] - 0.1 * count) for label, count in whole.items()) < 1.5


def lengths_dataset(lengths: list[int], sources: list[int] | None = None) -> SentenceDataset:
    dataset = SentenceDataset.__new__(SentenceDataset)
    dataset.ids = [list(range(1, n + 1)) for n in lengths]
    dataset.sources = sources or [0] * len(lengths)
    dataset.labels = {}
    dataset.pad_token_id = 0
    dataset.forget_features()
    return dataset


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    size=st.integers(1, 20),
    tokens=st.none() | st.integers(1, 100),
    epoch=st.integers(0, 3),
)
def test_each_epoch_has_every_sentence_once(
    lengths: list[int], size: int, tokens: int | None, epoch: int
) -> None:
    dataset = lengths_dataset(lengths)
    batches = epoch_batches(dataset, epoch, seed=1, batch_size=size, batch_tokens=tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        if tokens is None:
            assert 1 <= len(batch) <= size
        else:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    assert batches == epoch_batches(dataset, epoch, seed=1, batch_size=size, batch_tokens=tokens)


def test_batches_differ_by_epoch_and_seed_and_pad_little() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 60, (1000,), generator=generator).tolist()
    dataset = lengths_dataset(lengths)
    first = epoch_batches(dataset, 0, seed=0, batch_size=16)
    assert len(first) == 63
    assert first != epoch_batches(dataset, 1, seed=0, batch_size=16)
    assert first != (other := epoch_batches(dataset, 0, seed=1, batch_size=16))
    assert other != epoch_batches(dataset, 1, seed=0, batch_size=16)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)  # 1.85 in random batches
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in first]
    assert abs(torch.corrcoef(torch.tensor([means, list(range(63))]))[0, 1]) < 0.3  # not by length


@pytest.mark.parametrize("count", [60, 200])
def test_no_batch_of_a_small_set_comes_twice(count: int) -> None:
    dataset = lengths_dataset(list(range(1, count + 1)))
    epochs = [epoch_batches(dataset, epoch, seed=0, batch_size=16) for epoch in range(5)]
    batches = [frozenset(batch) for epoch in epochs for batch in epoch]
    assert len(set(batches)) == len(batches) == 5 * -(-count // 16)


def test_uniform_mixing_draws_as_often_from_a_small_file() -> None:
    dataset = lengths_dataset([5] * 100, [0] * 80 + [1] * 20)
    drawn: Counter[int] = Counter()
    for epoch in range(4):
        batches = epoch_batches(dataset, epoch, seed=0, batch_size=10, uniform=True)
        counts = Counter(i for batch in batches for i in batch)
        assert sum(counts[i] for i in range(80)) == sum(counts[i] for i in range(80, 100)) == 50
        assert max(counts[i] for i in range(80)) == 1
        assert {counts[i] for i in range(80, 100)} <= {2, 3}
        drawn |= counts
    assert len(drawn) > 95  # those that waited come in another epoch
    batches = epoch_batches(lengths_dataset([5] * 9, [0] * 8 + [1]), 0, seed=0, batch_size=10, uniform=True)
    assert [sum(i < 8 for i in batch) for batch in batches] == [5]  # and as many of the other


def test_a_batch_may_fill_its_budget() -> None:
    batches = epoch_batches(lengths_dataset([5] * 8), 0, seed=0, batch_size=1, batch_tokens=10)
    assert [len(batch) for batch in batches] == [2] * 4


def test_collate() -> None:
    dataset = lengths_dataset([2, 4])
    dataset.labels = {"t": torch.tensor([7, MISSING])}
    batch = dataset.collate([1, 0])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [1, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels.t"].tolist() == [MISSING, 7]
    dataset.features = [torch.ones(2, 3), torch.ones(4, 3)]
    batch = dataset.collate([0, 1])
    assert "input_ids" not in batch
    assert batch["features"].shape == (2, 4, 3)
    assert not batch["features"][0, 2:].any()


def test_fingerprints_see_every_change() -> None:
    examples = [Example("a", {"t": "x"}), Example("b", {})]
    others = [
        [examples[1], examples[0]],
        [examples[0]],
        [Example("a", {"t": "y"}), examples[1]],
        [Example("a ", {"t": "x"}), examples[1]],
        [examples[0], Example("b", {}, source=1)],
    ]
    assert len({fingerprint(some) for some in [examples, *others]}) == 6
    assert fingerprint([Example("a", {"t": "x"}, where="elsewhere"), examples[1]]) == fingerprint(examples)


def test_dummy_examples() -> None:
    labels = {"a": ("x", "y"), "b": ("1", "2", "3")}
    examples = dummy_examples(50, labels, seed=0)
    assert {task: set(names) for task, names in label_names(examples, ["a", "b"]).items()} == {
        task: set(names) for task, names in labels.items()
    }
    assert examples == dummy_examples(50, labels, seed=0) != dummy_examples(50, labels, seed=1)


# --------------------------------------------------------------------------------------------- the demo


@pytest.fixture(scope="module")
def demo() -> list[Example]:
    return read_examples(DEMO, "text", {"type": "type", "sentiment": "sentiment"})


def test_the_demo_is_balanced_and_a_fifth_is_held_out(demo: list[Example]) -> None:
    assert len(demo) >= 400
    splits = Counter(e.split for e in demo)
    assert splits.keys() == {"train", "validation"}
    assert splits["validation"] == pytest.approx(0.2 * len(demo), abs=1)
    kinds = {"type": {"question", "news", "statement"}, "sentiment": {"negative", "neutral", "positive"}}
    for task, names in kinds.items():
        for split in splits:
            counts = Counter(e.labels[task] for e in demo if e.split == split)
            assert counts.keys() == names
            assert max(counts.values()) < 0.45 * sum(counts.values())


def test_the_demo_has_no_near_duplicates(demo: list[Example]) -> None:
    words = [set(e.text.lower().replace(".", " ").replace("?", " ").replace(",", " ").split()) for e in demo]
    assert max(len(a & b) / len(a | b) for a, b in combinations(words, 2)) < 0.6
    assert all(e.text == e.text.strip() and e.text.isprintable() for e in demo)
