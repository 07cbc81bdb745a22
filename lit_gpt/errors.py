"""UserError: what the user did wrong, as data that each front end words its own way."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from typing import Any

FIELD = re.compile(r"`(\w[\w.]*)`")  # a field named inside a problem or a hint


class UserError(Exception):
    """Something the user can fix.

    The layer that raises it names plain fields (`context_length`); the command line renders them as
    `--data.context_length`, the chat as `/temperature`, the server as a JSON parameter.

    Args:
        problem: what is wrong, in one sentence without a full stop: "must be at least 1". Other
            fields are in backquotes: "must be divisible by `num_heads` (4)".
        field: the setting at fault; None where no single one is.
        value: what that setting was given; None: not worth showing.
        hint: what to do next; fields in backquotes as above.
    """

    def __init__(
        self,
        problem: str,
        *,
        field: str | None = None,
        value: Any = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.field = field
        self.value = value
        self.hint = hint

    def render(self, name_of: Callable[[str], str] = str) -> str:
        """One line, `FIELD VALUE: PROBLEM; HINT`, with each field as `name_of` calls it."""

        def with_names(text: str) -> str:
            return FIELD.sub(lambda match: name_of(match[1]), text)

        message = with_names(self.problem)
        if self.field is not None:
            value = "" if self.value is None else f" {self.value!r}"
            message = f"{name_of(self.field)}{value}: {message}"
        if self.hint is not None:
            message = f"{message}; {with_names(self.hint)}"
        line = " ".join(message.split())
        # A control character, from a stranger's file, could drive the terminal.
        return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)

    def __str__(self) -> str:
        return self.render()


def check_least(lowest: int, **values: float | None) -> None:
    """Refuses a value that is below `lowest`, infinite or NaN; None passes."""
    for name, value in values.items():
        if value is not None and not lowest <= value < math.inf:
            raise UserError(f"must be at least {lowest}", field=name, value=value)


def check_choice(choices: Collection[Any], **values: Any) -> None:
    """Refuses a value that is not one of the choices."""
    for name, value in values.items():
        if value not in choices:
            raise UserError(
                f"must be one of {', '.join(map(str, choices))}", field=name, value=value
            )
