"""Cutting text of any length into parts that encode to the tokens of the whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import suppress
from functools import cache
from typing import Any

CHUNK = 1 << 20  # characters looked at together
LONGEST = 1 << 19  # characters held without a safe cut; a longer word is cut
AT_ONCE = 64  # words, which is five times as fast as one by one
MARGIN = 16  # characters: text this far behind the end of a word can't lengthen it
SECONDS = 10.0  # a pattern that needs longer to split this little text is left alone

# Most split patterns end a word where a letter or digit is followed by white space or one of these
# (but not the apostrophe of "it's").
PUNCTUATION = '!"#$%&()*+,-./:;<=>?@[\\]^`{|}~，。、；：！？（）“”《》'
LAST_CUT = re.compile(rf".*[^\W_](?=[\s{re.escape(PUNCTUATION)}])", re.DOTALL)


def cut_safely(
    texts: Iterable[str | None], pattern: str, cuts: Counter[str] | None = None
) -> Generator[str | None]:
    """Cuts text into parts that encode to the tokens of the whole; None ends a document.

    Each character is looked at once or twice, and a bounded number is held, wherever the parts of
    the text end. A single word of more than LONGEST characters, or as much white space, is cut.

    Args:
        pattern: the tokenizer's, which splits text into words; parts end where words do.
        cuts: counts words that were cut, as "words".
    """
    cuts = Counter() if cuts is None else cuts
    is_usual = _ends_words_at_punctuation(pattern)
    held = ""
    for text in texts:
        if text is None:
            if held:
                yield held
            yield None
            held = ""
            continue
        for at in range(0, len(text), CHUNK):
            start = max(len(held) - 1, 0)  # what precedes it has no safe cut
            held += text[at : at + CHUNK]
            if is_usual and (cut := LAST_CUT.match(held, start)):
                yield held[: cut.end()]
                held = held[cut.end() :]
            while len(held) > LONGEST:
                end = last_word_end(held, pattern)
                if not end:
                    end = LONGEST
                    cuts["words"] += 1
                yield held[:end]
                held = held[end:]
    if held:
        yield held


def last_word_end(text: str, pattern: str) -> int:
    """Where the last word ends that no further text can change; 0 if there is none.

    White space is never the last word: how it is split depends on what follows.
    """
    limit = len(text.rstrip()) - MARGIN
    last = 0
    with suppress(TimeoutError):
        for expression in (
            f"(?>{pattern}){{1,{AT_ONCE}}}+",
            pattern,
        ):  # many words, then one by one
            for words in _compiled(expression).finditer(text, last, timeout=SECONDS):
                if words.end() > limit:
                    break
                if not text[words.end() - 1].isspace():
                    last = words.end()
    return last


@cache
def _ends_words_at_punctuation(pattern: str) -> bool:
    """Whether a part may end where LAST_CUT finds a place."""
    examples = [a + b for a in "aZé农1" for b in f" \n\u3000{PUNCTUATION}"]
    words = _compiled(pattern).finditer
    return all(any(word.end() == 3 for word in words(f"a {both}b")) for both in examples)


@cache
def _compiled(pattern: str) -> Any:
    import regex  # tiktoken needs it too

    try:
        return regex.compile(pattern)
    except regex.error:  # tiktoken's syntax is a little different
        return regex.compile("(?!)")  # never matches
