"""Gradients are clipped in every precision, also where the optimizer is fused."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_gradient_clipped_to_nothing_moves_no_weight(train, precision):
    """AdamW divides by the gradient's size plus 1e-8, beside which 1e-14 is nothing."""
    options = {"trainer.precision": precision, "model.weight_decay": 0}
    clipped = train(**options | {"trainer.gradient_clip_val": 1e-14})
    assert clipped.status == 0, clipped.err
    losses = {line.partition(", ")[2] for line in clipped.steps}
    assert len(losses) == 1, losses
    plain = train(**options)
    assert plain.steps[0] == clipped.steps[0]
    assert plain.steps[-1] != clipped.steps[-1]
