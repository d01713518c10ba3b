"""What lets torch find the tensors in a model's output."""

from dataclasses import fields
from typing import TypeVar

from torch.utils._pytree import register_pytree_node

Output = TypeVar("Output")


def as_tree(kind: type[Output]) -> type[Output]:
    """Of a dataclass: torch.func and DistributedDataParallel see its fields, as those of a tuple.

    (With `static_graph=True` DistributedDataParallel would not average gradients otherwise.)
    """
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    register_pytree_node(
        kind, lambda output: ([getattr(output, name) for name in names], None), lambda values, _: kind(*values)
    )
    return kind
