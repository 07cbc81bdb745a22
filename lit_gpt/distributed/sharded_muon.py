"""Muon over shards: each matrix is whole in one process, which orthogonalizes it for all.

Newton-Schulz of a shard would not be that of the matrix. So the processes share the matrices of one
shape out: each gets the shards of its own from the others, orthogonalizes them, and returns theirs.
Two exchanges of what a process holds, instead of every process gathering, and computing, all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import all_to_all_single
from torch.nn import functional as F

from lit_gpt.optim import orthogonalize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Exchange:
    """Orthogonalizes matrices whose rows are divided between the processes of a mesh."""

    mesh: DeviceMesh

    def __call__(self, shards: list[Tensor], shape: torch.Size, dtype: torch.dtype) -> list[Tensor]:
        """Of this process's rows of each matrix (M, N), (m, N) each: those of the results."""
        size = self.mesh.size()
        num_rows, num_columns = shape
        rows = -(-num_rows // size)  # m of all processes but the last, which may have fewer or none
        share = -(-len(shards) // size)  # matrices for each process, the last ones maybe padding
        own_rows = len(shards[0])
        padded = torch.stack([F.pad(shard, (0, 0, 0, rows - own_rows)) for shard in shards])
        padded = F.pad(padded, (0, 0, 0, 0, 0, size * share - len(shards)))
        sent = padded.view(size, share, rows, num_columns)
        whole = self.exchange(sent).transpose(0, 1).reshape(share, size * rows, num_columns)
        first = self.mesh.get_local_rank() * share
        count = max(0, min(share, len(shards) - first))  # without the padding
        results = torch.zeros_like(whole)
        if count:
            found = orthogonalize(whole[:count, :num_rows], dtype)
            results[:count, :num_rows] = found.to(whole.dtype)
        back = results.view(share, size, rows, num_columns).transpose(0, 1)
        updates = self.exchange(back).view(size * share, rows, num_columns)
        return list(updates[: len(shards), :own_rows])

    def exchange(self, parts: Tensor) -> Tensor:
        """Sends part i of parts (P, ...) to process i; returns what each of P sent to this one."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        all_to_all_single(received, parts.contiguous(), group=self.mesh.get_group())
        return received
