"""Reading and writing checkpoints: layouts, names, memory, and everything that can be wrong with one."""

import errno
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minibert import BertConfig, BertModel
from minibert.memory import release_memory
from tests.conftest import TINY, TINY_DISTILBERT, save_random
from tests.full_disk import no_file_beyond
from weights import CheckpointError, load_checkpoint, safetensors_files
from weights.checkpoint import collapse_layers
from weights.convert import convert
from weights.key_maps import FAMILIES
from weights.safetensors_files import read_file, write_directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
    tensors = {key: t.clone() for key, t in weights_of(directory).items()}
    save_file(dict(change(tensors)), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def set_config(directory: Path, **fields: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def contents(directory: Path) -> dict[Path, bytes]:
    """Of all files in it, hidden ones too."""
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same_weights(a: BertModel, b: BertModel) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- names and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_key_table_is_reversible(family: str) -> None:
    table = FAMILIES[family]
    assert len(set(table.modules.values())) == len(table.modules)
    for ours in table.modules:
        key = f"{ours.format(11)}.weight"
        assert table.to_ours(table.to_published(key)) == key
        assert table.to_ours(table.prefix + table.to_published(key)) == key
    assert table.to_ours("encoder.layer.0.attention.self.query.scale") is None
    assert table.to_ours("something.else.weight") is None


def test_legacy_names_heads_and_position_ids(copy: Path, tiny: Path) -> None:
    def as_first_published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        renamed = {}
        for key, tensor in tensors.items():
            for new, old in legacy.items():
                key = key.replace(new, old)
            renamed[f"bert.{key}"] = tensor
        renamed["bert.embeddings.position_ids"] = torch.arange(19)[None]
        renamed["bert.embeddings.token_type_ids"] = torch.zeros(1, 19, dtype=torch.int64)
        renamed["cls.predictions.transform.LayerNorm.gamma"] = torch.ones(36)
        renamed["cls.seq_relationship.weight"] = torch.ones(2, 36)
        return renamed

    rewrite(copy, as_first_published)
    assert_same_weights(BertModel.from_pretrained(copy), BertModel.from_pretrained(tiny))


def test_transformers_models_with_heads(tmp_path: Path) -> None:
    import transformers

    for kind in ("PreTraining", "MaskedLM", "SequenceClassification", "QuestionAnswering"):
        architecture = getattr(transformers, f"BertFor{kind}")
        directory = save_random(architecture, transformers.BertConfig(**TINY), tmp_path / kind)
        model = BertModel.from_pretrained(directory)
        assert (model.pooler is None) == (kind in ("MaskedLM", "QuestionAnswering"))
        if model.pooler is None:
            assert model(torch.ones(1, 3, dtype=torch.int64)).pooler_output is None


def test_beside_heads_of_any_name(copy: Path, tiny: Path, tmp_path: Path) -> None:
    """In a model around the encoder; but what is inside the encoder must be known."""

    def around(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        inside = {f"bert.{key}": tensor for key, tensor in tensors.items()}
        return {"fc.weight": torch.ones(2, 36), "crf.transitions": torch.ones(2), **inside}

    rewrite(copy, around)
    model = BertModel.from_pretrained(copy)
    assert_same_weights(model, BertModel.from_pretrained(tiny))
    torch.save(weights_of(copy), copy / "pytorch_model.bin")
    convert(copy, tmp_path / "converted")
    assert_same_weights(BertModel.from_pretrained(tmp_path / "converted"), model)
    assert all(key.startswith("bert.") for key in weights_of(tmp_path / "converted"))
    rewrite(copy, lambda tensors: tensors | {"bert.adapter.weight": torch.ones(2)})
    assert error_of(copy).endswith("do not fit: unknown bert.adapter.weight")


def test_distilbert_with_its_head(tmp_path: Path) -> None:
    from transformers import AutoModel, DistilBertConfig, DistilBertForMaskedLM

    directory = save_random(DistilBertForMaskedLM, DistilBertConfig(**TINY_DISTILBERT), tmp_path / "published")
    model = BertModel.from_pretrained(directory)
    model.save_pretrained(tmp_path / "saved")
    assert_same_weights(BertModel.from_pretrained(tmp_path / "saved"), model)
    reference, info = AutoModel.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(9).view(1, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, reference.eval()(ids).last_hidden_state)


def test_a_distilbert_that_does_not_say_how_deep_it_is(tmp_path: Path) -> None:
    from transformers import AutoConfig, DistilBertConfig, DistilBertModel

    directory = save_random(DistilBertModel, DistilBertConfig(**TINY_DISTILBERT | {"n_layers": 6}), tmp_path)
    published = json.loads((directory / "config.json").read_text())
    del published["n_layers"]
    (directory / "config.json").write_text(json.dumps(published))
    assert (
        len(BertModel.from_pretrained(directory).layers) == AutoConfig.from_pretrained(directory).n_layers == 6
    )


def test_a_distilbert_with_fields_of_a_bert(tmp_path: Path) -> None:
    """Its own count for more, and what never varies is not read."""
    from transformers import DistilBertConfig, DistilBertModel

    directory = save_random(DistilBertModel, DistilBertConfig(**TINY_DISTILBERT), tmp_path)
    ids = torch.arange(9).view(1, 9)
    with torch.no_grad():
        expected = DistilBertModel.from_pretrained(directory).eval()(ids).last_hidden_state
        set_config(directory, hidden_size=40, num_hidden_layers=5, type_vocab_size=2, layer_norm_eps=0.5)
        assert torch.equal(BertModel.from_pretrained(directory)(ids).last_hidden_state, expected)
    assert not {"dim", "n_layers"} & load_checkpoint(directory).config.keys()


def test_sharded_checkpoint(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert not (tmp_path / "sharded" / "model.safetensors").exists()
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    assert_same_weights(BertModel.from_pretrained(tmp_path / "sharded"), BertModel.from_pretrained(tiny))


# --- dtypes and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_as_stored_or_converted(copy: Path, dtype: torch.dtype) -> None:
    rewrite(copy, lambda tensors: {key: t.to(dtype) for key, t in tensors.items()})
    stored = BertModel.from_pretrained(copy)
    assert {p.dtype for p in stored.parameters()} == {dtype}
    converted = BertModel.from_pretrained(copy, dtype=torch.float32)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    stored.save_pretrained(copy / "again")
    assert json.loads((copy / "again" / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
        "torch."
    )
    assert_same_weights(BertModel.from_pretrained(copy / "again"), stored)


def test_integer_dtype_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int64, it must be torch.float32, bfloat16"):
        BertModel.from_pretrained(copy, dtype=torch.int64)


def test_parameters_are_the_files_memory(tiny: Path) -> None:
    """Each parameter starts in memory at its file offset from the others: nothing was copied."""
    model = BertModel.from_pretrained(tiny)
    published = {FAMILIES["bert"].to_published(name): p for name, p in model.named_parameters()}
    raw = (tiny / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    starts = {published[key].data_ptr() - header[key]["data_offsets"][0] for key in published}
    assert len(starts) == 1
    address = published["pooler.dense.bias"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            assert line.endswith(str(tiny / "model.safetensors"))
            return
    pytest.fail("the parameters are nowhere in the process's memory map")


def test_training_never_touches_the_file(copy: Path) -> None:
    before = (copy / "model.safetensors").read_bytes()
    model = BertModel.from_pretrained(copy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (copy / "model.safetensors").read_bytes() == before
    os.link(copy / "model.safetensors", copy / "old")
    model.save_pretrained(copy)  # over the very file that is mapped
    assert (copy / "old").read_bytes() == before  # it was replaced, not written into
    assert_same_weights(BertModel.from_pretrained(copy), model)


# --- writing -------------------------------------------------------------------------------------


def test_saved_model_loads_in_transformers(tiny: Path, minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    for number, source in enumerate((tiny, minilm)):
        directory = tmp_path / str(number)
        BertModel.from_pretrained(source).save_pretrained(directory)
        reference, info = AutoModel.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        saved = BertModel.from_pretrained(directory)
        assert not any(module.training for module in saved.modules())
        ids = torch.randint(97, (3, 13), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, theirs = saved(ids), reference.eval()(ids)
        assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
        assert torch.equal(ours.pooler_output, theirs.pooler_output)
        assert_same_weights(saved, BertModel.from_pretrained(source))
        assert saved.config == BertModel.from_pretrained(source).config


def test_saved_bits_equal_the_published_ones(minilm: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(minilm).save_pretrained(tmp_path)
    published, saved = weights_of(minilm), weights_of(tmp_path)
    published.pop("embeddings.position_ids")
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[key], saved[key]) for key in saved)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_full_disk_leaves_nothing_and_changes_nothing(copy: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for target in (copy, tmp_path / "fresh"):
        with (
            no_file_beyond(50_000),
            pytest.raises(CheckpointError, match=r"cannot be written: .*File too large"),
        ):
            model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def refuse_replacing(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], bool], error: BaseException, *, late: bool = False
) -> None:
    """Of the moves that follow, counted from 0; `late`: when it has been done."""
    replace, counted = Path.replace, itertools.count()

    def failing(self: Path, target: Path) -> Path:
        fails = refused(next(counted))
        if fails and not late:
            raise error
        replace(self, target)
        if fails:
            raise error
        return target

    monkeypatch.setattr(Path, "replace", failing)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EXDEV, "Invalid cross-device link")])
@pytest.mark.parametrize("move", range(5))
def test_what_cannot_be_replaced_comes_back(
    copy: Path, monkeypatch: pytest.MonkeyPatch, move: int, error: BaseException, late: bool
) -> None:
    """Two old files go, then three new ones come."""
    model = BertModel.from_pretrained(copy)
    before = contents(copy)
    with torch.no_grad():
        model.embeddings.word.weight.add_(1)
    with monkeypatch.context() as patch:
        refuse_replacing(patch, lambda number: number == move, error, late=late)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            model.save_pretrained(copy, {"1_Pooling/config.json": b"{}"})
    assert contents(copy) == before
    assert not list(copy.glob(".*"))
    model.save_pretrained(copy, {"1_Pooling/config.json": b"{}"})
    assert_same_weights(BertModel.from_pretrained(copy), model)


@pytest.mark.parametrize("move", range(1, 5))
def test_old_files_that_could_not_come_back_are_kept(
    copy: Path, monkeypatch: pytest.MonkeyPatch, move: int
) -> None:
    """And a mixture of old and new ones is not loaded."""
    model = BertModel.from_pretrained(copy)
    before = contents(copy)
    with monkeypatch.context() as patch:
        refuse_replacing(patch, lambda number: number >= move, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(CheckpointError, match=r"what was there before lies in .*\.saving-\w+\.old$"):
            model.save_pretrained(copy, {"more.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        BertModel.from_pretrained(copy)
    (aside,) = copy.glob(".saving-*.old")
    assert before.items() <= {**contents(copy), **contents(aside)}.items()
    model.save_pretrained(copy)
    assert_same_weights(BertModel.from_pretrained(copy), model)


def test_config_json_goes_first_and_comes_last(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody, whenever this process is killed, loads some old and some new files."""
    moved, replace = [], Path.replace

    def noting(self: Path, target: Path) -> Path:
        moved.append((self.name, self.parent == copy))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    BertModel.from_pretrained(copy).save_pretrained(copy, {"a.json": b"{}"})
    gone, come = ([name for name, goes in moved if goes is going] for going in (True, False))
    assert moved[: len(gone)] == [(name, True) for name in gone]
    assert (gone[0], come[-1]) == ("config.json", "config.json")
    assert sorted(gone) == ["config.json", "model.safetensors"]
    assert sorted(come) == ["a.json", "config.json", "model.safetensors"]
    moved.clear()
    write_directory(copy, {"a.json": b"{}"})  # alone it is replaced at once
    assert moved == [("a.json", False)]


def test_a_file_in_the_place_of_a_folder_changes_nothing(copy: Path) -> None:
    (copy / "1_Pooling").write_text("mine")
    before = contents(copy)
    with pytest.raises(CheckpointError, match=r"cannot be written: .*File exists"):
        BertModel.from_pretrained(copy).save_pretrained(copy, {"1_Pooling/config.json": b"{}"})
    assert contents(copy) == before


def test_two_that_save_into_one_directory_take_turns(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [BertModel.from_pretrained(copy) for _ in range(2)]
    nn.init.ones_(models[1].embeddings.word.weight)
    replace = Path.replace

    def slow(self: Path, target: Path) -> Path:
        time.sleep(0.002)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", slow)
    for i in range(5):
        directory = tmp_path / f"new {i}" if i % 2 else copy
        with ThreadPoolExecutor(2) as pool:
            saved = [
                pool.submit(models[k].save_pretrained, directory, {"which.txt": str(k).encode()})
                for k in (0, 1)
            ]
        assert [each.result() for each in saved] == [None, None]
        last = int((directory / "which.txt").read_text())
        assert_same_weights(BertModel.from_pretrained(directory), models[last])


def test_a_directory_that_another_process_makes_meanwhile(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rename = BertModel.from_pretrained(copy), Path.rename

    def too_late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        shutil.copytree(tmp_path / "model", target)
        return rename(self, target)

    with torch.no_grad():
        model.embeddings.word.weight.add_(1)
    monkeypatch.setattr(Path, "rename", too_late)
    model.save_pretrained(tmp_path / "new")
    assert_same_weights(BertModel.from_pretrained(tmp_path / "new"), model)
    (copy / "heads.json").write_text("{}")
    monkeypatch.setattr(Path, "rename", too_late)
    with pytest.raises(CheckpointError, match="holds heads of another encoder: give another directory"):
        model.save_pretrained(tmp_path / "newer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new", "newer"]


def test_an_error_of_a_rename_that_was_done(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a network, whose answer may get lost."""
    model, rename = BertModel.from_pretrained(copy), Path.rename

    def unanswered(self: Path, target: Path) -> Path:
        rename(self, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", unanswered)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No such file"):
            model.save_pretrained(tmp_path / "new")
    assert_same_weights(BertModel.from_pretrained(tmp_path / "new"), model)


def test_saving_into_odd_places(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BertModel.from_pretrained(tiny)
    (tmp_path / "here" / "below").mkdir(parents=True)
    (tmp_path / "here" / "below" / "config.json").write_text("mine")
    monkeypatch.chdir(tmp_path / "here" / "below")
    model.save_pretrained("..")
    assert Path("config.json").read_text() == "mine"
    assert_same_weights(BertModel.from_pretrained(tmp_path / "here"), model)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    model.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == [
        "below",
        "config.json",
        "model.safetensors",
    ]


def test_nothing_is_replaced_if_one_target_cannot_be(copy: Path) -> None:
    model = BertModel.from_pretrained(copy)
    before = (copy / "model.safetensors").read_bytes()
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    with torch.no_grad():
        model.embeddings.word.weight.add_(1)
    with pytest.raises(CheckpointError, match=r"cannot be written: its config.json is a directory"):
        model.save_pretrained(copy)
    assert (copy / "model.safetensors").read_bytes() == before


def test_a_file_in_the_place_of_a_folder_that_is_to_be_empty_is_left(copy: Path) -> None:
    (copy / "1_Pooling").write_text("mine")
    BertModel.from_pretrained(copy).save_pretrained(copy, {"1_Pooling/config.json": None})
    assert BertModel.from_pretrained(copy)
    assert (copy / "1_Pooling").read_text() == "mine"


def test_a_file_that_is_neither_bytes_nor_tensors(copy: Path) -> None:
    before = sorted(copy.rglob("*"))
    for content, kind in (("text", "str"), ({"a": [1.0]}, "dict")):
        with pytest.raises(TypeError, match=rf"notes.txt is a {kind}, it must be bytes, or tensors by name"):
            BertModel.from_pretrained(copy).save_pretrained(copy, {"notes.txt": content})  # type: ignore[dict-item]
    assert sorted(copy.rglob("*")) == before


def misfits() -> list[Callable[[Any], None]]:
    def larger_vocabulary(model: Any) -> None:
        model.embeddings.word = nn.Embedding(98, 36)

    def other_inner_size(model: Any) -> None:
        model.layers[0].feed_forward.up, model.layers[0].feed_forward.down = nn.Linear(36, 9), nn.Linear(9, 36)

    def no_bias(model: Any) -> None:
        model.layers[1].attention.value = nn.Linear(36, 36, bias=False)

    def no_norm(model: Any) -> None:
        model.layers[1].attention_norm = nn.Identity()

    def no_types(model: Any) -> None:
        model.embeddings.token_type = None

    def more_than_configured(model: Any) -> None:
        model.config = replace(model.config, type_vocab_size=0)

    def another_parameter(model: Any) -> None:
        model.embeddings.word.bias = nn.Parameter(torch.zeros(36))

    return [
        *(larger_vocabulary, other_inner_size, no_bias, no_norm, no_types),
        *(more_than_configured, another_parameter),
    ]


@pytest.mark.parametrize(
    ("part", "setting", "value", "field"),
    [
        ("layers.1.feed_forward", "activation", F.relu, {"hidden_act": "relu"}),
        ("layers.1.feed_forward", "activation", nn.ReLU(), {"hidden_act": "relu"}),
        ("embeddings.norm", "eps", 1e-3, {"layer_norm_eps": 1e-3}),
        ("layers.0.attention", "head_size", 9, {"num_attention_heads": 4}),
    ],
)
def test_what_only_the_config_can_say(
    copy: Path, part: str, setting: str, value: Any, field: dict[str, Any]
) -> None:
    model = BertModel.from_pretrained(copy)
    for name in (part, part.replace("1", "0"), *(["layers.1.attention"] if setting == "head_size" else [])):
        submodule = model.get_submodule(name)
        delattr(submodule, setting)
        setattr(submodule, setting, value)
    if setting == "eps":
        for name in ("attention_norm", "feed_forward_norm"):
            for layer in model.layers:
                layer.get_submodule(name).eps = value
    with pytest.raises(ValueError, match=rf"\.{setting} is not what the config says, and only that is saved"):
        model.save_pretrained(copy)
    model.config = replace(model.config, **field)
    model.save_pretrained(copy)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(BertModel.from_pretrained(copy)(ids).last_hidden_state, model(ids).last_hidden_state)


class Halving(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, 2).prod(-1)  # not of an odd number


@pytest.mark.parametrize(
    ("hidden_act", "activation", "saved"),
    [
        ("silu", nn.SiLU(inplace=True), True),
        ("gelu", nn.GELU(), True),
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), True),
        ("gelu_new", nn.GELU("tanh"), True),
        ("gelu", nn.GELU("tanh"), False),
        ("relu", nn.ReLU6(), False),
        ("gelu", Halving(), False),
    ],
)
def test_what_computes_the_same_is_saved(
    copy: Path, hidden_act: str, activation: Callable[[Tensor], Tensor], saved: bool
) -> None:
    model = BertModel.from_pretrained(set_config(copy, hidden_act=hidden_act))
    feed_forward: Any = model.get_submodule("layers.1.feed_forward")
    del feed_forward.activation
    feed_forward.activation = activation
    if saved:
        model.save_pretrained(copy)
    else:
        with pytest.raises(ValueError, match=r"layers.1.feed_forward.activation is not what the config says"):
            model.save_pretrained(copy)


@pytest.mark.parametrize("change", misfits(), ids=lambda change: change.__name__)
def test_what_could_not_be_loaded_is_not_saved(copy: Path, change: Callable[[Any], None]) -> None:
    model = BertModel.from_pretrained(copy)
    before = (copy / "model.safetensors").read_bytes()
    change(model)
    with pytest.raises(ValueError, match=r"the model is not what its config says \(.* is .*, by the config "):
        model.save_pretrained(copy)
    assert (copy / "model.safetensors").read_bytes() == before
    if change.__name__ == "larger_vocabulary":
        model.config = replace(model.config, vocab_size=98)
        model.save_pretrained(copy)
        assert_same_weights(BertModel.from_pretrained(copy), model)


def test_a_distilbert_has_no_pooler(tmp_path: Path) -> None:
    config = BertConfig(
        model_type="distilbert",
        type_vocab_size=0,
        hidden_size=36,
        num_attention_heads=3,
        num_hidden_layers=1,
        intermediate_size=7,
    )
    model = BertModel(config)
    assert model.pooler is None
    model.save_pretrained(tmp_path)
    assert_same_weights(BertModel.from_pretrained(tmp_path), model)


def test_tied_layers_are_written_twice(tiny: Path, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(tiny)
    model.layers[1] = model.layers[0]
    model.save_pretrained(tmp_path / "tied")
    assert_same_weights(BertModel.from_pretrained(tmp_path / "tied"), model)


def test_save_over_a_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="taken is a file: give a directory to save into"):
        BertModel.from_pretrained(tiny).save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_saved_files_have_ordinary_permissions(tiny: Path, tmp_path: Path) -> None:
    BertModel.from_pretrained(tiny).save_pretrained(tmp_path / "saved")
    (tmp_path / "ordinary").touch()
    expected = (tmp_path / "ordinary").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "saved").iterdir()} == {expected}


# --- what can be wrong ---------------------------------------------------------------------------


def error_of(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        BertModel.from_pretrained(directory)
    return str(caught.value)


@pytest.mark.parametrize("directory", ["", None, 3])
def test_no_directory_to_save_into(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # where Path("") would be
    with pytest.raises(
        ValueError, match=f"directory is {directory!r}, it must be the path of one to save into"
    ):
        BertModel.from_pretrained(tiny).save_pretrained(directory)
    with pytest.raises(ValueError, match="directory is "):  # before anything is read
        convert(tmp_path / "nowhere", directory)


def test_everything_wrong_is_in_one_error(copy: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["embeddings.word_embeddings.weight"]
        del tensors["encoder.layer.1.attention.self.key.bias"]
        tensors["encoder.layer.0.output.dense.weight"] = torch.zeros(36, 38)
        tensors["embeddings.LayerNorm.bias"] = torch.zeros(36, dtype=torch.int32)
        tensors["embeddings.LayerNorm.weight"] = torch.zeros(36, dtype=torch.float8_e4m3fn)
        tensors["decoder.gate.weight"] = torch.zeros(3)
        tensors["bert.pooler.dense.bias"] = tensors["pooler.dense.bias"].clone()
        return tensors

    message = error_of(rewrite(copy, spoil))
    assert "\n" not in message
    for part in (
        str(copy),
        "missing embeddings.word_embeddings.weight, encoder.layer.1.attention.self.key.bias",
        "encoder.layer.0.output.dense.weight is (36, 38) and not (36, 37)",
        "stored in another dtype than torch.float32, torch.bfloat16, torch.float16, torch.float64: ",
        "embeddings.LayerNorm.bias as torch.int32, embeddings.LayerNorm.weight as torch.float8_e4m3fn",
        "unknown decoder.gate.weight",
        "doubled ",
        "pooler.dense.bias (also as ",
    ):
        assert part in message


def test_missing_layers_are_collapsed(copy: Path) -> None:
    message = error_of(set_config(copy, num_hidden_layers=5))
    assert "missing encoder.layer.2-4.* (16 tensors each)" in message
    message = error_of(set_config(copy, num_hidden_layers=1))
    assert "unexpected encoder.layer.1.* (16 tensors each)" in message


def test_collapse_layers() -> None:
    keys = [f"encoder.layer.{i}.output.dense.bias" for i in (0, 1, 2, 5, 11)]
    assert collapse_layers(["pooler.dense.bias", *keys]) == [
        "pooler.dense.bias",
        "encoder.layer.0-2,5,11.output.dense.bias",
    ]
    assert collapse_layers(f"x.layer.{i}.y" for i in (0, 1, 10, 11, 2)) == [
        "x.layer.0-2,10-11.y"
    ]  # as in files
    sentences = (f"x.layer.{i}.y is (1,) and not (2,)" for i in range(3))
    assert collapse_layers(sentences) == ["x.layer.0-2.y is (1,) and not (2,)"]
    assert collapse_layers(["x.layer.².y"]) == ["x.layer.².y"]  # a digit to Python, and no number


def test_half_a_pooler_is_missing_the_other_half(copy: Path) -> None:
    message = error_of(rewrite(copy, lambda t: {k: v for k, v in t.items() if k != "pooler.dense.bias"}))
    assert message == f"{copy}: the weights do not fit: missing pooler.dense.bias"


def test_a_foreign_checkpoint_is_a_short_error(copy: Path) -> None:
    foreign = {f"model.block_{i}.w": torch.ones(1) for i in range(500)}
    message = error_of(rewrite(copy, lambda _: foreign))
    assert "and 488 more" in message
    assert len(message) < 3000


def test_mixed_dtypes_need_a_choice(copy: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"pooler.dense.bias": tensors["pooler.dense.bias"].half()}

    assert (
        "several dtypes, choose one, such as dtype=torch.float32: 38 as torch.float32, 1 as torch.float16"
        in error_of(rewrite(copy, mix))
    )
    model = BertModel.from_pretrained(copy, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 4\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page saved under this name"),
        (b"\n<html>", "is a web page saved under this name"),
        (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle under this name"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00not json, really", "hold no valid header"),
        (b"\xff" * 100, "hold no valid header"),
        (b"abc", "hold no valid header"),
        ((100_000).to_bytes(8, "little") + b"[" * 100_000, "hold no valid header"),
        (
            b'\x3f\0\0\0\0\0\0\0{"a": {"data_offsets": [0, 4]}, "b": {"data_offsets": [0, ""]}}',
            "hold no valid header",
        ),
    ],
)
def test_not_safetensors(copy: Path, content: bytes, message: str) -> None:
    (copy / "model.safetensors").write_bytes(content)
    error = error_of(copy)
    assert error.startswith(str(copy / "model.safetensors"))
    assert message in error
    assert "fetch it again" in error


@pytest.mark.parametrize("kept", [0.999, 0.01])
def test_truncated_file(copy: Path, kept: float) -> None:
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    message = error_of(copy)
    if kept > 0.1:
        assert f"is truncated, it holds {int(len(whole) * kept)} of the {len(whole)} bytes" in message
    else:
        assert "hold no valid header" in message


def test_a_whole_file_is_not_called_truncated(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"X32"', 1))
    assert "is a damaged safetensors file" in error_of(copy)


def test_bin_only(copy: Path, tmp_path: Path) -> None:
    tensors = {f"bert.{key}": t.clone() for key, t in weights_of(copy).items()}
    tensors["cls.predictions.bias"] = torch.zeros(97)
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    message = error_of(copy)
    assert "holds its weights only as pytorch_model.bin" in message
    assert f"python -m minibert convert {copy} NEW_DIRECTORY" in message
    (tmp_path / "converted").mkdir()
    for name in ("vocab.txt", "tokenizer.json", "mine.txt"):  # of a model that was here before
        (tmp_path / "converted" / name).touch()
    (copy / "vocab.txt").write_text("[PAD]\n")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    convert(copy, tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text()) == config
    assert (tmp_path / "converted" / "vocab.txt").read_text() == "[PAD]\n"
    assert not (tmp_path / "converted" / "tokenizer.json").exists()
    assert (tmp_path / "converted" / "mine.txt").exists()
    model = BertModel.from_pretrained(tmp_path / "converted")
    assert torch.equal(model.embeddings.word.weight, tensors["bert.embeddings.word_embeddings.weight"])
    assert weights_of(tmp_path / "converted").keys() == tensors.keys() - {"cls.predictions.bias"}


def test_convert_leaves_heads_on_their_encoder(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights_of(copy), copy / "pytorch_model.bin")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "heads.json").write_text("{}")
    monkeypatch.setattr(safetensors_files, "_write", None)  # that is said before the work
    with pytest.raises(CheckpointError, match="holds heads of another encoder: give another directory"):
        convert(copy, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["heads.json"]


def test_convert_refuses_what_is_not_tensors(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no pytorch_model.bin to convert"):
        convert(copy, tmp_path / "out")
    for damaged, message in {
        b"nonsense": r"cannot be read as tensors \(UnpicklingError\): it is cut off \(fetch it again\), or holds",
        b"": "is empty",
        b"<html>": "is a web page",
        b"version https://git-lfs.github.com/spec/v1": "is a Git LFS pointer of a few bytes",
        b"\x80\x02}q\x00.": "cannot be read as tensors",
        b"PK\x03\x04" + bytes(50): "cannot be read as tensors",
    }.items():
        (copy / "pytorch_model.bin").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            convert(copy, tmp_path / "out")
    one = torch.ones(1)
    for kept, message in [
        ({5: one}, "holds more than named tensors: 5 names a Tensor"),
        ({"pooler.dense.bias": one, "epoch": 3}, "holds more than named tensors: 'epoch' names a int"),
        ({"pooler.dense.bias": one.to_sparse()}, "than named tensors: 'pooler.dense.bias' names a Tensor"),
        ({"model": {"a": one}}, "holds more than named tensors: 'model' names a dict"),
        ([1, 2], "holds a list, not named tensors"),
        ({"module.bert.pooler.dense.bias": one}, "do not fit: unknown module.bert.pooler.dense.bias"),
    ]:
        torch.save(kept, copy / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            convert(copy, tmp_path / "out")
    torch.save({"a": Path("x")}, copy / "pytorch_model.bin")  # would run code when unpickled
    with pytest.raises(CheckpointError, match="cannot be read as tensors"):
        convert(copy, tmp_path / "out")
    torch.save({"a": torch.ones(1)}, copy / "pytorch_model.bin")
    (copy / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(CheckpointError, match="roberta"):
        convert(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_weights_no_config(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in error_of(copy)
    (copy / "tf_model.h5").touch()
    assert "holds only tf_model.h5" in error_of(copy)
    (copy / "config.json").unlink()
    assert error_of(copy) == f"{copy} has no config.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "holds a JSON list, not a dict"),
        ('{"model_type": "roberta"}', "says model_type 'roberta': only 'bert' and 'distilbert' are supported"),
        ('{"model_type": 3}', "says model_type 3"),
        (
            '{"hidden_size": 7.5, "vocab_size": null}',
            "vocab_size is None, it must be an integer from 1 up; hidden_size is 7.5",
        ),
        ('{"hidden_act": "mish"}', "config.json: hidden_act 'mish' is not supported"),
        ('{"position_embedding_type": "relative_key"}', "config.json: position_embedding_type 'relative_key'"),
    ],
)
def test_bad_config_file(copy: Path, content: str, message: str) -> None:
    (copy / "config.json").write_text(content)
    assert message in error_of(copy)
    assert str(copy / "config.json") in error_of(copy)


def test_unreadable_config(copy: Path) -> None:
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    assert error_of(copy) == f"{copy / 'config.json'} cannot be read: Is a directory"


def test_config_without_model_type_is_a_bert(copy: Path) -> None:
    fields = json.loads((copy / "config.json").read_text())
    del fields["model_type"]
    (copy / "config.json").write_text(json.dumps(fields), encoding="utf-8-sig")  # as Windows' editors write it
    assert BertModel.from_pretrained(copy).config.model_type == "bert"


def shard(directory: Path, weight_map: object) -> Path:
    save_file(weights_of(directory), directory / "a.safetensors")
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"pooler.dense.bias": "b.safetensors"}, "lists shards that are not there: b.safetensors"),
        ({"pooler.dense.bias": "../a.safetensors"}, "lists shards that are not there: ../a.safetensors"),
        ({"pooler.dense.bias": "config.json"}, "config.json is not a whole safetensors file"),
        ({"x": "a.safetensors"}, "lists 1 tensors that no shard holds, the first is x"),
    ],
)
def test_bad_index(copy: Path, weight_map: object, message: str) -> None:
    save_file({"pooler.dense.bias": torch.zeros(36)}, copy.parent / "a.safetensors")  # which is not its own
    assert message in error_of(shard(copy, weight_map))


def test_a_shard_by_its_whole_path_is_none(copy: Path) -> None:
    place = str(copy.parent / "a.safetensors")
    save_file({"pooler.dense.bias": torch.zeros(36)}, place)
    assert f"lists shards that are not there: {place}" in error_of(shard(copy, {"pooler.dense.bias": place}))


def test_one_file_counts_more_than_shards(copy: Path, tiny: Path) -> None:
    """As for transformers; an index may be left from an earlier model of that directory."""
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a.safetensors"}}')
    assert_same_weights(BertModel.from_pretrained(copy), BertModel.from_pretrained(tiny))


def test_the_index_says_which_shard_counts(copy: Path) -> None:
    whole = weights_of(copy)
    shard(copy, dict.fromkeys(whole, "a.safetensors") | {"pooler.dense.bias": "b.safetensors"})
    save_file(
        {"pooler.dense.bias": torch.full((36,), 5.0), "pooler.dense.weight": torch.zeros(36, 36)},
        copy / "b.safetensors",
    )
    tensors = load_checkpoint(copy).tensors
    assert torch.equal(tensors["pooler.dense.bias"], torch.full((36,), 5.0))
    assert torch.equal(tensors["pooler.dense.weight"], whole["pooler.dense.weight"])


@pytest.mark.skipif(not os.access("/proc/self/pagemap", os.R_OK), reason="what lies in memory is not told here")
def test_released_weights_take_no_memory_and_are_still_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(2_000_000.0)}, file)
    weight = read_file(file)["weight"]

    def resident() -> int:
        """Kilobytes of the file in this process's memory."""
        parts = Path("/proc/self/smaps").read_text().split(str(file))[1:]
        return sum(int(part.split("Rss:")[1].split()[0]) for part in parts)

    total = weight.double().sum()
    before = resident()
    assert before > 7_000
    release_memory([weight])
    assert resident() < before / 10
    assert weight.double().sum() == total
    weight[1_000_000] = -1
    release_memory([weight])
    assert weight[1_000_000] == -1
    monkeypatch.setattr("minibert.memory.PAGEMAP", Path(os.devnull))  # a system that keeps it to itself
    release_memory([weight])
    assert weight[1_000_000] == -1
