"""The same multi-task training written directly with transformers and torch: what ours is held against.

Tests compare its numbers, bit for bit; benchmarks its time.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, get_linear_schedule_with_warmup


class TransformersMultiTask(nn.Module):
    """An AutoModel, masked mean pooling, Linear-ReLU-Linear heads."""

    def __init__(
        self, directory: Path, classes: Sequence[int], seed: int, widths: Sequence[int] = (256, 128)
    ) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(directory, attn_implementation="sdpa", dtype=torch.float32)
        hidden = self.encoder.config.hidden_size
        torch.manual_seed(seed)
        self.classifiers = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, count))
            for width, count in zip(widths, classes, strict=True)
        )
        for parameter in self.parameters():  # off the mapped file, see build_model in train.py
            parameter.data = parameter.data.clone()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(tokens.size()).float()
        pooled = torch.sum(tokens * mask, dim=1) / torch.clamp(mask.sum(dim=1), min=1e-9)
        return [classifier(pooled) for classifier in self.classifiers]


def is_frozen(spec: str, layers: int, epoch: int, tasks: Sequence[str]) -> Callable[[str], bool]:
    """Which parameters a strategy freezes, told by their names; written apart from FreezePlan on purpose."""

    def depth(name: str) -> int:  # embeddings -1, layers from 0, heads above all
        if "embeddings" in name:
            return -1
        layer = re.search(r"\.layer\.(\d+)\.", name)
        return int(layer[1]) if layer else layers

    def frozen(name: str) -> bool:
        if "pooler" in name:
            return True
        in_encoder = name.startswith("encoder.")
        if spec.startswith("only:"):
            low, high = (int(x) for x in re.findall(r"\d+", spec))
            return in_encoder and not low <= depth(name) <= high
        for term in spec.split(","):
            kind, _, argument = term.partition(":")
            if kind == "head" and name.startswith(f"classifiers.{tasks.index(argument)}."):
                return True
            if kind == "backbone" and in_encoder:
                return True
            if kind == "layers" and in_encoder and depth(name) < int(argument):
                return True
            if kind == "gradual" and in_encoder and depth(name) < layers - epoch // int(argument or 1):
                return True
        return False

    return frozen


def train_with_transformers(
    model: TransformersMultiTask,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Mapping[str, Tensor],
    batches: Sequence[Sequence[Sequence[int]]],
    *,
    spec: str = "none",
    lr: float,
    head_lr: float,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
) -> Iterator[dict[str, float]]:
    """Trains, and yields each step's losses per task.

    `labels[task]` (n,), -100 where missing; `batches` are indices, by epoch.
    """
    done, total = 0, sum(map(len, batches))
    optimizer = None
    for epoch, epoch_batches in enumerate(batches):
        frozen = is_frozen(spec, model.encoder.config.num_hidden_layers, epoch, list(labels))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not frozen(name))
        model.train()
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        optimizer = _optimizer(model, optimizer, lr, head_lr, weight_decay)
        schedule = get_linear_schedule_with_warmup(optimizer, round(warmup * total), total, last_epoch=done - 1)
        done += len(epoch_batches)
        for batch in epoch_batches:
            inputs = tokenizer([texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt")
            scores = model(inputs["input_ids"], inputs["attention_mask"])
            losses = {}
            for (task, values), logits in zip(labels.items(), scores, strict=True):
                targets = values[list(batch)]
                has_label = bool((targets != -100).any())
                losses[task] = F.cross_entropy(logits, targets) if has_label else 0 * logits.sum()
            torch.autograd.backward(torch.stack(list(losses.values())).sum())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield {task: loss.item() for task, loss in losses.items()}


def _optimizer(
    model: nn.Module, previous: torch.optim.AdamW | None, lr: float, head_lr: float, weight_decay: float
) -> torch.optim.AdamW:
    """An AdamW over what is trained; what was trained before keeps its state."""
    groups = []
    for is_head, rate in ((False, lr), (True, head_lr)):
        for decay in (weight_decay, 0.0):
            chosen = [
                p
                for name, p in model.named_parameters()
                if p.requires_grad
                and name.startswith("classifiers.") == is_head
                and (p.dim() > 1) == (decay > 0)
            ]
            if chosen:
                groups.append({"params": chosen, "lr": rate, "initial_lr": rate, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    if previous is not None:
        for parameter, state in previous.state.items():
            if parameter.requires_grad:
                optimizer.state[parameter] = state
    return optimizer
