"""Memory that is derived, beside what autograd and a tracker of tensors count on real models."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from lit_gpt.errors import UserError
from lit_gpt.model import GPT, Block, GPTConfig
from lit_gpt.module import next_token_loss
from lit_gpt.optim import build_optimizer
from lit_gpt.output_layer import MAX_LOGITS
from lit_gpt.planning.memory import (
    PRECISIONS,
    activation_bytes,
    block_bytes,
    count_weights,
    estimate,
    find_precision,
    logits_bytes,
)
from tests.spelling import RandomSpelling

B, T, V = 2, 64, 300
SIZES = {"d_model": 64, "num_blocks": 3, "num_heads": 4, "dropout": 0.0}
MODELS = {
    "classic": {},
    "gpt2": {"activation": "gelu", "position": "learned", "tie_embeddings": True},
    "modern": {"style": "modern"},
    "llama": {"style": "modern", "num_kv_heads": 2, "qk_norm": False, "hidden_size": 224},
    "fast": {"style": "fast"},
    "spelled": {"style": "fast", "spelling_rows": 64, "output_spelling_rows": 64},
    "qwen2": {"style": "modern", "qk_norm": False, "qkv_bias": True},
    "neox": {"position": "rotary", "activation": "gelu", "parallel_residual": True}
    | {"rotary_fraction": 0.25},
    "mistral": {"style": "modern", "qk_norm": False, "sliding_window": 16},
}
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}


class FusedRMSNorm(torch.autograd.Function):
    """Keeps what the fused kernel of CUDA keeps; on the CPU, torch keeps x / rms(x) too."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rms)
        return x * rms * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight, rms = ctx.saved_tensors
        of_normed = gradient * weight
        normed = x * rms
        of_x = rms * (of_normed - normed * (of_normed * normed).mean(-1, keepdim=True))
        return of_x, (gradient * normed).flatten(0, -2).sum(0), None


@pytest.fixture(autouse=True)
def norm_of_cuda(monkeypatch):
    def forward(self, x):
        x = x.float() if torch.is_autocast_enabled("cpu") else x  # as autocast does on CUDA
        return FusedRMSNorm.apply(x, self.weight, self.eps)

    monkeypatch.setattr(nn.RMSNorm, "forward", forward)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.long)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def saved_bytes(model: GPT, precision: str) -> int:
    """Bytes of all storages that autograd keeps, but for the model's own."""
    model.spell(RandomSpelling(V))
    own = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # so that its address stays taken
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(precision):
        next_token_loss(model, *batch())
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_that_autograd_keeps(name, precision):
    config = GPTConfig(V, T, **SIZES | MODELS[name])
    model = GPT(config).to(DTYPES[precision])
    found = saved_bytes(model, precision)
    log_probabilities = 4 * B * T * V
    matrices = [p for p in model.blocks.parameters() if p.ndim > 1] + [model.head.weight]
    copies = sum(2 * p.numel() for p in matrices) if precision == "bf16-mixed" else 0
    activations = activation_bytes(config, B * T, PRECISIONS[precision], False)
    assert activations == pytest.approx(found - log_probabilities - copies, rel=0.02)
    memory = estimate(config, B * T, precision, "single")
    assert (memory.activations, memory.copies) == (activations, copies)


def test_a_block_of_gpt2_is_that_of_the_paper_without_its_attention_matrix():
    """34 s b h in Korthikanti et al. 2022; ours adds 4 bytes of log-sum-exp in each head."""
    config = GPTConfig(100, 1024, 768, 12, 12, 0.1, activation="gelu")
    assert block_bytes(config, PRECISIONS["bf16-true"]) == 34 * 768 + 4 * 12


def test_smear_keeps_the_embeddings_of_the_tokens_before():
    smeared, plain = (GPTConfig(V, T, **SIZES, smear=smear) for smear in (True, False))
    found = saved_bytes(GPT(smeared), "32-true") - saved_bytes(GPT(plain), "32-true")
    derived, without = (
        activation_bytes(config, B * T, PRECISIONS["32-true"], False) for config in (smeared, plain)
    )
    assert derived - without == pytest.approx(found, rel=0.05)


