"""Owns how a trace shows: each token that was taken, and the likeliest ones beside it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lit_gpt.generation.completion import NUM_LIKELIEST, Choice
from lit_gpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.table import Table

VISIBLE = {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t", ord("\\"): "\\\\", ord(" "): "␣"}


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """The token as what can be seen: blanks too, and bytes that show nothing as <e78c>."""
    if token == tokenizer.end_of_text:
        return "<end>"
    text = tokenizer.tokens[token].decode("utf-8", "surrogateescape").translate(VISIBLE)
    parts = ((shows, "".join(part)) for shows, part in groupby(text, str.isprintable))
    return "".join(
        part if shows else f"<{part.encode('utf-8', 'surrogateescape').hex()}>"
        for shows, part in parts
    )


def as_table(choices: Sequence[Choice], tokenizer: Tokenizer) -> Table:
    """A row for each token: which was taken, its probability as the model has it and as it was
    drawn with, then the likeliest tokens, where the one that was taken is bold.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def percent(probability: float) -> str:
        return f"{probability:.0%}" if probability >= 0.005 or probability == 0 else "<1%"

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name, width in {"step": 4, "taken": 8, "model": 5, "drawn": 5}.items():
        side = "left" if name == "taken" else "right"
        table.add_column(name, justify=side, no_wrap=True, min_width=width)
    for place in range(1, NUM_LIKELIEST + 1):
        table.add_column(str(place) if place > 1 else "likeliest", no_wrap=True)
    for step, choice in enumerate(choices, start=1):
        cells = [
            Text(
                f"{show_token(tokenizer, token)} {percent(probability)}",
                style="bold" if token == choice.token else "",
            )
            for token, probability in choice.likeliest
        ]
        taken = Text(show_token(tokenizer, choice.token))
        numbers = percent(choice.probability), percent(choice.drawn_with)
        table.add_row(str(step), taken, *numbers, *cells)
    return table


def as_dict(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    """The same in plain types; probabilities to six digits."""

    def entry(token: int, probability: float) -> dict[str, Any]:
        shown = show_token(tokenizer, token)
        return {"id": token, "token": shown, "probability": float(f"{probability:.6g}")}

    return entry(choice.token, choice.probability) | {
        "drawn_with": float(f"{choice.drawn_with:.6g}"),
        "likeliest": [entry(*pair) for pair in choice.likeliest],
    }
