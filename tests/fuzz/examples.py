"""How many examples the fuzz tests try, and what every refusal has to look like."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st


def numbers(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test with a few examples, and with many under `pytest -m fuzz`."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.fuzz)])


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))


def nested(odd: st.SearchStrategy) -> st.SearchStrategy:
    """Plain values, odd ones among them, in lists and dicts."""
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | odd,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )


def check_refusal(status: int, err: str) -> None:
    """A refused input ends with status 2 and one line."""
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
