"""What the plan suggests: steps, model size and dropout that suit the text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig

# Repeating a text up to 4 times is nearly as good as new text, and beyond 16 times adds hardly
# anything (Muennighoff et al. 2023, Scaling Data-Constrained Language Models).
GOOD_EPOCHS = 4
USEFUL_EPOCHS = 16
MOST_TOKENS = 20  # of training text per parameter
LEAST_TOKENS = 0.1
SHAPES = (  # d_model, num_blocks, num_heads; the last four are GPT-2's
    *((16, 1, 1), (24, 2, 2), (32, 2, 2), (48, 3, 3), (64, 4, 4), (80, 6, 4), (128, 6, 4)),
    *((192, 6, 6), (256, 8, 8), (384, 8, 6), (512, 8, 8)),
    *((768, 12, 12), (1024, 24, 16), (1280, 36, 20), (1600, 48, 25)),
)


@dataclass(frozen=True)
class Suggestion:
    reason: str
    options: tuple[str, ...]  # ready to paste


def suggest_steps(steps: int, epochs_per_step: float) -> Suggestion | None:
    """Enough steps to read the text once, and no more than still help."""
    epochs = steps * epochs_per_step
    wanted = 1 if epochs < 0.95 else USEFUL_EPOCHS if epochs > 1.05 * USEFUL_EPOCHS else epochs
    better = math.ceil(wanted / epochs_per_step - 1e-9)
    if wanted == epochs or better == steps:
        return None
    reason = f"Train for about {counted(better * epochs_per_step)} instead of {epochs:.2g}"
    return Suggestion(reason, (f"--trainer.max_steps={better}",))


def suggest_dropout(dropout: float, epochs: float) -> Suggestion | None:
    """No dropout while the text is nearly new, some where the model could memorize it."""
    if epochs <= GOOD_EPOCHS and dropout > 0:
        reason = f"No dropout, since the text won't be memorized in {counted(epochs)}"
        return Suggestion(reason, ("--model.dropout=0",))
    if epochs > GOOD_EPOCHS and dropout == 0:
        reason = f"Dropout, since the text may be memorized in {counted(epochs)}"
        return Suggestion(reason, ("--model.dropout=0.1",))
    return None


def suggest_model(
    tokens: int, config: GPTConfig, given: Mapping[str, int | None]
) -> Suggestion | None:
    """Another model size, where the text is far too long or too short for this one.

    For a text that is read once, the best model has a twentieth as many parameters as the text has
    tokens (Hoffmann et al. 2022, Training Compute-Optimal Large Language Models). From a short
    text, larger models learn more per token (Muennighoff et al. 2023): on 0.1.0's sample corpus,
    0.37 M tokens read once, models of 0.07, 0.67, 1.5 and 3.1 M parameters ended at 3.27, 1.89,
    1.55 and 1.31 nats/token. So a smaller one is suggested only beyond 10 parameters per token, as
    in nanoGPT's recipe for Shakespeare (10.65 M for 1 M characters).

    Args:
        tokens: length of the training text.
        given: the fields of config as they were given; num_heads must suit num_kv_heads.
    """
    now = count_parameters(config)
    if LEAST_TOKENS <= tokens / now <= MOST_TOKENS:
        return None
    target = tokens / MOST_TOKENS if tokens / now > MOST_TOKENS else tokens
    fixed = {name: given.get(name) for name in ("num_kv_heads", "head_size", "hidden_size")}
    # Distances, sizes and shapes: the present one stays unless another is clearly closer.
    distance = 0.9 * abs(math.log(now / target))
    candidates: list[tuple[float, int, dict[str, int]]] = [(distance, now, {})]
    for sizes in SHAPES:
        shape = dict(zip(("d_model", "num_blocks", "num_heads"), sizes, strict=True))
        changes: dict[str, Any] = fixed | shape
        try:
            size = count_parameters(replace(config, **changes))
        except UserError:  # key/value heads, or a rotary fraction, that don't suit these heads
            continue
        candidates.append((abs(math.log(size / target)), size, shape))
        if size > target:
            break
    _, size, shape = min(candidates, key=lambda candidate: candidate[0])
    if not shape:
        return None
    reason = (
        f"A {'larger' if size > now else 'smaller'} model for {short(tokens)} tokens, "
        f"{short(size)} parameters instead of {short(now)}"
    )
    return Suggestion(reason, tuple(f"--model.{name}={value}" for name, value in shape.items()))


def count_parameters(config: GPTConfig) -> int:
    with torch.device("meta"):  # without memory for them
        return sum(GPT(config).num_parameters())


def counted(epochs: float) -> str:
    return "1 epoch" if f"{epochs:.2g}" == "1" else f"{epochs:.2g} epochs"


def short(number: float) -> str:
    """1234567 as 1.23 M."""
    for unit, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"
