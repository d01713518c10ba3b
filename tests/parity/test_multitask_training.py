"""train.py's losses and final weights equal the same loop written with transformers, bit for bit."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import train
from benchmarks.transformers_loop import TransformersMultiTask, train_with_transformers
from heads import MultiTaskModel
from heads.data import SentenceDataset, epoch_batches
from heads.tables import read_examples
from minibert import Tokenizer
from tests.training.conftest import a_new_head_may_be_frozen, steps
from weights.key_maps import FAMILIES

pytestmark = a_new_head_may_be_frozen

TASKS = {"type": "type", "sentiment": "sentiment"}
LABELS = {"type": ("0", "1", "2"), "sentiment": ("0", "1", "2", "3")}
STRATEGIES = [
    "none",
    "backbone",
    "head:sentiment",
    "layers:0",
    "layers:1",
    "layers:3",
    "gradual",
    "gradual:2,head:type",
    "layers:1,head:type",
    "only:layers.1-2,heads",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """61 sentences of 1 to 16 words; some labels missing, in one task more than in the other."""
    generator = torch.Generator().manual_seed(3)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    words = "a red fox sees seven rivers and the old table under green letters, doesn't it?".split()
    rows = ["text,type,sentiment"]
    for _ in range(61):
        text = " ".join(words[pick(len(words))] for _ in range(1 + pick(16))).replace(",", "")
        kind = "" if pick(5) == 0 else str(pick(3))
        rows.append(f"{text},{kind},{'' if pick(4) else pick(4)}")
    path = tmp_path_factory.mktemp("data") / "table.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.mark.filterwarnings("ignore:.* sentences are among those for training")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy(small: Path, table: Path, tmp_path: Path, strategy: str) -> None:
    run = tmp_path / "run"
    command = f"--model {small} --train {table} --validation {table} --freeze {strategy}"
    command += " --task type=type --task sentiment=sentiment --epochs 5 --batch-size 7 --seed 5"
    command += f" --lr 1e-3 --head-lr 3e-3 --weight-decay 0.1 --feature-cache-mb 0 --device cpu --output {run}"
    assert train.main(command.split()) == 0
    losses = [record["losses"] for record in steps(run)]

    dataset = SentenceDataset(read_examples(table, "text", TASKS), Tokenizer.from_pretrained(small), LABELS)
    model = TransformersMultiTask(small, [3, 4], seed=5)
    reference = train_with_transformers(
        model,
        AutoTokenizer.from_pretrained(small),
        [example.text for example in read_examples(table, "text", TASKS)],
        dataset.labels,
        [epoch_batches(dataset, epoch, seed=5, batch_size=7) for epoch in range(5)],
        spec=strategy,
        lr=1e-3,
        head_lr=3e-3,
        weight_decay=0.1,
    )
    expected = list(reference)
    assert len(losses) == 45
    assert losses == expected
    assert any(0.0 in step.values() for step in losses)  # a batch with no label for a task
    published = dict(model.encoder.named_parameters())
    last = MultiTaskModel.from_pretrained(run / "last")
    for name, parameter in last.encoder.named_parameters():
        assert torch.equal(parameter, published[FAMILIES["bert"].to_published(name)]), name
    for head, classifier in zip(last.heads.values(), model.classifiers, strict=True):
        for parameter, theirs in zip(head.parameters(), classifier.parameters(), strict=True):
            assert torch.equal(parameter, theirs)
