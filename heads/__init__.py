"""heads: what stands on the encoder for a task. Imports `minibert` and `weights`, never the reverse."""

from heads.losses import MISSING, MultiTaskLoss
from heads.mlp import MLPHead
from heads.multitask import MultiTaskModel, MultiTaskOutput

__all__ = ["MISSING", "MLPHead", "MultiTaskLoss", "MultiTaskModel", "MultiTaskOutput"]
