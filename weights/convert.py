"""pytorch_model.bin -> safetensors, for checkpoints that were never published as safetensors."""

import pickle
from pathlib import Path

import torch
from torch import Tensor

from weights.hub import OPTIONAL_FILES, TOKENIZER_FILES, resolve
from weights.json_files import CheckpointError
from weights.key_maps import is_ignored
from weights.safetensors_files import SINGLE, write_directory

PICKLE = "pytorch_model.bin"


def convert(name_or_path: str | Path, directory: str | Path) -> None:
    """Writes a `.bin` checkpoint's encoder, config and tokenizer into a directory, all or nothing.

    The tensors keep their names and bits. Only tensors are unpickled (`weights_only=True`): no
    code in the file runs.

    Raises:
        ModelNotFoundError: no such model on disk or on the hub.
        CheckpointError: there is no pytorch_model.bin, it is damaged, or it holds more than tensors.
    """
    source = resolve(name_or_path)
    path = source / PICKLE
    if not path.is_file():
        raise CheckpointError(f"{source} has no {PICKLE} to convert")
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(published, dict) or not all(isinstance(t, Tensor) for t in published.values()):
        raise CheckpointError(f"{path} does not hold named tensors, it holds a {type(published).__name__}")
    others = [name for name in ("config.json", *TOKENIZER_FILES, *OPTIONAL_FILES) if (source / name).is_file()]
    tensors = {key: tensor for key, tensor in published.items() if not is_ignored(key)}
    write_directory(Path(directory), {SINGLE: tensors, **{n: (source / n).read_bytes() for n in others}})
