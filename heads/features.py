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


def lower(model: MultiTaskModel, input_ids: Tensor, attention_mask: Tensor, depth: int) -> Tensor:
    """The embeddings and the lowest `depth` layers: (B, T) -> (B, T, H), or (B, H) if these are all."""
    check_inputs(model.encoder.config, input_ids, attention_mask, None)
    hidden = model.encoder.embeddings(input_ids)  # (B, T, H)
    for output, _ in model.encoder.run_layers(hidden, attention_mask, stop=depth):
        hidden = output
    return mean_pooling(hidden, attention_mask) if depth == len(model.encoder.layers) else hidden


def upper(model: MultiTaskModel, features: Tensor, attention_mask: Tensor, depth: int) -> MultiTaskOutput:
    """The rest: `upper(lower(...))` is what the model computes."""
    if depth == len(model.encoder.layers):
        return model.classify(features)
    hidden = features  # (B, T, H)
    for output, _ in model.encoder.run_layers(features, attention_mask, start=depth):
        hidden = output
    return model.classify(mean_pooling(hidden, attention_mask))


def compute(model: MultiTaskModel, batch: Mapping[str, Tensor], depth: int | None) -> MultiTaskOutput:
    """The model on a `SentenceDataset.collate` batch: all of it, or what lies above features of this depth."""
    if depth is not None:
        return upper(model, batch["features"], batch["attention_mask"], depth)
    output: MultiTaskOutput = model(batch["input_ids"], batch["attention_mask"])
    return output


def size_in_bytes(model: MultiTaskModel, dataset: SentenceDataset, depth: int) -> int:
    """The memory that a dataset's features take."""
    vectors = len(dataset) if depth == len(model.encoder.layers) else sum(map(len, dataset.ids))
    return vectors * model.encoder.config.hidden_size * 4


@torch.no_grad()
def fill(
    model: MultiTaskModel, sets: Mapping[SentenceDataset, Sequence[Sequence[int]]], depth: int
) -> Iterator[int]:
    """Computes the features of every sentence in `sets`, dataset -> batches of its sentences.

    Yields after each batch how many sentences it had; a dataset has its features when all of them are there.

    They are computed in these batches; sentences that are in none of them come last. Given the batches of the
    first epoch, that epoch's numbers are those of an uncached run, bit for bit; in later epochs, whose batches
    are others, they agree to rounding. Packed attention never gives the reference's numbers, so there the
    sentences are batched as is fastest.
    """
    pooled = depth == len(model.encoder.layers)
    packed = model.encoder.attention == "packed" and is_untouched(model.encoder)
    fast = _fast_encoder(model.encoder, depth) if packed else None
    for dataset, batches in sets.items():
        dataset.forget_features()
        features: dict[int, Tensor] = {}
        for some in _packed(fast, dataset, pooled) if fast else _padded(model, dataset, batches, depth):
            features |= some
            yield len(some)
        dataset.features, dataset.depth = [features[i] for i in range(len(dataset))], depth


def _padded(
    model: MultiTaskModel, dataset: SentenceDataset, batches: Sequence[Sequence[int]], depth: int
) -> Iterator[dict[int, Tensor]]:
    device = model.encoder.device
    rest = sorted(set(range(len(dataset))).difference(*batches), key=lambda i: len(dataset.ids[i]))
    for batch in [*batches, *(rest[i : i + BATCH_SIZE] for i in range(0, len(rest), BATCH_SIZE))]:
        inputs = dataset.collate(batch)
        hidden = lower(model, inputs["input_ids"].to(device), inputs["attention_mask"].to(device), depth)
        rows = zip(batch, hidden.cpu(), strict=True)
        yield {i: (row[: len(dataset.ids[i])] if row.dim() == 2 else row).clone() for i, row in rows}


def _packed(fast: FastModel, dataset: SentenceDataset, pooled: bool) -> Iterator[dict[int, Tensor]]:
    nothing = torch.zeros(0, fast.config.hidden_size)  # (0, H), of a text without any token
    yield {i: nothing.sum(0) if pooled else nothing for i, row in enumerate(dataset.ids) if not row}
    for batch, packing, hidden in run_texts(fast, dataset.ids):
        if pooled:
            rows: Iterable[Tensor] = packing.mean(hidden).cpu()  # (H,) each
        else:
            rows = (text for run in packing.split(hidden.cpu()) for text in run)  # (T, H) each
        yield {i: row.clone() for i, row in zip(batch, rows, strict=True)}


def _fast_encoder(encoder: BertModel, depth: int) -> FastModel:
    kind = encoder.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return FastModel(encoder, dtype, layers=depth)
