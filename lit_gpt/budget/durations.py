"""Durations as people write and read them."""

from __future__ import annotations

import re

from lit_gpt.errors import UserError

LEAST = 30.0  # seconds: starting, the trial and the final loss take a third of that
UNITS = {"h": 3600, "m": 60, "s": 1}
DURATION = re.compile("".join(rf"(?:(\d{{1,9}}(?:\.\d+)?){unit})?" for unit in UNITS), re.ASCII)


def seconds_of(text: str) -> float:
    """The seconds of `90s`, `10m`, `1h30m` or `2h`.

    Raises:
        UserError: another text, or less than half a minute.
    """
    found = DURATION.fullmatch(text.strip())
    if not text.strip() or found is None:
        hint = "write it as in 90s, 10m, 1h30m or 2h"
        if re.fullmatch(r"\d+(\.\d+)?", text.strip()):
            hint = f"write {text.strip()}s or {text.strip()}m"
        raise UserError("is not a duration with a unit", field="budget", value=text, hint=hint)
    parts = zip(found.groups(), UNITS.values(), strict=True)
    seconds = sum(float(number) * unit for number, unit in parts if number)
    if seconds < LEAST:
        problem = f"must be at least {LEAST:g} seconds"
        raise UserError(problem, field="budget", value=text, hint="give it a minute or more")
    return seconds


def duration(seconds: float) -> str:
    """Seconds for people: 12 ms, 1.5 s, 45 s, 2 min 10 s, 3 h 20 min."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
