"""pytorch_model.bin -> safetensors, for checkpoints that were never published as safetensors."""

from pathlib import Path

import torch
from torch import Tensor

from weights.checkpoint import refuse, with_our_names
from weights.hub import SMALL_FILES, resolve
from weights.json_files import CheckpointError, read_config, read_json, to_json
from weights.safetensors_files import PICKLE, SINGLE, as_directory, why_no_weights, write_directory


def convert(name_or_path: str | Path, directory: str | Path) -> None:
    """Writes a `.bin` checkpoint's encoder, config and tokenizer into a directory.

    The tensors keep their names and bits. A config.json without a model_type, as the oldest are, has one in
    the copy: transformers would guess it from the directory's name. Only tensors are unpickled
    (`weights_only=True`): no code in the file runs.

    Raises:
        ModelNotFoundError: no such model on disk or on the hub.
        CheckpointError: no BERT or DistilBERT; there is no pytorch_model.bin, it is damaged, or it holds
            more than tensors, or tensors that an encoder does not have; `directory` holds heads.
        ValueError: `directory` names none.
    """
    directory = as_directory(directory)
    source = resolve(name_or_path)
    config = read_config(source)
    path = source / PICKLE
    if not path.is_file():
        raise CheckpointError(f"{source} has no {path.name} to convert")
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything, with advice that is not ours
        reason = why_no_weights(path) or (
            f"cannot be read as tensors ({type(error).__name__}): it is cut off (fetch it again), or holds "
            "more than tensors"
        )
        raise CheckpointError(f"{path} {reason}") from error
    if not isinstance(published, dict):
        raise CheckpointError(f"{path} holds a {type(published).__name__}, not named tensors")
    for key, tensor in published.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            kind = type(tensor).__name__
            raise CheckpointError(f"{path} holds more than named tensors: {key!r:.60} names a {kind}")
    checkpoint = with_our_names(source, config, published)
    refuse(path, checkpoint.problems)
    tensors = {key: published[key] for key in checkpoint.published.values()}
    settings = {**read_json(source / "config.json"), "model_type": config["model_type"]}
    # None: of another model, that was here before
    paths = {name: source / name for name in SMALL_FILES}
    others = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
    files = {SINGLE: tensors, "config.json": to_json(settings), **others}
    write_directory(directory, files)
