"""minibert: the encoder, pooling, tokenizing and encoding.

The encoder, to be read in this order   embeddings.py  attention.py  layers.py  model.py
what it is built from and refuses       config.py  inputs.py  meta_device.py
text -> token ids                       tokenizer.py  tokenizer_files.py
sentences -> vectors                    sentence_encoder.py  pooling.py  modes.py  wrapped.py
    saved as by sentence-transformers   sentence_transformers_files.py
training                                freezing.py  fast_dropout.py

how that is made fast                   packing.py  fused_layers.py  fast_inference.py
    its attention, products, memory     fast_attention.py  onednn.py  amx.py  memory.py

python -m minibert                      __main__.py  encode_file.py  text_lines.py  devices.py  parity.py

The letters that name the axes of every tensor, (B, T, H) and so on, are explained in embeddings.py.
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
