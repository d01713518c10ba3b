"""weights: checkpoint files <-> named tensors. Knows no `nn.Module`.

name or path -> a local directory    hub.py  catalog.py (what is pinned)
directory <-> config, tensors        checkpoint.py  key_maps.py (published names <-> ours)
their files                          safetensors_files.py  json_files.py  locks.py
pytorch_model.bin -> safetensors     convert.py
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
