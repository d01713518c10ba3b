"""Where a program computes."""

import os
import re

import torch


def find_device(name: str) -> torch.device:
    """What `--device` names: cpu, cuda or cuda:N; auto is a GPU if there is one.

    Of several processes that torchrun started each has a GPU of its own.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if not re.fullmatch(r"cpu|cuda:\d+", name):
        raise ValueError(f"--device {name}: it must be auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no GPU here, or none of this number
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
