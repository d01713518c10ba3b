"""2 of 4: every token looks at every token that the mask allows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.inputs import checked_pair, holds

# query, key, value (B, N, T, D); a boolean mask (B, 1, T, T), True where a token may look, None if everywhere;
# dropout probability, 0 in eval mode
#   -> context (B, N, T, D), attention weights (B, N, T, T) or None where they are never formed
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    dropout: Callable[[Tensor, float], Tensor] = F.dropout,  # another one in fast_dropout.py
) -> tuple[Tensor, Tensor | None]:
    """softmax(Q K^T / sqrt(D)) V, written out (Vaswani et al. 2017, equation 1)."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, N, T, T)
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min  # finite: a row with nothing to look at stays finite
        scores = scores + torch.where(mask, scores.new_zeros(()), lowest)
    weights = dropout(scores.softmax(dim=-1), dropout_p)  # (B, N, T, T)
    return weights @ value, weights


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, None]:
    """The same in one fused call, which never forms the (T, T) weights."""
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=query.shape[-1] ** -0.5
    )
    return context, None


ATTENTION_FUNCTIONS: dict[str, AttentionFunction] = {"eager": eager_attention, "sdpa": sdpa_attention}


def expand_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(B, T), 1 where there is a token -> boolean (B, 1, T, T); None where nothing is masked.

    `[b, 0, i, j]` says whether token i may look at token j; it is the same for every i.
    """
    if attention_mask is None or holds(attention_mask.all()):  # while a graph is traced nobody knows
        return None
    batch, length = attention_mask.shape
    return attention_mask.bool()[:, None, None, :].expand(batch, 1, length, length)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.weights_dropout_p = config.attention_probs_dropout_prob
        # DistilBERT has no dropout here.
        self.dropout = nn.Dropout(0.0 if config.model_type == "distilbert" else config.hidden_dropout_prob)

    def forward(
        self, hidden: Tensor, mask: Tensor | None, attend: AttentionFunction
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, H) -> (B, T, H), and the attention weights if `attend` forms them.

        `attend` comes from `BertModel.run_layers`. With "packed" (packing.py) there is no B: states are
        (tokens, H), and (N, tokens, D) below. So axes are counted from the end.
        """
        query, key, value = self.project(hidden)  # (B, N, T, D)
        dropout_p = self.weights_dropout_p if self.training else 0.0
        context, weights = checked_pair("an attention function", attend(query, key, value, mask, dropout_p))
        context = context.transpose(-3, -2).flatten(-2)  # (B, N, T, D) -> (B, T, H)
        return self.dropout(self.output(context)), weights

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, H) -> query, key and value, (B, N, T, D) each."""
        query, key, value = self.query(hidden), self.key(hidden), self.value(hidden)  # (B, T, H)
        return self.split_heads(query), self.split_heads(key), self.split_heads(value)

    def split_heads(self, hidden: Tensor) -> Tensor:
        """(B, T, H) -> (B, N, T, D)."""
        *rows, width = hidden.shape
        return hidden.view(*rows, width // self.head_size, self.head_size).transpose(-3, -2)
