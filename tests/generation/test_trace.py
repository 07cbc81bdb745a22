"""How tokens and their probabilities are shown."""

import pytest

from lit_gpt.generation.completion import Choice
from lit_gpt.generation.trace import as_dict, show_token
from lit_gpt.text.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
MORE = {
    " the": "␣the",
    "\n\t": "\\n\\t",
    "\\n": "\\\\n",
    "猫": "猫",
    "\x1b[1m": "<1b>[1m",
    b" \xe7\x8c": "␣<e78c>",
    b"\xab\xe7": "<abe7>",
    b"\xabx\xe7\x8c": "<ab>x<e78c>",
}
TOKENS = [text.encode() if isinstance(text, str) else text for text in MORE]
TOKENIZER = Tokenizer("test", r"(?s:.+)", BYTES + TOKENS).with_end_of_text()


@pytest.mark.parametrize(("number", "shown"), list(enumerate(MORE.values())))
def test_spaces_and_parts_of_characters_are_visible(number, shown):
    assert show_token(TOKENIZER, 256 + number) == shown


def test_the_end_of_a_document_is_visible():
    assert show_token(TOKENIZER, TOKENIZER.end_of_text) == "<end>"


def test_as_dict():
    choice = Choice(97, 0.123456789, 1.0, [(98, 0.5), (97, 0.123456789)])
    assert as_dict(choice, TOKENIZER) == {
        "id": 97,
        "token": "a",
        "probability": 0.123457,
        "drawn_with": 1.0,
        "likeliest": [
            {"id": 98, "token": "b", "probability": 0.5},
            {"id": 97, "token": "a", "probability": 0.123457},
        ],
    }
