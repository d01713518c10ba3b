"""What torch.compile, or somebody's own module, may have put around a model."""

from typing import Any

from torch import nn

from minibert.inputs import full_name
from minibert.model import BertModel


def uncompiled(model: Any) -> Any:
    """What torch.compile wrapped; anything else as it is."""
    return getattr(model, "_orig_mod", model)


def bert_inside(model: nn.Module) -> BertModel:
    """The encoder that torch.compile may have wrapped.

    Raises:
        ValueError: something else is around it, which could not be saved with it.
    """
    inside = uncompiled(model)
    if not isinstance(inside, BertModel):
        raise ValueError(
            f"a {full_name(inside)} cannot be saved, only a minibert.BertModel: put the one inside it in its "
            "place"
        )
    return inside
