"""The server's page: a prompt, sliders, and the model's text as it is written.

It requests nothing but completions, and inserts their text as text, never as HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lit_gpt.generation.completion import Request
from lit_gpt.generation.sampling import Sampling
from lit_gpt.reports.html import environment, page

HERE = Path(__file__).parent
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript is exact for


@dataclass(frozen=True)
class Slider:
    """An option of the requests; at `off` it is left out."""

    name: str
    low: float
    high: float
    step: float
    value: float
    off: float | None = None


def serve_page(
    model: str, facts: str, max_tokens: int, vocab_size: int, needs_key: bool = False
) -> str:
    """The whole page, as HTML.

    Args:
        model: its name in requests.
        facts: one line that describes it.
        max_tokens: the most that a request may ask for.
        vocab_size: of the model.
        needs_key: whether requests need a key, which the page asks for.
    """
    usual = Sampling()
    sliders = [
        Slider("temperature", 0, 2, 0.05, usual.temperature),
        Slider("top_p", 0.05, 1, 0.05, usual.top_p, off=usual.top_p),
        Slider("top_k", 0, min(200, vocab_size), 1, 0, off=0),
        Slider("min_p", 0, 0.5, 0.01, usual.min_p, off=usual.min_p),
        Slider("repetition_penalty", 1, 2, 0.05, usual.repetition_penalty, off=1),
        Slider("max_tokens", 1, max_tokens, 1, min(max_tokens, Request.max_new_tokens)),
    ]

    def read(name: str) -> str:
        return (HERE / name).read_text(encoding="utf-8")

    template = environment().from_string(read("templates/page.html"))
    body = template.render(
        model=model, facts=facts, sliders=sliders, max_seed=MAX_SEED, needs_key=needs_key
    )
    return page(model, body, read("static/page.css"), read("static/page.js"), connect="'self'")
