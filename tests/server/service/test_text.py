"""Pieces of text: what comes out bit by bit is what comes out at once, and a stop string is found wherever it lies."""

from typing import Any

import hypothesis
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from deltaserve.engine.request import FinishReason, Tokens
from deltaserve.service.detokenizer import Detokenizer, StopStrings
from deltaserve.service.samples import Growing, Piece
from deltaserve.service.text import Cut, Encoding, Text

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NO_DEADLINE = hypothesis.settings(deadline=None)


def _bytes() -> Any:
    made = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(ALPHABET)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def _sentencepiece() -> Any:
    """As Llama's and T5's: the space before a word is part of its token, and a text's first one is not shown."""
    words = ["<unk>", "▁a", "▁b", "c", "▁", "."]
    made = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


TEXTS = {"bytes": Text(_bytes()), "sentencepiece": Text(_sentencepiece())}
SIZES = {"bytes": len(ALPHABET), "sentencepiece": 6}


@pytest.mark.parametrize("kind", list(TEXTS))
@NO_DEADLINE
@given(data=st.data())
def test_piece_by_piece_is_the_whole(kind: str, data: st.DataObject) -> None:
    text = TEXTS[kind]
    ids = data.draw(st.lists(st.integers(0, SIZES[kind] - 1), min_size=1, max_size=80))
    grown = Detokenizer(text)
    pieces = [grown.feed(token) for token in ids] + [grown.end()]
    assert "".join(pieces) == text.decode(ids)


@NO_DEADLINE
@given(st.text(max_size=20), st.text(max_size=20))
def test_characters_come_whole_behind_a_context(before: str, after: str) -> None:
    text = TEXTS["bytes"]
    context = text.encode(before, None, special=False).ids if before else ()
    grown = Detokenizer(text, context)
    pieces = [grown.feed(token) for token in (text.encode(after, None, special=False).ids if after else ())]
    pieces.append(grown.end())
    assert "".join(pieces) == after
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in after


def test_a_continuation_keeps_the_space_it_begins_with() -> None:
    text = TEXTS["sentencepiece"]
    alone, behind = Detokenizer(text), Detokenizer(text, (1,))
    assert (alone.feed(2), behind.feed(2)) == ("b", " b")


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.data())
def test_stop_strings(whole: str, strings: list[str], data: st.DataObject) -> None:
    """However the text is cut, what comes out is what is before the first stop string, and never any of one."""
    stops = StopStrings(strings)
    out, at = "", 0
    while at < len(whole) and stops.found is None:
        size = data.draw(st.integers(1, 5))
        out += stops.feed(whole[at : at + size])
        at += size
    if stops.found is None:
        out += stops.end()
    ends = [(whole[:at].find(s), -len(s), s) for s in strings if s in whole[:at]]
    if not ends:
        assert stops.found is None and out == whole
    else:
        first = min(place for place, _, _ in ends)
        assert out == whole[:first] and whole[first:].startswith(str(stops.found))


def _growing(strings: list[str], least: int = 0) -> Growing:
    return Growing(Detokenizer(TEXTS["bytes"]), StopStrings(strings), least)


def _ids(text: str) -> tuple[int, ...]:
    return TEXTS["bytes"].encode(text, None, special=False).ids


def test_tokens_after_a_stop_string_are_left_out() -> None:
    sample, piece = _growing(["cd"]), Piece()
    sample.add(Tokens("r", _ids("abcdef")), piece)
    assert (piece.text, piece.ids, piece.reason, piece.stop) == ("ab", list(_ids("abcd")), FinishReason.STOP, "cd")
    assert sample.ended and sample.count == 4


def test_what_was_held_back_comes_out_at_the_end() -> None:
    sample, piece = _growing(["cd"]), Piece()
    sample.add(Tokens("r", _ids("abc")), piece)
    assert piece.text == "ab" and not sample.ended
    last = Piece()
    sample.end(last, FinishReason.LENGTH)
    assert (last.text, last.reason, last.stop) == ("c", FinishReason.LENGTH, None)


def test_before_the_least_number_of_tokens_nothing_stops() -> None:
    sample, piece = _growing(["b"], least=4), Piece()
    sample.add(Tokens("r", _ids("abcdb")), piece)
    assert (piece.text, piece.stop) == ("abcd", "b")


def _encoding(first: int, second: int) -> Encoding:
    """[CLS] first [SEP] second [SEP]; ids tell where each token came from."""
    ids = [0, *range(100, 100 + first), 1, *range(200, 200 + second), 1]
    segments = [0] * (first + 2) + [1] * (second + 1)
    special = tuple(i < 2 for i in ids)
    return Encoding(tuple(ids), tuple(segments), special, tuple(segments))


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 25), st.sampled_from([Cut.START, Cut.END]))
def test_cutting_takes_from_the_longer_segment_and_keeps_special_tokens(
    first: int, second: int, room: int, where: Cut
) -> None:
    cut = _encoding(first, second).cut(room, where)
    assert len(cut.ids) == max(min(room, first + second + 3), 3)
    assert [i for i in cut.ids if i < 2] == [0, 1, 1]
    left = [[i for i in cut.ids if low <= i < low + 100] for low in (100, 200)]
    for ids, before, low in zip(left, (first, second), (100, 200), strict=True):
        whole = list(range(low, low + before))
        assert ids == (whole[len(whole) - len(ids) :] if where is Cut.START else whole[: len(ids)])
    lost = [first - len(left[0]), second - len(left[1])]
    assert not all(lost) or abs(len(left[0]) - len(left[1])) <= 1
    assert cut.token_type_ids == cut.segments and len(cut.segments) == len(cut.ids) == len(cut.special)


def test_without_leave_nothing_is_cut() -> None:
    whole = _encoding(5, 5)
    assert whole.cut(3, Cut.NONE) is whole
