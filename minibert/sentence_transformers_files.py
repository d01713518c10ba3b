"""The small files sentence-transformers keeps beside a checkpoint: how to pool and whether to normalise."""

import warnings
from pathlib import Path

from weights import CheckpointError
from weights.hub import MODULES, fetch_pooling
from weights.json_files import read_json, to_json

STEPS = ("Transformer", "Pooling", "Normalize")  # in this order


def read_modules(directory: Path) -> tuple[str, bool]:
    """(pooling, normalised?) as modules.json says; ("mean", False) where there is none.

    transformers leaves these files out: where it fetched the model, they are fetched now. If they cannot be,
    it warns.

    Raises:
        CheckpointError: damaged files, or steps that `SentenceEncoder` does not do.
    """
    if not fetch_pooling(directory):
        warnings.warn(
            f"{directory} came into the cache without modules.json, and the hub cannot be asked for it: "
            "mean pooling, not normalised, may not be what the model was made for",
            stacklevel=3,
        )
    _refuse_extras(directory / "config_sentence_transformers.json")
    _refuse_other_states(directory / "sentence_bert_config.json")
    path = directory / MODULES
    if not path.is_file():
        return "mean", False
    folders: dict[str, str] = {}  # kind of module -> its folder
    for module in read_json(path, list):
        if not isinstance(module, dict):
            raise CheckpointError(f"{path} lists {module!r}, which is not a module")
        folders[str(module.get("type")).rpartition(".")[2]] = str(module.get("path") or "")
    if unknown := folders.keys() - set(STEPS):
        raise CheckpointError(f"{path} has modules that are not supported: {', '.join(sorted(unknown))}")
    if [*folders] != sorted(folders, key=STEPS.index):
        raise CheckpointError(f"{path} has its modules in another order than {', '.join(STEPS)}")
    pooling = _read_pooling(directory / folders["Pooling"] / "config.json") if "Pooling" in folders else "mean"
    normalize = "Normalize" in folders
    if folders.get("Transformer"):
        raise CheckpointError(
            f"{path} keeps the encoder in {folders['Transformer']}/: load that directory, and set pooling = "
            f"{pooling!r} and normalize_embeddings = {normalize} on the SentenceEncoder"
        )
    return pooling, normalize


def _refuse_extras(path: Path) -> None:
    settings = read_json(path) if path.is_file() else {}
    for name in ("default_prompt_name", "truncate_dim"):
        if settings.get(name) is not None:
            raise CheckpointError(f"{path}: {name} {settings[name]!r} is not supported, only null")


def _refuse_other_states(path: Path) -> None:
    """What the transformer gives must be its last hidden state, of texts cut by the model's own limit."""
    settings = read_json(path) if path.is_file() else {}
    for name in ("processing_kwargs", "processor_kwargs", "tokenizer_args", "config_kwargs", "config_args"):
        if settings.get(name):
            raise CheckpointError(f"{path}: {name} {settings[name]} are not supported")
    if (task := settings.get("transformer_task", "feature-extraction")) != "feature-extraction":
        raise CheckpointError(f"{path}: transformer_task {task!r} is not supported, only 'feature-extraction'")
    try:
        state = settings["modality_config"]["text"]["method_output_name"]
    except (KeyError, TypeError):  # nothing is said
        return
    if state != "last_hidden_state":
        raise CheckpointError(f"{path} asks for {state}, only last_hidden_state is supported")


def _read_pooling(path: Path) -> str:
    """Understands `"pooling_mode": "mean"` and, older, a true `pooling_mode_mean_tokens`; mean without both."""
    settings = read_json(path)
    older = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    modes = settings.get("pooling_mode", older or "mean")
    modes = modes if isinstance(modes, list) else [modes]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    poolings = [known.get(str(mode), str(mode)) for mode in modes]
    if poolings not in (["mean"], ["cls"]):
        raise CheckpointError(f"{path} asks for pooling by {modes}, only mean or cls is supported")
    return poolings[0]


def module_files(pooling: str, normalize: bool, *, hidden_size: int, max_seq_length: int) -> dict[str, bytes]:
    """The inverse of `read_modules`: file name -> contents. Raises ValueError for another pooling."""
    if pooling not in ("mean", "cls"):
        raise ValueError(f"pooling by {pooling!r} cannot be saved, only by mean or cls")
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")] + [("Normalize", "2_Normalize")] * bool(normalize)
    return {
        MODULES: to_json(
            [
                {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{kind}"}
                for i, (kind, folder) in enumerate(modules)
            ]
        ),
        "sentence_bert_config.json": to_json({"max_seq_length": max_seq_length, "do_lower_case": False}),
        "1_Pooling/config.json": to_json(
            {
                "word_embedding_dimension": hidden_size,
                "pooling_mode_cls_token": pooling == "cls",
                "pooling_mode_mean_tokens": pooling == "mean",
                "pooling_mode_max_tokens": False,
                "pooling_mode_mean_sqrt_len_tokens": False,
            }
        ),
    }
