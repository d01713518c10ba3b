"""Sentences -> vectors."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from operator import length_hint
from pathlib import Path
from typing import Any, Literal, Self, SupportsIndex, TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from minibert.fast_attention import has_varlen
from minibert.fast_inference import FastModel, fast_copy, in_batches, run_texts, token_budget
from minibert.fused_layers import has_hook
from minibert.inputs import check_dtype, full_name
from minibert.model import BertModel
from minibert.modes import evaluating
from minibert.onednn import onednn_products
from minibert.packing import Packing, send, sum_by_halves
from minibert.pooling import cls_pooling, mean_pooling
from minibert.sentence_transformers_files import module_files, read_modules
from minibert.tokenizer import Tokenizer, as_iterable, check_tokenizer
from minibert.wrapped import bert_inside
from weights import resolve
from weights.hub import SMALL_FILES
from weights.safetensors_files import check_same_save, last_save

T = TypeVar("T")

POOLINGS = {"mean": mean_pooling, "cls": cls_pooling}
PACKED_POOLINGS = {"mean": Packing.mean, "cls": Packing.first}  # without one `forward` is called
BLOCK_SENTENCES, BLOCK_CHARACTERS = 4096, 1_000_000  # that are read, tokenized and sorted together


class SentenceEncoder(nn.Module):
    """A BERT, its tokenizer and a pooling (Reimers & Gurevych 2019, section 3).

    `pooling` is "mean" or "cls"; `normalize_embeddings` the default of `encode`'s argument, whether
    each vector is scaled to length 1; `dtype` what `encode` computes its Linears in, the weights' dtype
    if None; `compile` whether `encode` uses torch.compile (on a GPU, in bfloat16 or float16).
    An `nn.Module`: `.to("cuda")` moves it, and `forward` can be trained.

    Raises:
        TypeError: the model is no BertModel (nor anything that has its config, device and dtype), or the
            tokenizer no `Tokenizer`.
        ValueError: `pooling` is neither, or `dtype` no dtype for it.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: Tokenizer,
        *,
        pooling: str = "mean",
        normalize_embeddings: bool = False,
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if not all(hasattr(model, name) for name in ("config", "device", "dtype")):
            raise TypeError(f"model is a {full_name(model)}, it must be a minibert.BertModel")
        check_tokenizer(tokenizer)
        check_dtype(dtype)
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize_embeddings = normalize_embeddings
        self.dtype = dtype
        self.compiled = compile

    @property
    def pooling(self) -> str:
        """What a sentence's vector is made of. Setting it raises ValueError for an unknown name."""
        return self._pooling

    @pooling.setter
    def pooling(self, pooling: str) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, it must be {' or '.join(POOLINGS)}")
        self._pooling = pooling

    @property
    def max_seq_length(self) -> int:
        """The most tokens that are read of a text: `tokenizer.max_length`, by sentence-transformers' name."""
        return self.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int) -> None:
        self.tokenizer.max_length = tokens

    @classmethod
    @torch.inference_mode(False)  # as BertModel's
    def from_pretrained(
        cls,
        name_or_path: str | Path = "bert-base-uncased",
        *,
        attention: str = "sdpa",
        dtype: torch.dtype | None = None,
        compile: bool = False,
    ) -> Self:
        """From a model directory, a catalog name or `org/name`; arguments as `BertModel.from_pretrained`,
        and `compile` as for the class.

        With dtype=torch.bfloat16 `encode` computes its Linears in bfloat16 and all else in float32;
        `model` keeps the published weights.

        Pooling and normalisation are read from the directory's modules.json as
        sentence-transformers writes it; without one: mean, not normalised.

        Raises:
            ModelNotFoundError: no such model on disk or on the hub.
            CheckpointError: its files cannot be used.
            ValueError: `attention` or `dtype` is none of those.
        """
        directory = resolve(name_or_path)
        mark = last_save(directory)
        pooling, normalize = read_modules(directory)
        in_encode_only = dtype == torch.bfloat16
        model = BertModel.from_pretrained(
            directory, attention=attention, dtype=None if in_encode_only else dtype
        )
        if in_encode_only and model.dtype == torch.float16:
            model.float()  # float16 has no room for the numbers of bfloat16
        tokenizer = Tokenizer.from_pretrained(directory)
        check_same_save(directory, mark)
        return cls(
            model,
            tokenizer,
            pooling=pooling,
            normalize_embeddings=normalize,
            dtype=dtype if in_encode_only else None,
            compile=compile,
        ).eval()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids, mask and types as `BertModel` takes them -> (B, H), pooled, not normalised."""
        hidden = self.model(input_ids, attention_mask, token_type_ids).last_hidden_state  # (B, T, H)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # (B, T)
        return POOLINGS[self.pooling](hidden, mask)

    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        normalize_embeddings: bool | None = ...,
        convert_to_tensor: Literal[False] = ...,
        show_progress_bar: bool | None = ...,
    ) -> NDArray[np.float32]: ...
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        normalize_embeddings: bool | None = ...,
        *,
        convert_to_tensor: Literal[True],
        show_progress_bar: bool | None = ...,
    ) -> Tensor: ...
    @overload
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = ...,
        normalize_embeddings: bool | None = ...,
        convert_to_tensor: bool = ...,
        show_progress_bar: bool | None = ...,
    ) -> NDArray[np.float32] | Tensor: ...
    def encode(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = None,
        normalize_embeddings: bool | None = None,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
    ) -> NDArray[np.float32] | Tensor:
        """Embeds one sentence as (H,), several as (n, H) in the order given, none as (0, H).

        A sentence's numbers are the same to the last bit whatever else is encoded with it (where:
        docs/performance.md). In float32 each differs from that of `forward`, which pads, by at most
        1e-6 of the embedding's length. (Where a part of the model is not ours, or has a hook, `forward` is
        called with the ids and a mask of texts of one length at a time: slower, in the model's own dtype,
        not compiled, and bits may depend on the batch.)

        Weights that have changed since the last call are noticed, except where torch keeps no record (written
        into `.data`, or by numpy or a collective into a detached tensor) and not all numbers of a Linear's
        matrix or bias changed: then call `torch.autograd.graph.increment_version(model.parameters())`.

        Args:
            sentences: a string, or any iterable of strings, which is read block by block.
            batch_size: sentences per forward pass; if None, as many as fill a budget of tokens.
                Batches are cut from the sentences sorted by length, and nothing is padded.
            normalize_embeddings: scale each vector to length 1; as the checkpoint says if None.
            convert_to_tensor: return a tensor on the model's device instead of a numpy array.
            show_progress_bar: None shows one on a terminal, after the first second.

        Returns:
            A float32 numpy array, or a tensor: float32, or float64 of a float64 model.

        Raises:
            TypeError: not a string (which one is named).
            ValueError: a lone surrogate, a batch_size below 1, a `dtype` wider than the model's,
                `compile` where it cannot be used, or a text with an id or a position that the model has no
                vector for (a tokenizer with more tokens, or a higher limit, than it).
        """
        blocks = self.encode_blocks(sentences, batch_size, normalize_embeddings, show_progress_bar)
        if not convert_to_tensor:  # a GPU need not hold them all
            blocks = (block.float().cpu() for block in blocks)
        parts = [*blocks] or [self._zeros(0)]
        with torch.inference_mode(False):  # what is given back can be trained on
            embeddings = torch.cat(parts) if len(parts) > 1 else parts[0]  # (n, H)
            result = embeddings[0] if isinstance(sentences, str) else embeddings
        return result if convert_to_tensor else result.float().cpu().numpy()

    def encode_blocks(
        self,
        sentences: str | Iterable[str],
        batch_size: int | None = None,
        normalize_embeddings: bool | None = None,
        show_progress_bar: bool | None = None,
    ) -> Iterator[Tensor]:
        """As `encode`, but yields (up to 4,096, H) at a time, in order: for more than fits in memory.

        Only one block of sentences is held (on a GPU, and one read ahead).
        """
        check_batch_size(batch_size)
        texts = as_iterable(sentences)
        normalize = self.normalize_embeddings if normalize_embeddings is None else normalize_embeddings
        return self._with_a_warning(self.blocks_and_cuts(texts, batch_size, normalize, show_progress_bar))

    def _with_a_warning(self, blocks: Iterable[tuple[Tensor, int]]) -> Iterator[Tensor]:
        done, cut = 0, 0
        for embeddings, cut_here in blocks:
            yield embeddings
            done += len(embeddings)
            cut += cut_here
        self.tokenizer.warn_if_cut(cut, done)

    def blocks_and_cuts(
        self,
        texts: Iterable[str],
        batch_size: int | None,
        normalize: bool,
        show_progress_bar: bool | None = None,
    ) -> Iterator[tuple[Tensor, int]]:
        """Blocks of embeddings, and how many texts of each were cut; neither checks nor warns."""
        total = length_hint(texts) or None  # unlike `len` it takes a DataLoader that does not know
        tokenized = self._tokenize(texts)
        results = _one_ahead(tokenized) if self._on_gpu() else (call() for call in tokenized)
        with _progress_bar(total, show_progress_bar) as progress:
            for ids, cut in results:
                embeddings = self._embed(ids, batch_size, progress)  # (block, H)
                yield _to_length_one(embeddings) if normalize else embeddings, cut

    def _on_gpu(self) -> bool:
        return self.model.device.type == "cuda"

    def _tokenize(self, texts: Iterable[str]) -> Iterator[Callable[[], tuple[list[list[int]], int]]]:
        """For each block a call that gives its ids, and how many of its texts were cut."""
        remaining, done = iter(texts), 0
        while block := _read_block(remaining):
            yield partial(self.tokenizer.token_ids_and_cuts, block, first=done)
            done += len(block)

    def _embed(self, ids: list[list[int]], batch_size: int | None, progress: Callable[[int], object]) -> Tensor:
        fast = self._fast_copy()
        mode: AbstractContextManager[object]
        if fast is None:
            results, mode = self._by_forward(ids, batch_size), evaluating(self)
        else:
            results, mode = self._pooled(fast, ids, batch_size), torch.inference_mode()
        device = self.model.device
        embeddings = None
        with mode, onednn_products() if device.type == "cpu" else nullcontext():
            for batch, vectors in results:
                if embeddings is None:
                    embeddings = self._zeros(len(ids), vectors)  # a text without token stays zero
                embeddings.index_copy_(0, send(np.array(batch, np.int64), device), vectors.to(embeddings.dtype))
                progress(len(batch))
        return self._zeros(len(ids)) if embeddings is None else embeddings

    def _fast_copy(self) -> FastModel | None:
        """None if something is not as we made it: then `forward` is called."""
        plain = has_plain_forward(self, SentenceEncoder) and not has_hook(self.model)
        if not plain or self.pooling not in PACKED_POOLINGS:
            return None
        fast = fast_copy(self.model, self.dtype)
        if fast is None:
            return None
        stored, head_size = self.model.dtype, fast.config.head_size
        if self.dtype and torch.promote_types(self.dtype, stored) != stored:
            raise ValueError(
                f"dtype is {self.dtype} and the model {stored}, which cannot hold it: leave it out, "
                "or load the model in that dtype"
            )
        if self.compiled and not has_varlen(fast.device, self.dtype or stored, head_size):
            raise ValueError(
                "compile=True needs a GPU (Ampere or newer), flash attention in torch, dtype=torch.bfloat16 "
                f"and a head size that is a multiple of 8 up to 256 (it is {head_size}): leave it out"
            )
        return fast

    def _pooled(
        self, fast: FastModel, ids: list[list[int]], batch_size: int | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Which texts make a batch, and their vectors (batch, H)."""
        for batch, packing, hidden in run_texts(fast, ids, batch_size, compiled=self.compiled):
            yield batch, PACKED_POOLINGS[self.pooling](packing, hidden)

    def _by_forward(self, ids: list[list[int]], batch_size: int | None) -> Iterator[tuple[list[int], Tensor]]:
        """As `_pooled`, by `forward`; texts of one length at a time, so without padding."""
        device, config = self.model.device, self.model.config
        by_length = sorted((i for i, row in enumerate(ids) if row), key=lambda i: len(ids[i]))
        for _, run in groupby(by_length, key=lambda i: len(ids[i])):
            for batch in in_batches(list(run), ids, batch_size, token_budget(config, device)):
                input_ids = torch.tensor([ids[i] for i in batch], device=device)  # (batch, T)
                yield batch, self(input_ids, torch.ones_like(input_ids))

    @torch.inference_mode(False)
    def _zeros(self, rows: int, like: Tensor | None = None) -> Tensor:
        """(rows, H), float32 or wider; as wide as `like` or, if that is None, as the model's states."""
        dtype = self.model.dtype if like is None else like.dtype
        width = self.model.config.hidden_size if like is None else like.shape[1]
        wide = torch.promote_types(dtype, torch.float32)
        return torch.zeros(rows, width, dtype=wide, device=self.model.device)

    def save_pretrained(
        self, directory: str | Path, other_files: Mapping[str, bytes | Mapping[str, Tensor]] | None = None
    ) -> None:
        """Writes model, tokenizer and pooling as transformers and sentence-transformers read them.

        `other_files` (name -> bytes, or tensors as safetensors) are written with them.

        Raises:
            CheckpointError, TypeError, ValueError: as `BertModel.save_pretrained`.
            ValueError: parameters beside the model's, and no `other_files` to hold them.
        """
        beside = [name for name in self.state_dict() if not name.startswith("model.")]
        if beside and not other_files:
            raise ValueError(
                f"{', '.join(beside)} would be lost: save them in other_files, such as "
                "{'dense.safetensors': encoder.dense.state_dict()}, which you read yourself"
            )
        files: dict[str, Any] = dict.fromkeys(SMALL_FILES)  # None: of another model, that was here before
        files |= self.tokenizer.files()
        files |= module_files(
            self.pooling,
            self.normalize_embeddings,
            hidden_size=self.model.config.hidden_size,
            max_seq_length=self.tokenizer.max_length,
        )
        files |= other_files or {}
        bert_inside(self.model).save_pretrained(directory, files)


