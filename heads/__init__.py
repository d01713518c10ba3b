"""heads: what stands on the encoder for a task. Imports `minibert` and `weights`, never the reverse.

The model            mlp.py  multitask.py  losses.py  metrics.py
labelled sentences   tables.py (files)  data.py (batches)  sets.py (which a run uses)  demo.csv
a run of train.py    options.py  processes.py  features.py (what frozen layers give)  evaluation.py
its files            run_directory.py  training_state.py  report.py
"""

from heads.losses import MISSING, MultiTaskLoss
from heads.mlp import MLPHead
from heads.multitask import MultiTaskModel, MultiTaskOutput

__all__ = ["MISSING", "MLPHead", "MultiTaskLoss", "MultiTaskModel", "MultiTaskOutput"]
