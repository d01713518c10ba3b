"""minibert: the encoder, pooling, tokenizing and encoding.

Read the encoder in this order: embeddings.py, attention.py, layers.py, model.py. The letters that
name the axes of every tensor, (B, T, H) and so on, are explained at the top of embeddings.py.
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
