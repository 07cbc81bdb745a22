"""How long a budget is, in seconds."""

from __future__ import annotations

import pytest

from lit_gpt.budget.durations import seconds_of
from lit_gpt.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1h1m1s", 3661), ("1.5m", 90)],
)
def test_hours_minutes_and_seconds(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("600", "write 600s or 600m"),
        ("1.5", "write 1.5s or 1.5m"),
        *((text, "write it as in 90s, 10m, 1h30m or 2h") for text in ("ten", "-1m", "1 m")),
        *((text, "write it as in 90s, 10m, 1h30m or 2h") for text in ("", "30m1h", "1:30", "5d")),
        ("9" * 400 + "h", "write it as in 90s, 10m, 1h30m or 2h"),  # infinite, as a float
    ],
)
def test_what_is_no_duration_is_refused_with_a_way_to_write_it(text, hint):
    with pytest.raises(UserError, match="is not a duration with a unit") as error:
        seconds_of(text)
    assert error.value.hint == hint


def test_less_than_half_a_minute_is_refused():
    assert seconds_of("30s") == 30
    with pytest.raises(UserError, match="at least 30 seconds"):
        seconds_of("29s")