def check_batch_size(batch_size: object) -> None:
    """Raises ValueError unless it is None or an integer from 1 up."""
    if batch_size is not None and (not isinstance(batch_size, SupportsIndex) or int(batch_size) < 1):
        raise ValueError(f"batch_size is {batch_size!r}, it must be an integer from 1 up")


def has_plain_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it is `kind.forward` and no more: no other in a subclass or set later, no hook."""
    return type(module).forward is kind.forward and "forward" not in vars(module) and not has_hook(module)


@torch.inference_mode(False)
def _to_length_one(embeddings: Tensor) -> Tensor:
    """(n, H) -> the same, by `F.normalize` on a CPU: on a GPU the order in which it adds depends on n."""
    return _divide_by_length(embeddings) if embeddings.is_cuda else F.normalize(embeddings, dim=1)


def _divide_by_length(embeddings: Tensor) -> Tensor:
    lengths = sum_by_halves(embeddings.square()[..., None]).sqrt()  # (n, 1)
    return embeddings / lengths.clamp_min(1e-12)


def _one_ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the calls give. Each is made in a thread while what the one before it gave is in use."""
    with ThreadPoolExecutor(1) as thread:
        ahead: Future[T] | None = None
        for call in calls:
            made, ahead = ahead, thread.submit(call)
            if made is not None:
                yield made.result()
        if ahead is not None:
            yield ahead.result()


def _read_block(texts: Iterator[str]) -> list[str]:
    block: list[str] = []
    characters = 0
    for text in texts:
        block.append(text)
        characters += len(text) if isinstance(text, str) else 0
        if len(block) == BLOCK_SENTENCES or characters >= BLOCK_CHARACTERS:
            break
    return block


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # something of the user's in its place; closed
        return False


@contextmanager
def _progress_bar(total: int | None, show: bool | None) -> Iterator[Callable[[int], object]]:
    """Gives what is to be called with a number of sentences when so many are done."""
    if show is False or sys.stderr is None or (show is None and not _is_terminal(sys.stderr)):
        yield lambda sentences: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="encode", unit=" sentences", delay=0 if show else 1) as bar:
        yield bar.update
