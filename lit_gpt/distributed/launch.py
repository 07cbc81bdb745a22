"""Which processes make up a run: those that torchrun or srun started, and who of them speaks.

Lightning's own launcher starts the others from the first, and needs nothing of this.
"""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lit_gpt import command
from lit_gpt.errors import UserError

if TYPE_CHECKING:
    import jsonargparse
    from torch.distributed import Store

FLAGS = {  # how many processes on a node, and nodes
    "torchrun": ("--nproc_per_node", "--nnodes"),
    "srun": ("--ntasks-per-node", "--nodes"),
}
SHELLS = ("bash", "interactive")  # jobs that Lightning takes for a shell on a node, without srun
SAID = "lit_gpt/error"  # key of the run's store: how many processes had an error to print
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # as gloo says it


@dataclass(frozen=True)
class Launch:
    """The processes that a launcher started, of which this is one.

    Attributes:
        name: torchrun or srun.
        rank: of this process, among all.
        local_rank: of this process, on its node.
        devices: processes on each node.
        num_nodes: machines.
    """

    name: str
    rank: int
    local_rank: int
    devices: int
    num_nodes: int

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes


def find_launch() -> Launch | None:
    """The launcher that started this process; None: there is none, as on an ordinary command line.

    Raises:
        UserError: its processes can't train together.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return torchrun()
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in SHELLS:
        return srun()
    return None


def number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name) or default)


def torchrun() -> Launch:
    devices = number("LOCAL_WORLD_SIZE", 1)
    num_nodes = number("GROUP_WORLD_SIZE", 1)
    if devices * num_nodes != number("WORLD_SIZE", 1):
        problem = "torchrun started different numbers of processes on its nodes"
        raise UserError(problem, hint="give each the same --nproc_per_node")
    return Launch("torchrun", number("RANK"), number("LOCAL_RANK"), devices, num_nodes)


def srun() -> Launch | None:
    """None in a batch script, where the tasks that SLURM reserved are not started yet."""
    tasks = number("SLURM_NTASKS", 1)
    num_nodes = number("SLURM_NNODES", 1)
    if tasks > 1 and not in_step():
        return None
    if tasks % num_nodes or (tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ):
        problem = f"srun started {tasks} tasks on {num_nodes} nodes, and each needs equally many"
        raise UserError(problem, hint="give --ntasks-per-node instead of --ntasks")
    ranks = (number("SLURM_PROCID"), number("SLURM_LOCALID"))
    return Launch("srun", *ranks, tasks // num_nodes, num_nodes)


def in_step() -> bool:
    """Whether srun started this process: a batch script has no step."""
    return "SLURM_STEP_ID" in os.environ


def adopt_launch(config: jsonargparse.Namespace, argv: list[str]) -> None:
    """Sets the Trainer's devices and nodes to those of the launcher.

    It overrides files of options: the config.yaml of a run has them all, and a run may continue on
    another number of devices.

    Args:
        config: the Trainer's options.
        argv: the command line they are from, in which none may contradict the launcher.
    """
    launch = find_launch()
    if launch is None:
        if os.environ.get("SLURM_JOB_NAME") not in SHELLS and number("SLURM_NTASKS") > 1:
            problem = f"SLURM has {number('SLURM_NTASKS')} tasks for this job, and srun starts them"
            raise UserError(problem, hint="put srun before the command")
        return
    wanted = {"devices": launch.devices, "num_nodes": launch.num_nodes}
    for (name, count), flag in zip(wanted.items(), FLAGS[launch.name], strict=True):
        found = count_of(config[name])
        is_typed = any(word.partition("=")[0] == f"--trainer.{name}" for word in argv)
        if found not in (None, count) and is_typed:
            problem = f"{launch.name} started {counted(launch)}"
            hint = f"leave it out, or start with {flag}={found}"
            raise UserError(problem, field=name, value=found, hint=hint)
        if found != count:
            config[name] = count
    if launch.world_size > 1 and is_single(config.strategy):
        problem = f"is for one device, and {launch.name} started {counted(launch)}"
        raise UserError(problem, field="strategy", value="single_device", hint="leave it out")


def count_of(devices: Any) -> int | None:
    """How many devices an option asks for; None: as many as there are.

    >>> [count_of(value) for value in (2, "2", [0, 1], "0,1", "auto", -1)]
    [2, 2, 2, 2, None, None]
    """
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if "," in text:
        return sum(bool(part.strip()) for part in text.split(","))
    return int(text) if text.strip().isdecimal() else None


def is_single(strategy: Any) -> bool:
    name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", "")
    return name == "single_device" or name.endswith(".SingleDeviceStrategy")


def counted(launch: Launch) -> str:
    """`2 processes on this node`, `2 processes on each of 4 nodes`."""
    where = "this node" if launch.num_nodes == 1 else f"each of {launch.num_nodes} nodes"
    return f"{launch.devices} process{'es' * (launch.devices > 1)} on {where}"


def check_one_process(name: str) -> None:
    """Refuses to do the same several times: only training divides its work.

    Args:
        name: of the command.
    """
    launch = find_launch()
    if launch is not None and launch.world_size > 1:
        hint = f"start it without {launch.name}"
        raise UserError(
            f"lit-gpt {name} runs in one process, and {launch.name} started {launch.world_size}",
            hint=hint,
        )


def status_of(status: int, is_global_zero: bool) -> int:
    """The exit status of one process of a run that ends with `status`.

    Lightning's own launcher kills the run if a process that it started has another than 0.
    """
    return status if is_global_zero or find_launch() else 0


def reports_error() -> bool:
    """Whether this process, of all that a launcher started, is the one to print its error.

    All find the same mistake in the options, and the end of one is an error of the others. They
    ask the store where they meet: torchrun's is there from the start, and that of srun's tasks
    once the first one got that far. Without a store, the first process on each node prints.
    """
    try:
        launch = find_launch()
    except UserError:  # the one to print
        return number("RANK", number("SLURM_PROCID")) == 0
    if launch is None or launch.world_size == 1:
        return True
    try:
        return connect(launch).add(f"{SAID}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except Exception:  # nobody is there, or no longer
        return launch.local_rank == 0


def connect(launch: Launch) -> Store:
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    if launch.name != "torchrun":
        raise ConnectionError
    place = (os.environ["MASTER_ADDR"], number("MASTER_PORT"))
    return dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))


def lost_process(error: RuntimeError) -> UserError | None:
    """What the end of another process of the run makes of a collective operation on CPUs.

    NCCL's errors say more, and stay as they are.
    """
    if "gloo" not in str(error) or not any(text in str(error) for text in LOST):
        return None
    time.sleep(1)  # so that the error of that process is reported, not this one
    return UserError("another process of this run has ended", hint="its own error says why")


def command_line(name: str, *argv: str) -> str:
    """A command to copy into a shell, started by the launcher that started this one."""
    launch = find_launch()
    line = command.command_line(name, *argv)
    if launch is None or launch.world_size == 1:
        return line
    words = shlex.split(line)
    words = words[1:] if words[0] == "python" else ["-m", "lit_gpt", *words[1:]]
    if launch.name == "srun":
        return shlex.join(["srun", "python", *words])
    place = ["--rdzv_backend=c10d", f"--rdzv_endpoint={os.environ.get('MASTER_ADDR')}:29400"]
    nodes = [f"--nnodes={launch.num_nodes}", *place] if launch.num_nodes > 1 else []
    return shlex.join(["torchrun", *nodes, f"--nproc_per_node={launch.devices}", *words])
