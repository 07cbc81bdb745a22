"""The parts of a token's spelling and their rows."""

import numpy as np
import pytest

from lit_gpt.embeddings import PARTS
from lit_gpt.text.spelling import parts, spelling_rows
from lit_gpt.text.vocabularies import load_tokenizer


def of(text: str) -> set[bytes]:
    return {part for part in parts(text.encode()) if part}


def test_a_word_shares_all_but_its_shape_with_itself_in_capitals_and_after_a_space():
    for other in (" lord", "Lord", " LORD", " Lord"):
        assert len(of("lord") - of(other)) == 1
        assert len(of("lord") & of(other)) == PARTS - 1
    assert len({tuple(parts(text.encode())) for text in ("lord", " lord", "Lord", "LORD")}) == 4


def test_words_share_beginnings_and_ends_of_one_and_two_characters():
    assert len(of("walking") & of("working")) == 1 + 1 + 2  # shape; w; g, ng
    assert len(of("walking") & of("walked")) == 1 + 2
    assert len(of("天地") & of("天下")) == 1 + 1
    assert len(of("天地") & of("大地")) == 1 + 1


def test_a_character_shares_its_place_in_words_with_them():
    assert of("天") & of("天地") == of("天") - {"all 天".encode(), "ends 天".encode()}
    assert of("ab") & of("ba") == of("ab") & of("xyz")  # a beginning is no end


@pytest.mark.parametrize(
    "token", [b"", b" ", b"\n\n", b"\xe5", b"\xe5\xa4", b"\xff\xfe", "İ".encode()]
)
def test_any_bytes_have_parts(token):
    assert len(parts(token)) == PARTS


def test_the_rows_are_the_same_for_ever():
    """Checkpoints have no rows but find them again; in numbers as first released."""
    rows = spelling_rows([b"a", b" Lord", "天地".encode(), b"\xe5\xa4", b"\n"], 1000)
    assert rows.dtype == np.int32
    assert rows.tolist() == [
        [723, 295, 582, 359, 0, 0],
        [627, 217, 939, 312, 342, 492],
        [393, 295, 349, 658, 6, 187],
        [787, 284, 575, 960, 92, 721],
        [149, 956, 0, 0, 0, 0],
    ]


def test_all_tokens_of_a_vocabulary_have_rows():
    rows = load_tokenizer("cl100k_base").spelling_rows(4096)
    assert rows.shape == (100_256, PARTS)
    assert (rows.min(), rows.max()) == (0, 4095)
    words = np.bincount(rows[:, 0], minlength=4096)  # of all of each token
    assert sorted(words)[-2] < 4 * words.mean()  # white space alone, hundreds of tokens, shares one
