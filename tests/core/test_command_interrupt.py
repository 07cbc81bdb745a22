"""Whether an error comes from Ctrl-C, also where a library's error is its own context."""

from __future__ import annotations

from lit_gpt.command import is_interrupt


def test_an_interrupt_is_found_among_causes_and_contexts():
    outer, inner = RuntimeError("outer"), RuntimeError("inner")
    outer.__context__ = inner
    assert not is_interrupt(outer)
    inner.__context__ = outer  # Lightning's errors in a closure come back to themselves
    assert not is_interrupt(outer)
    inner.__cause__ = KeyboardInterrupt()
    assert is_interrupt(outer)
    assert not is_interrupt(None)
