"""Planning for other devices, of which there may be many: what fits, how long it takes, the cost.

Nothing is measured: memory is derived, and time follows from the peak in the device's data sheet
and the share of it that published runs have reached.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from lit_gpt.distributed.launch import count_of
from lit_gpt.errors import UserError, check_least
from lit_gpt.lora import LoraConfig
from lit_gpt.model import GPTConfig
from lit_gpt.planning.devices import Device, find_device
from lit_gpt.planning.memory import (
    PRECISIONS,
    Memory,
    count_weights,
    estimate,
    find_precision,
)

# Of the peak: the least and the most that the published runs in docs/scaling.md#planning reach, and
# what llm.c and torchtitan reach on H100.
UTILISATIONS = (0.29, 0.4, 0.64)
# With activation checkpointing, a step has two forward passes and a backward pass, which is as much
# as two, instead of three passes.
RECOMPUTATION = 4 / 3
MOST_DEVICES = 1 << 12
DEVICES_OF_A_NODE = 8  # as most nodes have
NAMES = {"single": "one device", "ddp": "DDP", "fsdp2": "FSDP2"}


@dataclass(frozen=True)
class Choice:
    """A way to train on several devices."""

    strategy: str  # single, ddp or fsdp2
    checkpointing: bool

    def __str__(self) -> str:
        return NAMES[self.strategy] + (" with activation checkpointing" * self.checkpointing)

    def options(self, devices: int, nodes: int) -> list[str]:
        """Of the training command."""
        words = []
        if self.strategy != "single":
            words = [f"--trainer.strategy={self.strategy}", f"--trainer.devices={devices}"]
        words += [f"--trainer.num_nodes={nodes}"] * (nodes > 1)
        return words + ["--model.activation_checkpointing=true"] * self.checkpointing


@dataclass(frozen=True)
class Cluster:
    """A run on devices that this machine need not have.

    Attributes:
        device: all are of this kind.
        devices: on each node.
        batch_size: windows of a batch on each device.
        parts: batches per step.
        tokens: to train on, over all devices; None: without an end.
        checkpointing: whether the user wants activation checkpointing.
        price: of a device for an hour.
        lora: the adapters that are trained alone.
    """

    config: GPTConfig
    device: Device
    devices: int
    nodes: int
    precision: str
    optimizer: str
    batch_size: int
    parts: int
    tokens: int | None
    checkpointing: bool = False
    price: float | None = None
    lora: LoraConfig | None = None

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def step_tokens(self) -> int:
        return self.world_size * self.parts * self.batch_size * self.config.context_length

    @cached_property
    def flops(self) -> float:
        """FLOPs per token, forward and backward: 6 N + 12 L d T (Chowdhery et al. 2022, PaLM).

        N are the weights in matrix products, L blocks, d the width of attention, T the window.
        Frozen weights, which have no gradients, count 4 times instead of 6.
        """
        c: Any = self.config
        count = count_weights(c, self.lora)
        products = 4 * count.products + 2 * (count.trained if self.lora else count.products)
        attention = 12 * c.num_blocks * c.num_heads * c.head_size * c.context_length
        return products + attention

    @property
    def peak(self) -> float:
        """FLOP/s of a device."""
        is_half = PRECISIONS[self.precision].product == 2
        return 1e12 * (self.device.half if is_half else self.device.single)

    def speeds(self, checkpointing: bool) -> list[float]:
        """Tokens per second on one device at the three utilisations."""
        flops = self.flops * (RECOMPUTATION if checkpointing else 1)
        return [share * self.peak / flops for share in UTILISATIONS]

    def memory(self, strategy: str, checkpointing: bool) -> Memory:
        return estimate(
            self.config,
            self.batch_size * self.config.context_length,
            self.precision,
            strategy,
            self.world_size,
            checkpointing,
            self.optimizer,
            self.lora,
        )

    def fits(self, choice: Choice) -> bool:
        return self.memory(choice.strategy, choice.checkpointing).total <= 1e9 * self.device.gb

    @property
    def is_recomputed(self) -> bool:
        """Whether activations are computed twice, in the way that fits or would have to."""
        return self.choice is None or self.choice.checkpointing

    @property
    def strategies(self) -> tuple[str, ...]:
        return ("single",) if self.world_size == 1 else ("ddp", "fsdp2")

    @cached_property
    def choice(self) -> Choice | None:
        """The fastest way that fits: checkpointing costs more time than FSDP2; None: no way."""
        for checkpointing in (False, True):
            for strategy in self.strategies:
                choice = Choice(strategy, checkpointing)
                if checkpointing >= self.checkpointing and self.fits(choice):
                    return choice
        return None

    def remedy(self) -> tuple[str, list[str]]:
        """What would make it fit, and as options: a smaller batch, more devices, or nothing."""
        last = Choice(self.strategies[-1], True)
        size = self.batch_size
        while size := size // 2:
            if replace(self, batch_size=size).fits(last):
                parts = -(-self.parts * self.batch_size // size)
                words = [f"--data.batch_size={size}", f"--trainer.accumulate_grad_batches={parts}"]
                return f"Would fit with a smaller batch ({last})", words
        last = Choice("fsdp2", True)
        devices, nodes = self.devices, self.nodes
        while devices * nodes < MOST_DEVICES:
            if devices < DEVICES_OF_A_NODE:
                devices += 1
            else:
                nodes += 1
            larger = replace(self, devices=devices, nodes=nodes, batch_size=1)
            if larger.fits(last):
                words = [f"--devices={devices}", f"--nodes={nodes}", "--data.batch_size=1"]
                return f"Would fit {larger.world_size} devices ({last})", words
        return "No number of devices would do: use one with more memory, or a smaller model", []

    def numbers(self) -> dict[str, Any]:
        """The plan as plain values, in tokens, seconds and bytes."""
        choice = self.choice
        speeds = self.speeds(self.is_recomputed)
        seconds = [self.seconds(speed) for speed in speeds] if self.tokens else None
        ways = [(name, flag) for name in ("single", "ddp", "fsdp2") for flag in (False, True)]
        return {
            "device_name": self.device.name,
            "devices": self.devices,
            "nodes": self.nodes,
            "precision": self.precision,
            "parameters": count_weights(self.config, self.lora).total,
            "trained_parameters": count_weights(self.config, self.lora).trained,
            "flops_per_token": self.flops,
            "utilisations": list(UTILISATIONS),
            "tokens_per_second": speeds,
            "tokens": self.tokens,
            "seconds": seconds,
            "cost": [self.cost(s) for s in seconds] if seconds and self.price is not None else None,
            "memory_bytes": [
                {"strategy": name, "activation_checkpointing": flag}
                | asdict(memory)
                | {"overhead": memory.overhead, "total": memory.total}
                for name, flag in ways
                for memory in [self.memory(name, flag)]
            ],
            "strategy": choice and choice.strategy,
            "activation_checkpointing": choice and choice.checkpointing,
        }

    def seconds(self, speed: float) -> float:
        """Of the whole run, at tokens per second on each device."""
        return (self.tokens or 0) / (speed * self.world_size)

    def cost(self, seconds: float) -> float:
        return (self.price or 0.0) * self.world_size * seconds / 3600


def make_cluster(config: Any, vocab_size: int, train_tokens: int | None) -> Cluster:
    """The cluster that the options describe.

    Args:
        config: all options of the plan command.
        train_tokens: of the text; None: it was not read.

    Raises:
        UserError: a value out of range, or that this device can't do.
    """
    device = find_device(config.device_name)
    names = {field.name for field in fields(GPTConfig)} - {"vocab_size"}
    gpt = GPTConfig(vocab_size, **{n: v for n, v in config.model.items() if n in names})
    name = config.trainer.precision
    default = "bf16-mixed" if device.has_bfloat16 else "32-true"
    precision = find_precision(default if name is None else name)
    if precision.startswith("bf16") and not device.has_bfloat16:
        problem = f"{device.name} does not compute in bfloat16"
        raise UserError(problem, field="precision", value=name, hint="use 16-mixed")
    cluster = Cluster(
        gpt,
        device,
        config.devices if config.devices is not None else devices_of(config.trainer),
        config.nodes if config.nodes is not None else config.trainer.num_nodes,
        precision,
        config.model.optimizer,
        config.data.batch_size,
        config.trainer.accumulate_grad_batches,
        config.tokens,
        bool(config.model.get("activation_checkpointing")),
        config.price,
        LoraConfig.of(config.model),
    )
    if cluster.tokens is not None:
        return cluster
    steps, epochs = config.trainer.max_steps, config.trainer.max_epochs or 0
    if steps > 0:
        return replace(cluster, tokens=steps * cluster.step_tokens)
    return replace(cluster, tokens=epochs * train_tokens if epochs > 0 and train_tokens else None)


def devices_of(trainer: Any) -> int:
    if count := count_of(trainer.devices):
        return count
    problem = "does not say how many devices a node has"
    hint = "give `plan.devices`"
    raise UserError(problem, field="devices", value=trainer.devices, hint=hint)


def check_options(config: Any) -> None:
    """Refuses options of another device that don't go together.

    Args:
        config: all options of the plan command.
    """
    for name in ("devices", "nodes", "tokens", "vocab_size"):
        check_least(1, **{f"plan.{name}": config[name]})
    check_least(0, **{"plan.price": config.price})
    if config.device_name is None:
        for name in ("devices", "nodes", "price", "tokens", "vocab_size"):
            if config[name] is not None:
                problem = "is for other devices than this machine's, and says not of which kind"
                hint = "give `plan.device_name` too, such as H100"
                raise UserError(problem, field=f"plan.{name}", value=config[name], hint=hint)
        return
    find_device(config.device_name)
    reasons = {
        "budget": "measures this machine, and `plan.device_name` names another",
        "ckpt_path": "continues a run, and `plan.device_name` plans a new one",
    }
    for name, problem in reasons.items():
        if config[name] is not None:
            raise UserError(problem, field=name, hint="leave one of them out")
