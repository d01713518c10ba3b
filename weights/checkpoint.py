"""A checkpoint directory <-> config and tensors under our names."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.hub import resolve
from weights.json_files import CheckpointError, read_config, to_json
from weights.key_maps import FAMILIES, is_ignored
from weights.safetensors_files import SINGLE, as_directory, read_tensors, write_directory

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that a model may be in
LISTED = 12  # so many problems of a kind are named in an error


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint directory holds.

    `config` has BERT's published field names whatever the family, and always a `model_type`.
    `tensors` has our names. `published` gives the key a tensor had in the file. `problems` are the
    keys that could not be used, by kind; `tensors_for` reports them together with the rest.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    published: dict[str, str]
    problems: dict[str, list[str]]

    def tensors_for(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """The tensors a model with parameters of these shapes needs, checked, in `dtype` or as stored.

        A pooler in the file that the model does not have is left out.

        Raises:
            CheckpointError: one error that lists every missing, unexpected, doubled or mis-shaped
                tensor and every dtype that does not fit.
        """
        family = FAMILIES[self.config["model_type"]]
        found = {key: t for key, t in self.tensors.items() if key in shapes}
        problems = self.problems | {
            "missing": [family.to_published(key) for key in shapes if key not in found],
            "unexpected": [
                self.published[key]
                for key in self.tensors
                if key not in shapes and not key.startswith("pooler.")
            ],
            "other shapes than config.json says,": [
                f"{self.published[key]} is {tuple(t.shape)} and not {tuple(shapes[key])}"
                for key, t in found.items()
                if t.shape != shapes[key]
            ],
            f"stored in another dtype than {', '.join(map(str, FLOATS))}:": [
                f"{self.published[key]} as {t.dtype}" for key, t in found.items() if t.dtype not in FLOATS
            ],
        }
        dtypes = Counter(t.dtype for t in found.values() if t.dtype in FLOATS)
        if len(dtypes) > 1 and dtype is None:
            problems["stored in several dtypes, choose one, such as dtype=torch.float32:"] = [
                f"{count} as {each}" for each, count in dtypes.most_common()
            ]
        refuse(self.directory, problems)
        return {key: t if dtype is None else t.to(dtype) for key, t in found.items()}


def load_checkpoint(name_or_path: str | Path) -> Checkpoint:
    """Resolves a name or directory (see `weights.resolve`) and reads its config and tensors.

    The tensors are memory-mapped, not copied.

    Raises:
        ModelNotFoundError: no such model on disk or on the hub.
        CheckpointError: config.json or the weights cannot be used.
    """
    directory = resolve(name_or_path)
    return with_our_names(directory, read_config(directory), read_tensors(directory))


def with_our_names(
    directory: Path, config: dict[str, Any], published_tensors: Mapping[str, Tensor]
) -> Checkpoint:
    """A config in BERT's field names and tensors by published keys as a `Checkpoint`.

    Where the encoder's keys all have its family's prefix, what has another is not the encoder's: a head, say.
    """
    family = FAMILIES[config["model_type"]]
    names = {key: family.to_ours(key) for key in published_tensors if not is_ignored(key)}
    known = [key for key, ours in names.items() if ours]
    inside = family.prefix if known and all(key.startswith(family.prefix) for key in known) else ""
    tensors: dict[str, Tensor] = {}
    published: dict[str, str] = {}
    problems: dict[str, list[str]] = {"unknown": [], "doubled": []}
    for key, ours in names.items():
        if not key.startswith(inside):
            continue
        if ours is None:
            problems["unknown"].append(key)
        elif ours in tensors:
            problems["doubled"].append(f"{key} (also as {published[ours]})")
        else:
            tensors[ours], published[ours] = published_tensors[key], key
    return Checkpoint(directory, config, tensors, published, problems)


def refuse(path: Path, problems: Mapping[str, Sequence[str]]) -> None:
    """Raises CheckpointError if there are any `problems`: kind -> the keys, or what else is to say of it."""
    if any(problems.values()):
        told = "; ".join(f"{kind} {_listed(keys)}" for kind, keys in problems.items() if keys)
        raise CheckpointError(f"{path}: the weights do not fit: {told}")


def save_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    other_files: Mapping[str, bytes | Mapping[str, Tensor] | None] | None = None,
) -> None:
    """Writes config.json and model.safetensors as published (and `other_files`), see `write_directory`.

    `config` has BERT's field names and a `model_type`, bert or distilbert; `tensors` have our names, and must
    have the `shapes` of a model with that config.

    Raises:
        CheckpointError: the directory cannot be written, or heads in it would stand on another encoder.
        ValueError: the tensors are not those of such a model.
    """
    directory = as_directory(directory)
    family = FAMILIES[config["model_type"]]
    published = {family.to_published(key): tensor for key, tensor in tensors.items()}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    wrong = [
        f"{key} is {_shape(found.get(key))}, by the config {_shape(shapes.get(key))}"
        for key in {**shapes, **found}
        if found.get(key) != shapes.get(key)
    ]
    if wrong:
        raise ValueError(
            f"the model is not what its config says ({_listed(wrong)}): correct it, or model.config by "
            "dataclasses.replace(model.config, ...)"
        )
    dtype = next(iter(tensors.values())).dtype
    written = {
        "architectures": [family.architecture],
        **family.config_to_published(config),
        "dtype": str(dtype).removeprefix("torch."),
    }
    files = {SINGLE: published, "config.json": to_json(written), **(other_files or {})}
    write_directory(directory, files)


def _shape(shape: torch.Size | None) -> str:
    return "nowhere" if shape is None else str(tuple(shape))


def _listed(lines: Iterable[str]) -> str:
    collapsed = collapse_layers(lines)
    more = [f"and {len(collapsed) - LISTED} more"] if len(collapsed) > LISTED else []
    return ", ".join(collapsed[:LISTED] + more)


def collapse_layers(lines: Iterable[str]) -> list[str]:
    """`encoder.layer.0.x`, `encoder.layer.1.x`, ... -> `encoder.layer.0-1.x`; whole layers as one.

    Works on anything that begins with a published key, so also on sentences about one.
    """
    layers: dict[str, list[int]] = defaultdict(list)  # "encoder.layer.{}.x" -> its layer numbers
    for line in lines:
        before, marker, after = line.partition(".layer.")
        number, dot, rest = after.partition(".")
        if marker and dot and number.isdecimal():
            layers[f"{before}.layer.{{}}.{rest}"].append(int(number))
        else:
            layers[line] = []
    same_layers: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for template, numbers in layers.items():
        same_layers[tuple(sorted(numbers))].append(template)
    collapsed = []
    for numbers_key, templates in same_layers.items():
        span = _ranges(numbers_key)
        if numbers_key and len(templates) > 4:
            stem = templates[0].partition("{}")[0]
            collapsed.append(f"{stem}{span}.* ({len(templates)} tensors each)")
        else:
            collapsed += [template.replace("{}", span) for template in templates]
    return collapsed


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
