"""One token a word, and text that comes back as it went in."""

from random import Random

import pytest
from transformers import AutoTokenizer, T5Config

from deltaserve.demo import language, tokenizer
from deltaserve.demo.functions import FUNCTIONS, apply, defined, instruction


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory):
    """As a server gets it: from a folder with a model's config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    T5Config(vocab_size=len(tokenizer.ids())).save_pretrained(folder)
    tokenizer.build().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_is_fast_and_has_its_special_tokens(loaded) -> None:
    assert loaded.is_fast
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert len(loaded) == len(tokenizer.ids())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_round_trip(loaded, function: str) -> None:
    random, table = Random(2), tokenizer.ids()
    for _ in range(30):
        sentence = language.draw(random)
        if not defined((function,), sentence):
            continue
        for words in ((instruction(function), *sentence.words()), apply((function,), sentence)):
            ids = loaded(" ".join(words)).input_ids
            assert ids == [*(table[word] for word in words), loaded.eos_token_id]
            assert loaded.decode(ids, skip_special_tokens=True) == " ".join(words)


def test_case_and_white_space_do_not_matter(loaded) -> None:
    assert loaded("  The  OLD\nfarmer ").input_ids == loaded("the old farmer").input_ids


def test_composed_and_decomposed_letters_are_the_same(loaded) -> None:
    assert loaded("g\u0302ardeno").input_ids == loaded("ĝardeno").input_ids


def test_an_unknown_word_is_unknown(loaded) -> None:
    assert loaded("the zebra").input_ids == [tokenizer.ids()["the"], loaded.unk_token_id, loaded.eos_token_id]
