"""Byte-level BPE, trained with the Hugging Face `tokenizers` library."""

from collections.abc import Iterator
from types import ModuleType

from experiments.data.text import SEPARATOR, character_boundary

MIN_VOCAB = 257  # every byte and the end of text
MAX_VOCAB = 2**20
END_OF_TEXT = "<|endoftext|>"
_PIECE_BYTES = 2**18


def train_bpe(train: bytes, vocab_size: int) -> str:
    """Trains byte-level BPE without normalisation; equal arguments give equal results.

    Args:
        train: UTF-8 documents, each ended by a zero byte.
        vocab_size: 256 bytes, one end of text, and merges; fewer where the text runs out of pairs.

    Returns:
        The tokenizer in the Hugging Face JSON form.

    References:
        Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, §3.2.
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, §2.2.
    """
    library = huggingface(f"--tokenizer=bpe:{vocab_size}")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (text for text, _ in pieces(train))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def huggingface(flag: str) -> ModuleType:
    """The `tokenizers` library, imported only when a run asks for it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"{flag} needs the tokenizers package, run `pip install tokenizers`.") from error
    return tokenizers


def pieces(stream: bytes) -> Iterator[tuple[str, bool]]:
    """Cuts documents at line ends into texts of at most 256 KiB, so that memory stays bounded.

    The text is unchanged; only tokens that would cross a cut are not formed.

    Args:
        stream: UTF-8 documents, each ended by a zero byte.

    Yields:
        The text of each piece, and whether its document ends with it.
    """
    start = 0
    while start < len(stream):
        stop = stream.index(SEPARATOR, start)
        end = min(stop, start + _PIECE_BYTES)
        if end < stop:
            newline = stream.rfind(b"\n", start, end)
            end = newline + 1 if newline >= start else character_boundary(stream, end)
        yield stream[start:end].decode("utf-8"), end == stop
        start = end + 1 if end == stop else end
