"""minibert: the encoder, pooling, tokenizing and encoding.

Read the encoder in this order: embeddings.py, attention.py, layers.py, model.py.

Axes, everywhere:

    B  batch: sentences side by side
    T  tokens of the longest sentence in the batch
    H  hidden_size: numbers per token
    N  num_attention_heads
    D  head size, H / N
"""

from minibert.config import BertConfig
from minibert.model import BertModel, BertModelOutput
from minibert.pooling import cls_pooling, mean_pooling
from minibert.sentence_encoder import SentenceEncoder
from minibert.tokenizer import Tokenizer

__all__ = [
    "BertConfig",
    "BertModel",
    "BertModelOutput",
    "SentenceEncoder",
    "Tokenizer",
    "cls_pooling",
    "mean_pooling",
]
