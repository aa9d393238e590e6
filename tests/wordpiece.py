"""A small tokenizer.json as that of BERT."""

from pathlib import Path

import tokenizers

from experiments.encoding import Subwords

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "##hello", "wor", "##ld", "##s", "u", "s", ".", "'"]
VOCABULARY += ["don", "t", "a", "##a", "b", "##b", "東", "京"]


def made(path: Path) -> tuple[Subwords, tokenizers.Tokenizer]:
    """Writes it, with the truncation and padding that published ones have; the library's own is without these."""
    library = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    library.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    library.decoder = tokenizers.decoders.WordPiece()
    library.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    library.enable_truncation(7)
    library.enable_padding(length=12)
    library.save(str(path))
    library.no_truncation()
    library.no_padding()
    return Subwords.load(str(path)), library
