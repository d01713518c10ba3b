"""Labelled sentences: examples -> batches."""

import hashlib
import re
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

from heads.losses import MISSING
from heads.tables import DataError, Example, listed
from minibert import Tokenizer
from minibert.tokenizer import pad

NOTHING = {"nan", "NaN", "N/A", "NA", "<NA>", "null", "NULL", "None"}  # as other programs write it
POOL = 16  # so many batches' sentences, at most, are sorted by length together
POOLS = 4  # in so many parts, at least: a small set as a whole would make the same batches in every epoch


def label_names(examples: Sequence[Example], tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Every label that occurs, per task, in order: whole numbers by value, else alphabetical.

    Raises:
        DataError: a task with fewer than two labels, from which nothing can be learned.
    """
    names = {}
    for task in tasks:
        found = {example.labels[task] for example in examples if task in example.labels}
        if len(found) < 2:
            has = f"only the label {found.pop()!r}" if found else "no label at all"
            raise DataError(f"the training examples have {has} for {task}: there must be two or more")
        _warn_of_odd_labels(task, found)
        numbers = all(re.fullmatch(r"-?\d+", label) for label in found)
        names[task] = tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))
    return names


def _warn_of_odd_labels(task: str, labels: set[str]) -> None:
    """Warns of a label that another program may have made of an empty cell, and of one spelt in two ways."""
    if missing := sorted(labels & NOTHING):
        warnings.warn(f"{missing[0]!r} is a label of {task}: if it means none, empty the cells", stacklevel=1)
    spelt: dict[str, str] = {}
    for label in sorted(labels):
        other = spelt.setdefault(normalized(label).removesuffix(".0"), label)
        if other != label:
            alike = unicodedata.normalize("NFKC", other) == unicodedata.normalize("NFKC", label)
            one, two = map(ascii if alike else repr, (other, label))
            warnings.warn(
                f"{one} and {two} are two labels of {task}: write them in one way if they are one",
                stacklevel=1,
            )
            return


def normalized(text: str) -> str:
    """In small letters with single spaces: equal for texts that differ in nothing else.

    An accent is one with its letter, however it was encoded, and what has no width is left out.
    """
    if not text.isascii():
        shown = unicodedata.normalize("NFKC", text)
        text = "".join(character for character in shown if unicodedata.category(character) != "Cf")
    return " ".join(text.lower().split())


def stratified_split(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """(rest, held out): `fraction` of each label and file, and of their combinations, as nearly as can be.

    What is counted are different texts, not rows. At least one is held out, but perhaps none of a rare label.

    The order is kept, and something of every label stays in the rest. A text that comes several times, as with
    a file or a row for each task, is held out everywhere or nowhere, even if spaces and capitals differ. The
    same examples are always split alike: else a run that goes on from another would validate on what that one
    was trained on.

    Raises:
        DataError: too few examples to hold one out and keep one.
    """
    together: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        together[normalized(example.text)].append(index)
    strata: dict[tuple[object, ...], list[list[int]]] = defaultdict(list)
    for group in together.values():
        kinds = (part for i in group for part in (examples[i].source, *sorted(examples[i].labels.items())))
        strata[tuple(kinds)].append(group)
    generator = torch.Generator().manual_seed(0)
    keys = sorted(strata, key=repr)
    keys = [keys[i] for i in torch.randperm(len(keys), generator=generator).tolist()]
    keys.sort(key=lambda key: -(fraction * len(strata[key]) % 1))  # first what rounding down takes most from
    sizes = {key: len(strata[key]) for key in keys}
    counts = _shares(sizes, fraction, max(1, round(fraction * len(together))))
    rest = Counter(label for example in examples for label in example.labels.items())
    held: set[int] = set()
    for key, chosen in zip(keys, counts, strict=True):
        order = torch.randperm(len(strata[key]), generator=generator).tolist()
        for i in order[:chosen]:
            group = strata[key][i]
            labels = Counter(label for index in group for label in examples[index].labels.items())
            if all(rest[label] > count for label, count in labels.items()):  # none may lose its last one
                rest.subtract(labels)
                held.update(group)
    if not held:
        once = list(rest.values()).count(1)
        raise DataError(
            f"none of {len(together)} different texts can be held out, {once} of {len(rest)} labels come only "
            "once: give a validation file, or another column of labels"
        )
    return (
        [example for i, example in enumerate(examples) if i not in held],
        [example for i, example in enumerate(examples) if i in held],
    )


def _shares(sizes: Mapping[tuple[object, ...], int], fraction: float, total: int) -> list[int]:
    """How many are held out of each combination of labels, given how many texts have it; `total` in all.

    Of each first its share, rounded down; then one by one of the combination whose labels lack most. (Where
    many combinations occur once or twice, chance alone would leave rare labels out.)
    """
    parts = [dict.fromkeys((key, *key)) for key in sizes]  # a combination itself, and all in it
    having: dict[object, list[int]] = defaultdict(list)
    for i, each in enumerate(parts):
        for part in each:
            having[part].append(i)
    places = {part: np.array(combinations) for part, combinations in having.items()}
    available = np.array(list(sizes.values()))
    wanted = fraction * available
    counts = wanted.astype(int)
    short = wanted - counts
    lacking = np.zeros(len(sizes))  # of a combination, summed over its parts
    for where in places.values():
        lacking[where] += short[where].sum() - 0.5  # one too few is as bad as one too many
    lacking[counts == available] = -np.inf
    for _ in range(total - int(counts.sum())):
        best = int(lacking.argmax())
        counts[best] += 1
        for part in parts[best]:
            lacking[places[part]] -= 1
        if counts[best] == available[best]:
            lacking[best] = -np.inf
    return [int(count) for count in counts]


def dummy_examples(count: int, tasks: Mapping[str, Sequence[str]], seed: int) -> list[Example]:
    """Random words with random labels: nothing can be learned from them, but every part of the loop runs."""
    generator = torch.Generator().manual_seed(seed)

    def choose(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    words = "the a red old small river dog sees opens table and under green seven letter".split()
    return [
        Example(
            " ".join(choose(words) for _ in range(3 + int(torch.randint(12, (), generator=generator)))),
            {task: choose(labels) for task, labels in tasks.items()},
            where=f"dummy {index}",
        )
        for index in range(count)
    ]


def fingerprint(examples: Sequence[Example]) -> str:
    """The sha256 of texts, labels and order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.text, sorted(example.labels.items()), example.source)).encode())
    return digest.hexdigest()


