"""Token vectors -> one sentence vector."""

import torch
from torch import Tensor

from minibert.inputs import check_states


def mean_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over the tokens that the mask keeps (Reimers & Gurevych 2019, section 3).

    (B, T, H), (B, T) -> (B, H), in float32 or, for float64 input, float64. A row whose mask is all
    zero gives zeros.

    Raises:
        TypeError, ValueError: no tensor of three axes, or a mask of another shape, or with values other than
            0, 1 and booleans.
    """
    check_states(last_hidden_state, attention_mask)
    mask = attention_mask.unsqueeze(-1).float()  # (B, T, 1)
    return (last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def cls_pooling(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """The vector of the first token that the mask keeps, [CLS], or of the first at all if it keeps none.

    Shapes, dtypes and errors as `mean_pooling`.
    """
    check_states(last_hidden_state, attention_mask)
    first = attention_mask.int().argmax(1)  # (B,), 0 unless padded on the left
    rows = torch.arange(first.shape[0], device=first.device)  # (B,)
    wide = torch.promote_types(last_hidden_state.dtype, torch.float32)
    return last_hidden_state[rows, first].to(wide)  # (B, H)
