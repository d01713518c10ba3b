"""3 of 4: one encoder layer, and the pooler."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.attention import AttentionFunction, SelfAttention
from minibert.config import BertConfig
from minibert.inputs import checked_pair

# A process's first call of MKL's tanh, made here by one thread: by several at once, one may err by 5e-5.
torch.tanh(torch.zeros(64, dtype=torch.float32, device="cpu"))


def gelu_new(x: Tensor) -> Tensor:
    """The tanh approximation of GELU as Google's code wrote it (Hendrycks & Gimpel 2016, section 2)."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


# By config.hidden_act. (To change a model's, set `feed_forward.activation` of its layers: `encode` sees that.)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # exact, with erf
    "relu": F.relu,
    "gelu_new": gelu_new,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """Two Linears with an activation between, on each token (Vaswani et al. 2017, equation 2, with ReLU)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATIONS[config.hidden_act]
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.dropout(self.down(self.activation(self.up(hidden))))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Attention, then feed-forward; after each, the sum with its input is normalised: "post-norm" (Vaswani et
    al. 2017, section 3.1).
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, attend: AttentionFunction
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) -> (B, T, H), and the attention weights if `attend` forms them."""
        attended, weights = checked_pair("an attention", self.attention(hidden, mask, attend))
        hidden = self.attention_norm(attended + hidden)
        hidden = self.feed_forward_norm(self.feed_forward(hidden) + hidden)
        return hidden, weights


class Pooler(nn.Module):
    """tanh of a Linear on the first token, [CLS], as in the code of Devlin et al. 2018 (not in the paper).

    Trained to tell whether two sentences follow each other; sentence embeddings do without it.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, H)."""
        return torch.tanh(self.dense(hidden[:, 0]))
