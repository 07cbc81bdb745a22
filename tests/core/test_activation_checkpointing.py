"""Activation checkpointing: the same numbers, and only the inputs of blocks are kept."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.module import LitGPT, next_token_loss

SIZES = {"vocab_size": 50, "context_length": 64, "d_model": 32, "num_blocks": 6, "num_heads": 2}


def measure(**options) -> tuple[float, list[torch.Tensor], int]:
    """The loss, the gradients, and the bytes of the activations that the backward pass needs."""
    torch.manual_seed(0)
    model = LitGPT(**SIZES, dropout=0.2, style="modern", **options)
    ids = torch.randint(50, (8, 65))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = next_token_loss(model.gpt, ids[:, :-1], ids[:, 1:])
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()], num_bytes


def test_losses_and_gradients_are_the_same_with_dropout_and_less_is_kept():
    loss, gradients, num_bytes = measure()
    other_loss, other_gradients, less = measure(activation_checkpointing=True)
    assert other_loss == loss
    for found, expected in zip(other_gradients, gradients, strict=True):
        assert torch.equal(found, expected)
    one_input = 8 * 64 * 32 * 4
    assert less < 10 * one_input + 8 * 64 * 50 * 4 * 3  # of 6 blocks and the norm; the logits
    assert num_bytes > 5 * less


@pytest.mark.slow
def test_it_works_with_compiled_blocks():
    options = {"compile": True, "activation_checkpointing": True}
    assert measure(**options)[0] == pytest.approx(measure()[0], abs=0.05)  # other dropout masks
