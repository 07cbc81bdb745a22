"""Shows a trace: each token that was drawn, beside the likeliest ones."""

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
    """The token with every byte visible: spaces as ␣, unprintable bytes in hex as <e78c>."""
    if token == tokenizer.end_of_text:
        return "<end>"
    text = tokenizer.tokens[token].decode("utf-8", "surrogateescape").translate(VISIBLE)
    shown = []
    for is_printable, characters in groupby(text, str.isprintable):
        part = "".join(characters)
        shown.append(part if is_printable else f"<{part.encode(errors='surrogateescape').hex()}>")
    return "".join(shown)


def as_table(choices: Sequence[Choice], tokenizer: Tokenizer) -> Table:
    """A row per step: the token drawn, its probabilities, and the likeliest (bold: the one drawn).

    `model` is the model's probability, `drawn` the one after temperature, top_k, ...
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def percent(probability: float) -> str:
        return f"{probability:.0%}" if probability >= 0.005 or probability == 0 else "<1%"

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("step", justify="right", no_wrap=True, min_width=4)
    table.add_column("taken", no_wrap=True, min_width=8)
    table.add_column("model", justify="right", no_wrap=True, min_width=5)
    table.add_column("drawn", justify="right", no_wrap=True, min_width=5)
    for rank in range(1, NUM_LIKELIEST + 1):
        table.add_column(str(rank) if rank > 1 else "likeliest", no_wrap=True)
    for step, choice in enumerate(choices, start=1):
        cells: list[str | Text] = [
            str(step),
            Text(show_token(tokenizer, choice.token)),
            percent(choice.probability),
            percent(choice.drawn_with),
        ]
        for token, probability in choice.likeliest:
            style = "bold" if token == choice.token else ""
            cells.append(Text(f"{show_token(tokenizer, token)} {percent(probability)}", style))
        table.add_row(*cells)
    return table


def as_dict(choice: Choice, tokenizer: Tokenizer) -> dict[str, Any]:
    """The choice for JSON; probabilities to six digits."""

    def entry(token: int, probability: float) -> dict[str, Any]:
        return {
            "id": token,
            "token": show_token(tokenizer, token),
            "probability": float(f"{probability:.6g}"),
        }

    return entry(choice.token, choice.probability) | {
        "drawn_with": float(f"{choice.drawn_with:.6g}"),
        "likeliest": [entry(*pair) for pair in choice.likeliest],
    }
