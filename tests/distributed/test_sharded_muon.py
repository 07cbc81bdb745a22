"""Muon over shards orthogonalizes whole matrices, each in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from lit_gpt.optim import orthogonalize
from tests.distributed.ranks import together

SHAPES = [(7, 5), (5, 12), (1, 4), (6, 6)]  # of which the last process of three has less, or none


def check(count: int) -> int:
    from torch.distributed.device_mesh import init_device_mesh

    from lit_gpt.distributed.sharded_muon import Exchange

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for shape in SHAPES:
        matrices = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))
        expected = orthogonalize(matrices, torch.float32)
        parts = torch.arange(shape[0]).chunk(mesh.size())
        own = parts[dist.get_rank()] if dist.get_rank() < len(parts) else parts[0][:0]
        shards = list(matrices[:, own])
        found = Exchange(mesh)(shards, torch.Size(shape), torch.float32)
        assert len(found) == count
        for update, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(update, whole[own], atol=1e-6, rtol=0)
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("count", [1, 4])
def test_the_results_are_those_of_whole_matrices(count, tmp_path):
    assert together(check, 3, tmp_path, count) == [0, 0, 0], (tmp_path / "out0.txt").read_text()
