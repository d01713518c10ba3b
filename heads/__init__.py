"""heads: what stands on the encoder for a task. Imports `minibert` and `weights`, never the reverse."""

from heads.mlp import MLPHead

__all__ = ["MLPHead"]
