"""What lets torch find the tensors in a model's output."""

from dataclasses import fields
from typing import TypeVar

from torch.utils._pytree import register_pytree_node

Output = TypeVar("Output")


def as_tree(kind: type[Output]) -> type[Output]:
    """Decorates a dataclass, so that torch.func, torch.export and DistributedDataParallel find its tensors.

    (Without it DistributedDataParallel with `static_graph=True` would not average gradients.)
    """
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    register_pytree_node(
        kind,
        lambda output: ([getattr(output, name) for name in names], None),
        lambda values, _: kind(*values),
        serialized_type_name=f"{kind.__module__}.{kind.__name__}",  # for torch.export.save
    )
    return kind
