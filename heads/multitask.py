"""One encoder, several heads: one pass, and every task's scores (Caruana 1997; Liu et al. 2019)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from heads.losses import check_dict
from heads.mlp import MLPHead
from minibert import BertModel, SentenceEncoder, Tokenizer, mean_pooling
from minibert.freezing import keep_frozen_in_eval
from minibert.inputs import full_name
from minibert.modes import evaluating
from minibert.sentence_encoder import check_batch_size, has_plain_forward
from minibert.tokenizer import as_list, check_tokenizer
from minibert.wrapped import bert_inside, uncompiled
from weights import CheckpointError, resolve
from weights.hub import MODULES, TOKENIZER_FILES
from weights.json_files import read_json, to_json
from weights.safetensors_files import HEADS, check_same_save, last_save, read_file

TENSORS = "heads.safetensors"
BATCH_SIZE = 64  # where nothing is learned and nobody says
# Methods of nn.Module that are called on whole models only: inside `Heads` a task may have their names.
CONVERSIONS = ("type", "half", "float", "double", "bfloat16")


class MultiTaskOutput(NamedTuple):
    """`logits[name]` (B, classes) for every head; `embeddings` (B, H), mean-pooled."""

    logits: dict[str, Tensor]
    embeddings: Tensor


_register_namedtuple(MultiTaskOutput, serialized_type_name="heads.MultiTaskOutput")  # as in model.py


class Heads(nn.ModuleDict):
    """Modules by name, also by names that `nn.Module` has attributes of, such as "type"."""

    def __setitem__(self, name: str, head: nn.Module) -> None:
        self._modules[name] = head

    def __getattribute__(self, name: str) -> Any:
        if name in CONVERSIONS and name in self._modules:  # so torch's get_submodule finds it, too
            return self._modules[name]
        return super().__getattribute__(name)


class MultiTaskModel(nn.Module):
    """A shared encoder, mean pooling, and a head for each task.

    Args:
        encoder: its weights are shared by all tasks.
        heads: task name -> (B, H) embeddings to (B, classes) logits, e.g. `MLPHead(768, 256, 3)`.
        labels: task name -> the names of its classes; if not given, "0", "1", ... for an `MLPHead`.
        tokenizer: needed by `predict` only; saved with the rest.

    Raises:
        TypeError: the encoder is no BertModel, the tokenizer no `Tokenizer`, or heads or labels no dict.
        ValueError: a name that cannot be one, a head that is no Module, labels of a task without a head; an
            `MLPHead` or a `Linear` of another width than the encoder's, or with more or fewer classes than
            labels.
    """

    def __init__(
        self,
        encoder: BertModel,
        heads: Mapping[str, nn.Module],
        *,
        labels: Mapping[str, Sequence[str] | None] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(uncompiled(encoder), BertModel):
            where = ": its .model" * isinstance(encoder, SentenceEncoder)
            raise TypeError(f"encoder is a {full_name(encoder)}, it must be a minibert.BertModel{where}")
        if tokenizer is not None:
            check_tokenizer(tokenizer)
        labels = labels or {}
        check_dict("heads", heads)
        check_dict("labels", labels)
        if unknown := sorted(labels.keys() - heads.keys()):
            raise ValueError(f"labels are given for {unknown[0]!r}, the heads are: {', '.join(heads)}")
        for name, head in heads.items():
            _check_head(name, head, encoder.config.hidden_size, labels.get(name))
        self.encoder = encoder
        self.heads = Heads(heads)
        numbers = {n: tuple(map(str, range(h.out.out_features))) for n, h in heads.items() if _is_plain(h)}
        self.labels = numbers | {task: tuple(names) for task, names in labels.items() if names is not None}
        self.tokenizer = tokenizer

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> MultiTaskOutput:
        """(B, T) ids, mask and types, as `BertModel` takes them -> logits and embeddings."""
        hidden = self.encoder(input_ids, attention_mask, token_type_ids).last_hidden_state  # (B, T, H)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        return self.classify(mean_pooling(hidden, mask))

    def classify(self, embeddings: Tensor) -> MultiTaskOutput:
        """The heads alone, on (B, H) embeddings. Raises TypeError for an array."""
        if not isinstance(embeddings, Tensor):
            raise TypeError(
                f"embeddings is a {full_name(embeddings)}, it must be a tensor: encode gives one with "
                "convert_to_tensor=True"
            )
        logits = {}
        for name, head in self.heads.items():
            dtype = next((p.dtype for p in head.parameters()), embeddings.dtype)  # pooling is float32 or wider
            logits[name] = head(embeddings.to(dtype))
        return MultiTaskOutput(logits, embeddings)

    def train(self, mode: bool = True) -> Self:
        """As in every module, but what is frozen stays in eval mode: no dropout in what cannot learn."""
        super().train(mode)
        keep_frozen_in_eval(self)
        return self

    def predict(self, sentences: str | Iterable[str], batch_size: int | None = None) -> list[dict[str, Any]]:
        """For each sentence, `{task: {"label": name, "probability": of that label}}`.

        While another thread encodes, last bits of a probability may differ (docs/parity.md).

        Raises:
            TypeError, ValueError: no tokenizer, or as `SentenceEncoder.encode`.
            ValueError: a head gives no (B, classes), or nan, of which there is no label.
        """
        if self.tokenizer is None:
            raise ValueError("predict needs a tokenizer: give one, MultiTaskModel(..., tokenizer=...)")
        check_batch_size(batch_size)
        texts = as_list(sentences)
        logits = self._logits_of(texts, batch_size, self.tokenizer) if texts else {}
        best = {}
        for name, scores in logits.items():
            if scores.dim() != 2:
                raise ValueError(
                    f"head {name!r} gives {tuple(scores.shape)}, for `predict` it must be (B, classes)"
                )
            probabilities = scores.softmax(-1)  # (n, classes)
            if broken := probabilities.isnan().any(1).nonzero().flatten().tolist():
                raise ValueError(
                    f"head {name!r} gives nan for text {broken[0]}: a weight is not finite, or so large that a "
                    "sum is not"
                )
            best[name] = probabilities.max(-1)
        return [
            {
                name: {"label": self.label(name, int(indices[row])), "probability": float(values[row])}
                for name, (values, indices) in best.items()
            }
            for row in range(len(texts))
        ]

    def _logits_of(self, texts: list[str], batch_size: int | None, tokenizer: Tokenizer) -> dict[str, Tensor]:
        """By `encode`, which pads nothing; by `forward` where somebody changed what that does."""
        if has_plain_forward(self, MultiTaskModel):
            encoder = SentenceEncoder(self.encoder, tokenizer)
            embeddings = encoder.encode(texts, batch_size, convert_to_tensor=True, show_progress_bar=False)
            with evaluating(self.heads):
                return self.classify(embeddings).logits
        size = batch_size or BATCH_SIZE
        batches = [tokenizer(texts[start : start + size]) for start in range(0, len(texts), size)]
        device = self.encoder.device
        with evaluating(self):
            parts = [self(**{name: ids.to(device) for name, ids in batch.items()}).logits for batch in batches]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def label(self, task: str, index: int) -> str:
        """What a class is called. Raises ValueError if there are fewer labels."""
        names = self.labels.get(task)
        if names is not None and index >= len(names):
            raise ValueError(f"head {task} says class {index}, and has only {len(names)} labels")
        return str(index) if names is None else names[index]

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the encoder as published (loads in transformers), and beside it the heads.

        heads.json holds each task's sizes and label names, heads.safetensors the heads' weights.

        Raises:
            CheckpointError, ValueError: as `BertModel.save_pretrained`.
            ValueError: a head, put in since, that `MultiTaskModel` would refuse.
        """
        settings: dict[str, dict[str, Any]] = {}
        for name, head in self.heads.items():
            _check_head(name, head, self.encoder.config.hidden_size, self.labels.get(name))
            settings[name] = {"labels": list(self.labels[name])} if name in self.labels else {}
            if _is_plain(head):
                sizes = {"hidden": head.hidden.in_features, "width": head.hidden.out_features}
                settings[name] |= sizes | {"classes": head.out.out_features}
        files: dict[str, Any] = {HEADS: to_json({"heads": settings}), TENSORS: self.heads.state_dict()}
        if self.tokenizer is None:
            bert_inside(self.encoder).save_pretrained(directory, files | {MODULES: None})  # None: the mean
        else:
            SentenceEncoder(self.encoder, self.tokenizer).save_pretrained(directory, files)

    @classmethod
    @torch.inference_mode(False)  # as BertModel's
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        heads: Mapping[str, nn.Module] | None = None,
        attention: str = "sdpa",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """What `save_pretrained` wrote, in eval mode.

        Args:
            name_or_path: that directory.
            heads: modules for heads that are not `MLPHead`s as built; their weights come from the file.
            attention: the encoder's, as in `BertModel.from_pretrained`.
            dtype: of all, as there; as stored if None.

        Raises:
            ModelNotFoundError: no such directory.
            CheckpointError: its files cannot be used.
            ValueError: `heads` has one that was not saved, or as `BertModel.from_pretrained`.
        """
        directory = resolve(name_or_path)
        if not (directory / HEADS).is_file():
            if (directory / "best" / HEADS).is_file():
                raise CheckpointError(f"{directory} is the directory of a run: give {directory / 'best'}")
            raise CheckpointError(
                f"{directory} has no {HEADS}, so no MultiTaskModel was saved there: make one "
                "by MultiTaskModel(BertModel.from_pretrained(...), {...})"
            )
        mark = last_save(directory)
        settings = read_json(directory / HEADS).get("heads")
        if not isinstance(settings, dict):
            raise CheckpointError(f"{directory / HEADS} has no `heads`: save_pretrained did not write it")
        encoder = BertModel.from_pretrained(directory, attention=attention, dtype=dtype)
        has_tokenizer = any((directory / name).is_file() for name in TOKENIZER_FILES)
        tokenizer = Tokenizer.from_pretrained(directory) if has_tokenizer else None
        tensors = read_file(directory / TENSORS)
        check_same_save(directory, mark)
        given = heads or {}
        check_dict("heads", given)
        if unknown := sorted(given.keys() - settings.keys()):
            raise ValueError(f"{directory} has no head {unknown[0]!r}, it has: {', '.join(settings)}")
        try:
            built = {
                name: given[name] if name in given else _build_head(name, sizes)
                for name, sizes in settings.items()
            }
            labels = {name: sizes["labels"] for name, sizes in settings.items() if "labels" in sizes}
            model = cls(encoder, built, labels=labels, tokenizer=tokenizer)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / HEADS}: {error}") from error
        try:
            for key, tensor in [*model.heads.named_parameters(), *model.heads.named_buffers()]:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype or tensors.get(key, tensor).dtype)
            model.heads.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"{directory / TENSORS} does not fit {HEADS}: {' '.join(str(error).split())}"
            ) from error
        return model.eval()


