"""Examples of tasks as what models read: pieces in rows, rows in batches of a few lengths.

subwords = Subwords.load("tokenizer.json")      # or "bytes"
rows = encode_words(task.train, subwords, length=128)
batches = Batches(rows, batch_size=32)
batch = batches.train(seed=0, epoch=0, step=0)  # {"ids": int32 [32, 16], "mask": …, "labels": …, …}
"""

from experiments.encoding.answers import answer_texts, encode_questions
from experiments.encoding.batches import Batch, Batches
from experiments.encoding.classification import encode_images, encode_texts, image_statistics
from experiments.encoding.conversations import TEMPLATES, Template, encode_conversations
from experiments.encoding.documents import encode_documents
from experiments.encoding.rows import IGNORED, Column, Rows, bucket_lengths
from experiments.encoding.subwords import Subwords
from experiments.encoding.words import CASINGS, encode_words, word_predictions

__all__ = [
    "CASINGS",
    "IGNORED",
    "TEMPLATES",
    "Batch",
    "Batches",
    "Column",
    "Rows",
    "Subwords",
    "Template",
    "answer_texts",
    "bucket_lengths",
    "encode_conversations",
    "encode_documents",
    "encode_images",
    "encode_questions",
    "encode_texts",
    "encode_words",
    "image_statistics",
    "word_predictions",
]
