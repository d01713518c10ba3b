"""weights: checkpoint files <-> named tensors. Knows no `nn.Module`.

resolve(name_or_path)          name or path -> a local directory       hub.py
load_checkpoint(name_or_path)  directory -> config, tensors            checkpoint.py
save_checkpoint(...)           config, tensors -> directory
"""

from weights.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from weights.hub import ModelNotFoundError, resolve
from weights.json_files import CheckpointError, read_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "ModelNotFoundError",
    "load_checkpoint",
    "read_config",
    "resolve",
    "save_checkpoint",
]