class SentenceDataset:
    """Sentences, tokenized once, and their labels as class indices.

    `ids[i]` the tokens of sentence i; `labels[task]` (n,), `MISSING` where there is none. Once
    heads/features.py has filled `features`, of `depth` layers, batches hold these instead of tokens.

    Raises:
        DataError: a label that is not among `labels`; says where.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: Tokenizer, labels: Mapping[str, Sequence[str]]
    ) -> None:
        self.ids = tokenizer.token_ids([example.text for example in examples])
        self.pad_token_id = tokenizer.pad_token_id
        self.sources = [example.source for example in examples]
        self.labels = {
            task: torch.tensor([_class_index(example, task, names) for example in examples])
            for task, names in labels.items()
        }
        self.forget_features()

    def forget_features(self) -> None:
        """Back to batches of tokens."""
        self.features: list[Tensor] | None = None
        self.depth: int | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def has_labels(self, task: str) -> bool:
        """Whether any sentence has a label for this task."""
        return bool((self.labels[task] != MISSING).any())

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch: `attention_mask` (B, T), `labels.TASK` (B,), and `input_ids` (B, T) or `features`.

        `features` are (B, T, H), or (B, H) where all layers are frozen.
        """
        rows = [self.ids[i] for i in indices]
        batch = {f"labels.{task}": labels[list(indices)] for task, labels in self.labels.items()}
        batch["attention_mask"] = pad([[1] * len(row) for row in rows], 0)
        if self.features is None:
            batch["input_ids"] = pad(rows, self.pad_token_id)
        else:  # (T, H) each, or (H,) each
            batch["features"] = torch.nn.utils.rnn.pad_sequence(
                [self.features[i] for i in indices], batch_first=True
            )
        return batch


def _class_index(example: Example, task: str, names: Sequence[str]) -> int:
    label = example.labels.get(task)
    if label is None:
        return MISSING
    if label not in names:
        if alike := [name for name in names if normalized(name) == normalized(label)]:
            raise DataError(
                f"{example.where}: {task} is {label!a}, and in training {alike[0]!a}: write them in one way"
            )
        raise DataError(f"{example.where}: {task} is {label!r}, the known labels are {listed(names)}")
    return names.index(label)


def epoch_batches(
    dataset: SentenceDataset,
    epoch: int,
    *,
    seed: int,
    batch_size: int,
    batch_tokens: int | None = None,
    uniform: bool = False,
) -> list[list[int]]:
    """The batches of one epoch, as indices into the dataset; the same for the same seed and epoch.

    Sentences are shuffled, sorted by length among the next `POOL` batches' worth (in a small set fewer), cut
    into batches, and the batches shuffled, so that little is padded and no order is learned.

    Args:
        batch_size: sentences in a batch.
        batch_tokens: cut batches by this many tokens, padding included, instead.
        uniform: draw equally often from each training file, whatever its size; a small file's sentences
            come again, of a large one's some have to wait.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    if uniform:
        order = _evenly(order, dataset.sources, generator)
    lengths = [len(ids) for ids in dataset.ids]
    size = batch_size if batch_tokens is None else max(1, batch_tokens * len(lengths) // sum(lengths))
    pool = size * min(POOL, max(1, len(order) // (POOLS * size)))
    batches = []
    for start in range(0, len(order), pool):
        together = sorted(order[start : start + pool], key=lengths.__getitem__)  # stable
        if batch_tokens is None:
            batches += [together[i : i + batch_size] for i in range(0, len(together), batch_size)]
        else:
            batches += _by_tokens(together, lengths, batch_tokens)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _evenly(order: Sequence[int], sources: Sequence[int], generator: torch.Generator) -> list[int]:
    by_source: dict[int, list[int]] = defaultdict(list)
    for index in order:
        by_source[sources[index]].append(index)
    share = -(-len(order) // len(by_source))
    mixed = [index for _, members in sorted(by_source.items()) for index in islice(cycle(members), share)]
    return [mixed[i] for i in torch.randperm(len(mixed), generator=generator).tolist()]


def _by_tokens(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cuts sentences sorted by length so that no batch, padded, exceeds the budget (but for a single one)."""
    batches: list[list[int]] = [[]]
    for index in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > budget:
            batches.append([])
        batches[-1].append(index)
    return batches
