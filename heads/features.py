"""What the frozen lower part of a model gives for each sentence: computed once, used in every epoch.

`depth` counts the frozen layers on top of frozen embeddings. The features of a sentence are the last frozen
layer's hidden states (T, H) or, if all layers are frozen, its embedding (H,).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from heads.data import SentenceDataset
from heads.multitask import BATCH_SIZE, MultiTaskModel, MultiTaskOutput
from minibert import BertModel, mean_pooling
from minibert.fast_inference import FastModel, run_texts
from minibert.fused_layers import is_untouched
from minibert.inputs import check_inputs

Part = tuple[Sequence[int], Iterable[Tensor]]  # some sentences and the features of each, (T, H) or (H,)


def compute(model: MultiTaskModel, batch: Mapping[str, Tensor], depth: int | None) -> MultiTaskOutput:
    """The model on a `SentenceDataset.collate` batch: all of it, or what lies above features of this depth."""
    mask = batch["attention_mask"]
    if depth is None:
        return model(batch["input_ids"], mask)  # type: ignore[no-any-return]
    hidden = batch["features"]
    if depth == len(model.encoder.layers):
        return model.classify(hidden)  # (B, H)
    for output, _ in model.encoder.run_layers(hidden, mask, start=depth):
        hidden = output  # (B, T, H)
    return model.classify(mean_pooling(hidden, mask))


def size_in_bytes(model: MultiTaskModel, dataset: SentenceDataset, depth: int) -> int:
    """The memory that a dataset's features take."""
    vectors = len(dataset) if depth == len(model.encoder.layers) else sum(map(len, dataset.ids))
    return vectors * model.encoder.config.hidden_size * 4


@torch.no_grad()
def fill(
    model: MultiTaskModel, sets: Mapping[SentenceDataset, Sequence[Sequence[int]]], depth: int
) -> Iterator[int]:
    """Computes the features of every sentence in `sets`, dataset -> batches of its sentences.

    Yields after each batch how many more sentences have theirs; a dataset has them when all are there.

    They are computed in these batches; sentences that are in none of them come last, in batches as `evaluate`
    makes them. Given the batches of the first epoch, that epoch's numbers are those of an uncached run, bit for
    bit; in later epochs, whose batches are others, they agree up to rounding. Packed attention never gives the
    reference's numbers, so there the sentences are batched as is fastest.
    """
    encoder = model.encoder
    pooled = depth == len(encoder.layers)
    fast = None
    if encoder.attention == "packed" and is_untouched(encoder):
        kind = encoder.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        fast = FastModel(encoder, dtype, layers=depth)
    for dataset, batches in sets.items():
        dataset.forget_features()
        features: dict[int, Tensor] = {}
        parts = _packed(fast, dataset, pooled) if fast else _padded(encoder, dataset, batches, depth)
        for batch, rows in parts:
            before = len(features)  # with uniform mixing a sentence may be in several batches
            features |= {i: row.clone() for i, row in zip(batch, rows, strict=True)}
            yield len(features) - before
        dataset.features, dataset.depth = [features[i] for i in range(len(dataset))], depth


def _padded(
    encoder: BertModel, dataset: SentenceDataset, batches: Sequence[Sequence[int]], depth: int
) -> Iterator[Part]:
    rest = sorted(set(range(len(dataset))).difference(*batches))
    for batch in [*batches, *sorted_batches(dataset, rest)]:
        inputs = dataset.collate(batch)
        input_ids, mask = (inputs[name].to(encoder.device) for name in ("input_ids", "attention_mask"))
        check_inputs(encoder.config, input_ids, mask, None)
        hidden = encoder.embeddings(input_ids)  # (B, T, H)
        for output, _ in encoder.run_layers(hidden, mask, stop=depth):
            hidden = output
        if depth == len(encoder.layers):
            yield batch, mean_pooling(hidden, mask).cpu()
        else:
            yield batch, [row[: len(dataset.ids[i])] for i, row in zip(batch, hidden.cpu(), strict=True)]


def _packed(fast: FastModel, dataset: SentenceDataset, pooled: bool) -> Iterator[Part]:
    empty = [i for i, row in enumerate(dataset.ids) if not row]
    nothing = torch.zeros(0, fast.config.hidden_size)  # (0, H)
    yield empty, [nothing.sum(0) if pooled else nothing] * len(empty)
    for batch, packing, hidden in run_texts(fast, dataset.ids):
        if pooled:
            yield batch, packing.mean(hidden).cpu()
        else:
            yield batch, [text for run in packing.split(hidden.cpu()) for text in run]


def sorted_batches(dataset: SentenceDataset, indices: Sequence[int]) -> list[list[int]]:
    """Sentences in batches where nothing is learned: by length."""
    order = sorted(indices, key=lambda i: len(dataset.ids[i]))
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
