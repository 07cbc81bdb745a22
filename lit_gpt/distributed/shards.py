"""Whole tensors in the first process, shards in all: gathered to save, scattered to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast_object_list, get_rank
from torch.distributed.tensor import DTensor, distribute_tensor

from lit_gpt.optimizer_state import State, by_name, has_names, weight_names


def gather(value: Any) -> Any:
    """The whole of a sharded tensor, on the CPU of the first process; anything else as it is."""
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if get_rank() == 0 else None


def scatter(whole: Tensor | None, like: Any) -> DTensor:
    """Shards a tensor that the first process has, as `like` is sharded."""
    local = like.to_local()
    if whole is None:
        whole = torch.empty(like.shape, dtype=like.dtype, device=local.device)
    whole = whole.to(local.device, like.dtype)
    return distribute_tensor(whole, like.device_mesh, like.placements)


@torch.no_grad()
def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """The trained weights by name, tied ones once in memory; empty but in the first process."""
    whole: dict[nn.Parameter, Tensor] = {}
    for weight in module.parameters():
        if weight.requires_grad:
            whole[weight] = gather(weight.detach())
    if get_rank():
        return {}
    names = module.named_parameters(remove_duplicate=False)
    return {name: whole[weight] for name, weight in names if weight in whole}


@torch.no_grad()
def scatter_weights(
    module: nn.Module, weights: Mapping[str, Tensor] | None, frozen: bool = True
) -> None:
    """Gives a sharded model the weights that the first process has by name.

    Args:
        frozen: whether those that are not trained are among them.
    """
    for name, weight in module.named_parameters():
        if not (frozen or weight.requires_grad):
            continue
        weight.copy_(scatter(weights[name] if get_rank() == 0 and weights else None, weight))


@torch.no_grad()
def gather_state(state: State) -> State:
    """An optimizer's state with whole moments; empty but in the first process."""
    moments = {
        key: {name: gather(value) for name, value in values.items()}
        for key, values in state["state"].items()
    }
    return {**state, "state": moments} if get_rank() == 0 else {}


def scatter_state(optimizer: torch.optim.Optimizer, module: nn.Module, state: State) -> None:
    """Gives an optimizer of a sharded model the state that the first process has.

    Raises:
        ValueError: the state doesn't fit; in all processes.
    """
    weights = dict(module.named_parameters())
    small: list[Any] = [None]
    if get_rank() == 0:
        if not has_names(state):
            state = by_name(state, weight_names(optimizer, module))
        small = [without_moments(state, weights)]
    broadcast_object_list(small, 0)
    if small[0] is None:
        raise ValueError("moments of another shape than their weights")
    for key, values in small[0]["state"].items():
        for name, value in values.items():
            if value is None:
                whole = state["state"][key][name] if get_rank() == 0 else None
                values[name] = scatter(whole, weights[key])
    optimizer.load_state_dict(small[0])


def without_moments(state: State, weights: Mapping[str, Tensor]) -> State | None:
    """A state with None for each moment; None if one has not its weight's shape."""
    small: dict[str, dict[str, Any]] = {}
    for key, values in state["state"].items():
        small[key] = dict(values)
        for name, value in values.items():
            if isinstance(value, Tensor) and value.ndim:
                if key not in weights or value.shape != weights[key].shape:
                    return None
                small[key][name] = None
    return {**state, "state": small}