def test_dropout_keeps_a_byte_of_mask_for_each_number_it_may_drop():
    def size(dropout: float, recomputed: bool) -> int:
        config = GPTConfig(V, T, **SIZES | {"dropout": dropout})
        return activation_bytes(config, B * T, PRECISIONS["32-true"], recomputed)

    assert size(0.1, False) - size(0, False) == B * T * 64 * (1 + 2 * 3)
    assert size(0.1, True) - size(0, True) == B * T * 64 * (1 + 2)


@pytest.fixture(scope="module")
def mesh():
    """Eight devices, of which this process is one and the others do nothing."""
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield init_device_mesh("cpu", (8,))
    dist.destroy_process_group()


def peak_bytes(model: GPT, precision: str) -> int:
    """Of two steps in the order of Lightning's, in which gradients go after the forward pass."""
    optimizer = torch.optim.AdamW(model.parameters())
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for _ in range(2):
            x, y = batch()
            with autocast(precision):
                loss = F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            del loss
            tracker.reset_mod_stats()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_sum_is_the_peak_of_a_step(mesh, precision, strategy, checkpointing):
    sizes = SIZES | {"d_model": 256, "num_blocks": 6, "style": "modern", "tie_embeddings": False}
    config = GPTConfig(V, T, **sizes)
    model = GPT(config)
    if checkpointing:
        wrapper = partial(checkpoint_wrapper, preserve_rng_state=False)
        apply_activation_checkpointing(
            model, checkpoint_wrapper_fn=wrapper, check_fn=lambda part: isinstance(part, Block)
        )
    if strategy == "fsdp2":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    memory = estimate(config, B * T, precision, strategy, 8, checkpointing)
    peak = peak_bytes(model, precision)
    assert memory.total - memory.overhead == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_weights_gradients_and_moments_are_those_of_a_step(precision, optimizer):
    config = GPTConfig(V, T, **SIZES)
    model = GPT(config).to(DTYPES[precision])
    built = build_optimizer(model, 1e-3, 0.0, (0.9, 0.95), kind=optimizer)
    next_token_loss(model, *batch()).backward()
    built.step()
    memory = estimate(config, B * T, precision, "ddp", 8, optimizer=optimizer)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == 2 * sum(p.grad.nbytes for p in model.parameters())  # and buckets
    moments = [t for state in built.state.values() for t in state.values() if t.ndim]
    assert memory.moments == sum(t.nbytes for t in moments)
    shard = estimate(config, B * T, precision, "fsdp2", 8, optimizer=optimizer)
    assert shard.weights == shard.gradients == memory.weights / 8
    assert shard.moments == memory.moments / 8


def test_long_batches_compute_their_logits_in_parts():
    assert logits_bytes(1000, 300) == 12 * 1000 * 300
    assert logits_bytes(MAX_LOGITS // 64, 64) == 12 * MAX_LOGITS
    assert logits_bytes(MAX_LOGITS // 64 + 1, 64) == 3 * MAX_LOGITS


def test_what_cuda_takes_beside_is_in_the_total():
    memory = estimate(GPTConfig(V, T, **SIZES), B * T, "32-true", "single")
    parts = memory.weights + memory.gradients + memory.moments + memory.activations + memory.logits
    assert memory.total == pytest.approx(0.4e9 + 1.1 * parts)


def test_short_names_of_a_precision():
    assert [find_precision(name) for name in (32, "16", "bf16", "bf16-true")] == [
        "32-true",
        "16-mixed",
        "bf16-mixed",
        "bf16-true",
    ]
    with pytest.raises(UserError, match="can't be planned"):
        find_precision("64-true")


@pytest.mark.parametrize("name", MODELS)
def test_weights_in_products_leave_out_tables_that_are_looked_up(name):
    config = GPTConfig(V, T, **SIZES | MODELS[name])
    model = GPT(config)
    count = count_weights(config)
    products = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    assert count.products == sum(weight.numel() for weight in products)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.blocks == sum(p.numel() for p in model.blocks.parameters())
