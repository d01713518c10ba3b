"""1 of 4: token ids become vectors.

The axes of every tensor in this project:

    B  batch: texts side by side
    T  tokens of the longest text in the batch
    H  hidden_size: numbers per token
    N  num_attention_heads
    D  head size, H / N

Other axes are spelt out: tokens (of all texts, one after the other), texts, classes.

A text arrives as `[CLS] its tokens [SEP]`, a pair as `[CLS] first [SEP] second [SEP]`, filled up with
`[PAD]`. L, where it is used, is the number of layers.
"""

import torch
from torch import Tensor, nn

from minibert.config import BertConfig


class Embeddings(nn.Module):
    """Word + token type + position vectors, normalised (Devlin et al. 2018, figure 2, and their code).

    All three are learned tables. Token type is 0 in the first text of a pair, 1 in the second; DistilBERT
    has none.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # padding_idx: this row gets no gradient
        self.word = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        )
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids -> (B, T, H). Types are 0 and positions 0, 1, 2, ... unless given.

        (Positions are given where texts lie one after the other, (tokens,) -> (tokens, H): packing.py.)
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)  # (T,)
        hidden = self.word(input_ids)  # (B, T, H)
        # Token type before position: the other order rounds differently from the published model.
        if self.token_type is not None:
            types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            hidden = hidden + self.token_type(types)  # (B, T, H)
        hidden = hidden + self.position(position_ids)  # (B, T, H)
        return self.dropout(self.norm(hidden))  # type: ignore[no-any-return]
