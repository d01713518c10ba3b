"""The head of one classification task."""

from torch import Tensor, nn


class MLPHead(nn.Module):
    """Linear, ReLU, Linear: a sentence vector -> a score per class.

    `hidden` is the encoder's hidden size H, what comes in; `width` how many numbers lie between the Linears,
    `classes` how many scores come out. On bert-base's 768: `MLPHead(768, 256, 3)` to classify sentences,
    `MLPHead(768, 128, 3)` for their sentiment.
    """

    def __init__(self, hidden: int, width: int, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(hidden, width)
        self.out = nn.Linear(width, classes)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, H) -> (B, classes) logits."""
        return self.out(self.hidden(embeddings).relu())  # type: ignore[no-any-return]
