"""What the plan for other devices prints."""

from __future__ import annotations

from lit_gpt.budget.durations import duration
from lit_gpt.planning.cluster import NAMES, UTILISATIONS, Choice, Cluster
from lit_gpt.planning.memory import count_weights

PUBLISHED = 100e6  # weights: the published runs have more


def counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def long_duration(seconds: float) -> str:
    """As `duration`, but from two days on in days: 12 days."""
    return f"{seconds / 86_400:,.3g} days" if seconds >= 172_800 else duration(seconds)


def print_memory(cluster: Cluster) -> None:
    """A table of the strategies, without activation checkpointing, and with it in the last row."""
    names = ("single", "ddp", "fsdp2") if cluster.world_size > 1 else ("single",)
    plain, recomputed = ([cluster.memory(name, flag) for name in names] for flag in (False, True))
    rows = {
        "weights": [m.weights for m in plain],
        "gradients": [m.gradients for m in plain],
        "moments": [m.moments for m in plain],
        "copies in half precision": [m.copies for m in plain],
        "gathered weights": [m.gathered for m in plain],
        "activations": [m.activations for m in plain],
        "logits": [m.logits for m in plain],
        "CUDA, fragments": [m.overhead for m in plain],
        "total": [m.total for m in plain],
        "total with checkpointing": [m.total for m in recomputed],
    }
    title = f"Memory in GB, of {cluster.device.gb:g} GB"
    print(f"{title:<28}{''.join(f'{NAMES[name]:>12}' for name in names)}")
    for name, sizes in rows.items():
        if any(sizes):
            cells = (f"{size / 1e9:,.2f}" if size else "-" for size in sizes)
            print(f"  {name:<26}{''.join(f'{cell:>12}' for cell in cells)}")


def print_verdict(cluster: Cluster) -> None:
    choice = cluster.choice
    if choice:
        print(f"Fits: {choice}")
        if options := choice.options(cluster.devices, cluster.nodes):
            print(f"Options: {' '.join(options)}")
        return
    reason, options = cluster.remedy()
    print(f"Fits: nothing, even {Choice(cluster.strategies[-1], True)}")
    print(f"{reason}:  {' '.join(options)}" if options else reason)


def print_costs(cluster: Cluster) -> None:
    low, usual, high = UTILISATIONS
    slow, middle, fast = cluster.speeds(cluster.is_recomputed)
    speeds = f"{slow:,.0f} to {fast:,.0f} tokens/s per device; {middle:,.0f} at {usual:.0%}"
    print(f"Speed: {speeds if slow >= 10 else f'below {fast:.2g} tokens/s per device'}")
    print(f"  of the peak; published runs reach {low:.0%} to {high:.0%}")
    if cluster.is_recomputed:
        print("  with a third more to compute, for activation checkpointing")
    if cluster.flops < 6 * PUBLISHED:
        print(f"  with models of over {PUBLISHED / 1e6:.0f} M parameters: expect less of this one")
    if not cluster.tokens:
        print("Time: no number of steps or tokens is planned")
        return
    ends = [cluster.seconds(speed) for speed in (fast, slow, middle)]
    first, last, likely = map(long_duration, ends)
    print(f"Time: {first} to {last} for {cluster.tokens:.3g} tokens; {likely} at {usual:.0%}")
    if cluster.price is not None:
        first, last, likely = (f"{cluster.cost(seconds):,.2f}" for seconds in ends)
        print(f"Cost: {first} to {last}; {likely} at {usual:.0%}")


def print_cluster(cluster: Cluster) -> None:
    device = cluster.device
    count = count_weights(cluster.config, cluster.lora)
    trained = f" ({count.trained:,} of them trained)" * bool(cluster.lora)
    print(f"Parameters: {count.total:,}{trained}, {cluster.flops / 1e9:.3g} GFLOPs per token")
    where = f"{counted(cluster.nodes, 'node')} of {cluster.devices}" * (cluster.nodes > 1)
    number = f"{cluster.world_size:,} x {device.name}{f' ({where})' if where else ''}"
    print(f"Devices: {number}, {cluster.peak / 1e12:,.4g} TFLOP/s each in {cluster.precision}")
    windows = cluster.parts * cluster.batch_size
    print(f"Step: {cluster.step_tokens:,} tokens, {counted(windows, 'window')} on each device")
    print_memory(cluster)
    print_verdict(cluster)
    print_costs(cluster)
    print("None of this is measured; its sources: docs/scaling.md#planning")
