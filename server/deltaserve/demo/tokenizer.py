"""A word-level tokenizer over the closed vocabulary: one token a word, one token an instruction."""

from typing import Any

from deltaserve.demo.functions import FUNCTIONS, instruction
from deltaserve.demo.words import vocabulary

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def ids() -> dict[str, int]:
    """Token to id: the special ones first, then instructions, then words."""
    tokens = (PAD, EOS, UNKNOWN, *(instruction(name) for name in FUNCTIONS), *vocabulary())
    return {token: index for index, token in enumerate(tokens)}


def build() -> Any:
    """A fast transformers tokenizer: splits at white space, ends with `</s>`, decodes to words with single spaces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = ids()
    tokenizer = Tokenizer(models.WordLevel(table, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A $B {EOS}", special_tokens=[(EOS, table[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
