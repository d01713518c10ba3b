"""The JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from weights.key_maps import FAMILIES


class CheckpointError(ValueError):
    """Something is wrong with a checkpoint's files; the message says what, where and what to do."""


def read_json(path: Path, kind: type = dict) -> Any:
    """The JSON value in a file, which must be of this kind.

    Raises:
        CheckpointError: the file is missing, unreadable, not JSON, or JSON of another kind.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError; nested too deep
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not a {kind.__name__}")
    return value


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json in BERT's field names, with its `model_type`.

    Raises:
        CheckpointError: no config.json, or one of another model type.
    """
    file = Path(directory, "config.json")
    published = read_json(file)
    model_type = published.setdefault("model_type", "bert")  # the oldest BERT files do not say
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{file} says model_type {model_type!r}: only {' and '.join(map(repr, FAMILIES))} are supported"
        )
    return FAMILIES[model_type].config_to_bert(published)


def to_json(value: object) -> bytes:
    """JSON laid out as the published files are."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
