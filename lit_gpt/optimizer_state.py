"""The state of an optimizer as checkpoints have it: by the names of the weights.

PyTorch numbers the weights in the order of the optimizer's groups, so a number means another weight
in another optimizer. With names, as torch.distributed.checkpoint has them too, a state fits the
same model on one device, on several, and sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Any]  # "state": moments of each weight; "param_groups": settings and weights


def save_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Has an optimizer save its state by the names of its weights in `module`.

    It loads such a state whatever the order of the names, and one with numbers, as earlier
    checkpoints have it.
    """
    groups = weight_names(optimizer, module)
    optimizer.register_state_dict_post_hook(lambda _, state: by_name(state, groups))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: by_number(state, groups))


def weight_names(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[list[str]]:
    """The names of the weights of each group."""
    names = {id(weight): name for name, weight in module.named_parameters()}
    return [[names[id(weight)] for weight in group["params"]] for group in optimizer.param_groups]


def by_name(state: State, groups: list[list[str]]) -> State:
    """A state with numbers, of an optimizer with these groups, with names instead."""
    name_of = {
        number: name
        for group, names in zip(state["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], names, strict=True)
    }
    return replaced(state, name_of, groups)


def by_number(state: State, groups: list[list[str]]) -> State:
    """A state with names, as an optimizer with these groups can load it.

    Raises:
        ValueError: its groups have other weights.
    """
    if not has_names(state):
        return state
    found = [set(group["params"]) for group in state["param_groups"]]
    if found != [set(names) for names in groups]:
        raise ValueError("the optimizer's groups have other weights")
    names = [name for group in groups for name in group]
    number_of = {name: number for number, name in enumerate(names)}
    numbers = [[number_of[name] for name in group] for group in groups]
    return replaced(state, number_of, numbers)


def replaced(state: State, new: Mapping[Any, Any], groups: list[list[Any]]) -> State:
    """The same state with other keys, and other lists of the weights of each group."""
    found = zip(state["param_groups"], groups, strict=True)
    return {
        **state,
        "state": {new[key]: moments for key, moments in state["state"].items()},
        "param_groups": [{**group, "params": list(keys)} for group, keys in found],
    }


def has_names(state: State) -> bool:
    return any(isinstance(key, str) for group in state["param_groups"] for key in group["params"])


def fits(state: State, shapes: Mapping[str, torch.Size]) -> bool:
    """Whether a state has moments for all weights, of which these are the names and shapes.

    Whatever a malformed state can raise is for the caller to expect.
    """
    found = {key: shape_of(moments) for key, moments in state["state"].items()}
    if has_names(state):
        return found == dict(shapes)
    return Counter(found.values()) == Counter(shapes.values())


def shape_of(moments: Mapping[str, Any]) -> torch.Size:
    """The shape of a weight's moments, which all agree."""
    tensors = [moment for moment in moments.values() if isinstance(moment, Tensor)]
    (shape,) = {moment.shape for moment in tensors if moment.ndim > 0}
    return shape
