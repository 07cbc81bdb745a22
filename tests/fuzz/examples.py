"""How many examples the fuzz tests try, and what every refusal has to look like."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings


def numbers(few: int, many: int) -> pytest.MarkDecorator:
    """Runs a test with a few examples, and with many under `pytest -m fuzz`."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.fuzz)])


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=list(HealthCheck))


def check_refusal(status: int, err: str) -> None:
    """A refused input ends with status 2 and one line."""
    assert status == 2, err
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
