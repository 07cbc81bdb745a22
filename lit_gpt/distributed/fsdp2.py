"""--trainer.strategy=fsdp2: each process holds a share of the weights, gradients and moments.

PyTorch's fully_shard (FSDP2; Zhao et al. 2023) through Lightning's ModelParallelStrategy, which is
experimental in 2.6.6: docs/lightning-notes.md#fsdp2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_gpt.checkpoint import REST, is_sharded, take_tensors, with_tensors
from lit_gpt.distributed import sharded_files
from lit_gpt.distributed.sharded_muon import Exchange
from lit_gpt.distributed.shards import gather_state, gather_weights, scatter_state, scatter_weights
from lit_gpt.model import GPT
from lit_gpt.optim import MuonAdamW

NAME = "fsdp2"


def device_of_weights(strategy: Any) -> AbstractContextManager[Any]:
    """Where this process makes a model: of a sharded one, only the first process has weights."""
    is_first = getattr(rank_zero_only, "rank", 0) == 0
    return nullcontext() if is_first or strategy != NAME else torch.device("meta")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards a LitGPT over all processes, and saves checkpoints as one device does.

    Attributes:
        saves_shards: whether a checkpoint is a folder instead, in which each process writes its own
            part.
    """

    strategy_name = NAME
    saves_shards = False

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, gpt: GPT) -> None:
        """Divides a model between the processes, block by block.

        Its weights are those of the first process; the others may have it on the meta device.
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if isinstance(gpt, FSDPModule):  # the evaluation at step 0 and the fit both configure it
            return
        weights = dict(gpt.named_parameters())
        buffers = dict(gpt.named_buffers())  # which no state_dict has
        gpt.to("meta")
        if gpt.config.tie_embeddings:  # each of the two became a weight of its own
            gpt.head.weight = gpt.embedding.weight
        mesh = self.device_mesh["data_parallel"]
        for block in gpt.blocks:
            fully_shard(block, mesh=mesh)
        # What is in no block stays whole from the hidden states to the end of the backward pass, as
        # the loss needs the output layer.
        fully_shard(gpt, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(gpt, "hidden_states")
        gpt.to_empty(device=self.root_device)
        scatter_weights(gpt, weights if self.is_global_zero else {})
        for name, buffer in gpt.named_buffers():
            if self.is_global_zero:
                buffer.copy_(buffers[name])
            torch.distributed.broadcast(buffer, 0)

    @property
    def module(self) -> pl.LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def gpt(self) -> Any:
        """The sharded model."""
        return self.module.gpt

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keeps what is in no block whole, to call the model in all processes together."""
        self.gpt.unshard()
        yield
        self.gpt.reshard()

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        self.gpt.reshard()  # the evaluation at step 0 leaves whole weights
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if isinstance(optimizer, MuonAdamW):
                optimizer.muon.orthogonalize = Exchange(self.device_mesh["data_parallel"])

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """All weights on the CPU of the first process; nothing on the others, or to save shards."""
        self.gpt.reshard()
        return {} if self.saves_shards else gather_weights(self.module)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The same of the optimizer's state; sharded to save shards."""
        state = super(ModelParallelStrategy, self).optimizer_state(optimizer)
        return state if self.saves_shards else gather_state(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))  # the one of the first process
        if not self.saves_shards:
            super().save_checkpoint(checkpoint, path)
            return
        _, state = take_tensors(checkpoint)
        rest = with_tensors(checkpoint, {}, {**state, "state": {}})

        def write_rest(folder: Path) -> None:
            self.checkpoint_io.save_checkpoint(rest, folder / REST)

        sharded_files.save(
            sharded_files.tensors_of(self.module, state), write_rest, path, self.is_global_zero
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Restores weights and moments; the first process reads the file, all read a folder.

        Returns:
            The rest, in all processes.
        """
        sharded = is_sharded(checkpoint_path)
        rest: dict[str, Any] = {}
        weights: Any = None
        state: dict[str, Any] = {}
        if self.is_global_zero:
            file = Path(checkpoint_path) / REST if sharded else checkpoint_path
            rest = self.checkpoint_io.load_checkpoint(file)
            weights, state = take_tensors(rest)
        rest = self.broadcast(rest)
        self.gpt.reshard()
        if sharded:
            self.load_shards(Path(checkpoint_path), self.broadcast(state))
        else:
            scatter_weights(self.module, weights, frozen=False)  # as it saves them
            for optimizer in self.optimizers:
                scatter_state(optimizer, self.module, state)
        return with_tensors(rest, None, None)

    def load_shards(self, path: Path, state: dict[str, Any]) -> None:
        """Reads the weights, and the moments that the optimizer's state lacks."""
        weights = dict(self.module.named_parameters())
        tensors = sharded_files.empty_tensors(path, weights)
        tensors |= sharded_files.tensors_of(self.module, {"state": {}})  # to be filled in place
        sharded_files.load(tensors, path)
        for optimizer in self.optimizers:
            optimizer.load_state_dict({**state, "state": sharded_files.state_of(tensors)})


if NAME not in StrategyRegistry:
    StrategyRegistry.register(NAME, FSDP2Strategy, description="weights sharded over all devices")
