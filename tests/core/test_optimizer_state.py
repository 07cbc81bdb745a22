"""The optimizer's state in checkpoints: by the names of the weights, whatever their order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lit_gpt.checkpoint import read_checkpoint
from tests.conftest import Result

MUON = {"model.optimizer": "muon", "model.style": "modern", "model.table_rate": 2.0}


def saved(result: Result) -> dict:
    return read_checkpoint(Path(result.run.trainer.log_dir) / "checkpoints" / "last.ckpt")


def shuffled(values: list) -> list:
    return random.Random(0).sample(values, len(values))


@pytest.mark.parametrize("options", [{}, MUON], ids=["adamw", "muon"])
def test_moments_are_saved_by_name_and_loaded_in_any_order_or_by_number(train, tmp_path, options):
    whole = train(**options)
    first = train(**options | {"trainer.max_steps": 4})
    contents = saved(first)
    (state,) = contents["optimizer_states"]
    weights = dict(first.run.model.named_parameters())  # tied ones once
    shapes = {name: moments.popitem()[1].shape for name, moments in state["state"].items()}
    assert shapes == {name: weight.shape for name, weight in weights.items()}
    groups = state["param_groups"]
    assert sorted(name for group in groups for name in group["params"]) == sorted(weights)
    in_blocks = [name for name in weights if ".blocks." in name and weights[name].ndim > 1]
    tables = [name for name in weights if ".blocks." not in name and weights[name].ndim > 1]
    expected = [in_blocks, [], tables] if options else [tables[:1] + in_blocks + tables[1:]]
    assert [group["params"] for group in groups[:-1]] == expected

    contents = saved(first)
    (state,) = contents["optimizer_states"]
    numbers = [name for group in groups for name in group["params"]]  # as 0.1.0 counted them
    by_number = {
        "state": {numbers.index(name): moments for name, moments in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers.index(name) for name in group["params"]]}
            for group in groups
        ],
    }
    names = shuffled(list(state["state"]))
    by_name = {
        "state": {name: state["state"][name] for name in names},
        "param_groups": [{**group, "params": shuffled(group["params"])} for group in groups],
    }
    for name, other in {"by_number": by_number, "by_name": by_name}.items():
        path = tmp_path / f"{name}.ckpt"
        torch.save({**contents, "optimizer_states": [other]}, path)
        result = train(**options, ckpt_path=path)
        assert result.status == 0, result.err
        assert result.steps == whole.steps[-1:], name


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state["param_groups"][0]["params"].pop(),
        lambda state: state["param_groups"][0]["params"].append("gpt.norm.weight"),
        lambda state: state["param_groups"][0].update(params=[{}, "gpt.norm.weight"]),
        lambda state: state["param_groups"].pop(),
        lambda state: state["param_groups"].reverse(),
        lambda state: state["state"].update({"gpt.x": state["state"].pop("gpt.norm.weight")}),
        lambda state: state["state"].pop("gpt.norm.weight"),
        lambda state: state["state"].update({"gpt.norm.weight": 3}),
        lambda state: state["state"].update({"gpt.norm.weight": {"exp_avg": torch.zeros(3)}}),
    ],
)
def test_names_that_do_not_fit_are_one_line(train, tmp_path, damage):
    contents = saved(train(**{"trainer.max_steps": 2}))
    (state,) = contents["optimizer_states"]
    damage(state)
    path = tmp_path / "damaged.ckpt"
    torch.save(contents, path)
    result = train(ckpt_path=path)
    assert result.status == 2
    assert len(result.err.splitlines()) == 1, result.err
    assert result.err.startswith(f"error: {path} ")