def _check_head(name: str, head: nn.Module, hidden_size: int, labels: Sequence[str] | None) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name) or name == "training":
        raise ValueError(
            f"{name!r} cannot be the name of a task: use letters, digits, _ and - (not `training`)"
        )
    if not isinstance(head, nn.Module):
        raise ValueError(f"head {name} is {type(head).__name__}, it must be a torch.nn.Module")
    if labels is not None and (
        not isinstance(labels, list | tuple)
        or not all(isinstance(label, str) for label in labels)
        or len(set(labels)) < len(labels)
    ):
        raise ValueError(f"the labels of {name} are {labels!r}, they must be a list of different strings")
    if _is_plain(head) or type(head) is nn.Linear:
        first, last = (head.hidden, head.out) if isinstance(head, MLPHead) else (head, head)
        if first.in_features != hidden_size:
            raise ValueError(f"head {name} takes {first.in_features} numbers, the encoder gives {hidden_size}")
        if labels is not None and len(labels) != last.out_features:
            raise ValueError(f"head {name} has {last.out_features} classes but {len(labels)} labels")


def _is_plain(head: nn.Module) -> TypeGuard[MLPHead]:
    """Whether three numbers say what it is."""
    if type(head) is not MLPHead:
        return False
    if head.state_dict().keys() != {"hidden.weight", "hidden.bias", "out.weight", "out.bias"}:
        return False
    return type(head.hidden) is type(head.out) is nn.Linear


def _build_head(name: str, sizes: Any) -> MLPHead:
    names = ("hidden", "width", "classes")
    if not isinstance(sizes, dict) or not all(
        type(sizes.get(n)) is int and 0 < sizes[n] < 10**7 for n in names
    ):
        raise ValueError(
            f"head {name} is not an MLPHead: pass it as from_pretrained(..., heads={{{name!r}: ...}})"
        )
    return MLPHead(**{n: sizes[n] for n in names})
