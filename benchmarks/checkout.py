"""A checkout of nanoGPT as a side of `run.py race`: its train.py with its README's options."""

from __future__ import annotations

import importlib.util
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.racers import NanoGPT
from benchmarks.racing import Point
from lit_gpt.errors import UserError

CONFIG = "config/train_shakespeare_char.py"
FILES = ("train.py", "model.py", "configurator.py", CONFIG)
# Its README's for a computer without a GPU.
ON_CPU = [
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--dropout=0.0",
]
EVALUATION = re.compile(r"step (\d+): train loss [\d.]+, val loss ([\d.]+)")
ITERATION = re.compile(r"iter (\d+): loss [\d.]+, time ([\d.]+)ms")
WARM = 50  # iterations that are timed before the race


def check_checkout(folder: str | None) -> None:
    """Refuses a folder that lacks one of the files that are run."""
    for name in FILES if folder else ():
        if not Path(folder, name).is_file():
            problem = f"not a checkout of nanoGPT: it has no {name}"
            hint = "git clone https://github.com/karpathy/nanoGPT"
            raise UserError(problem, field="nanogpt", value=folder, hint=hint)


@dataclass
class Lines:
    """What its train.py prints, and when.

    Args:
        seconds: of the whole process.
        evaluations: seconds since its start, validation loss in nats/character.
        milliseconds: of each iteration; the first has an evaluation too.
    """

    seconds: float
    evaluations: list[Point]
    milliseconds: list[float]


def read_lines(process: subprocess.Popen[str], start: float) -> Lines:
    found = Lines(0.0, [], [])
    assert process.stdout is not None
    for line in process.stdout:
        if evaluation := EVALUATION.match(line):
            found.evaluations.append((time.time() - start, float(evaluation[2])))
        elif iteration := ITERATION.match(line):
            found.milliseconds.append(float(iteration[2]))
    process.wait()
    found.seconds = time.time() - start
    return found


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Ends the process with the block."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def plan_iterations(timed: Lines, seconds: float) -> tuple[int, int]:
    """How many iterations fit into the seconds, and how many lie between two evaluations.

    As few are evaluated as in the recipe, every 250 or so; the last one is, to be saved.
    """
    iteration = median(timed.milliseconds[1:]) / 1000
    evaluation = max(0.0, timed.milliseconds[0] / 1000 - iteration)
    evaluations = 1
    # One at its start, and one at the end of the timed run too.
    start_up = timed.seconds - 2 * evaluation - len(timed.milliseconds) * iteration
    left = seconds - start_up - evaluation
    while left - evaluations * evaluation > (evaluations + 0.5) * 250 * iteration:
        evaluations += 1
    every = max(1, int((left - evaluations * evaluation) / iteration / evaluations))
    return every * evaluations, every


class Checkout(NanoGPT):
    """Its train.py in a process; its model and weights for our evaluation.

    Args:
        folder: of the texts.
        device: as PyTorch names it.
        checkout: the repository, which is left as it is.
    """

    def __init__(self, folder: Path, device: str, checkout: str) -> None:
        super().__init__(folder, device)
        self.checkout = Path(checkout).resolve()
        for split, ids in self.splits.items():
            ids.astype("uint16").tofile(folder / f"{split}.bin")
        with (folder / "meta.pkl").open("wb") as file:
            pickle.dump({"vocab_size": len(self.lengths)}, file)

    def start(self, iterations: int, every: int) -> Lines:
        """Runs its train.py.

        Args:
            iterations: how many; its learning rate falls until the last.
            every: how many iterations lie between two evaluations.
        """
        argv = [
            *(ON_CPU if self.device.type == "cpu" else ["--device=cuda"]),
            f"--dataset={self.folder}",  # a whole path, so that nothing is written to the checkout
            f"--out_dir={self.folder}",
            f"--max_iters={iterations}",
            f"--lr_decay_iters={iterations}",
            f"--eval_interval={every}",
            "--always_save_checkpoint=True",
            "--log_interval=1",
        ]
        command = [sys.executable, "-u", "train.py", CONFIG, *argv]
        start = time.time()
        with (self.folder / "stderr").open("w+") as errors:
            process = subprocess.Popen(
                command, cwd=self.checkout, text=True, stdout=subprocess.PIPE, stderr=errors
            )
            with ended(process):
                lines = read_lines(process, start)
            errors.seek(0)
            said = errors.read().strip().splitlines()
        if process.returncode:
            problem = f"its train.py ended with status {process.returncode}: {said[-1:]}"
            raise UserError(problem, field="nanogpt", value=str(self.checkout))
        return lines

    def race(self, seconds: float) -> Lines:
        """Times a few iterations, for which nothing counts, then trains for as many as fit."""
        iterations, every = plan_iterations(self.start(WARM, WARM), seconds)
        self.num_iterations = iterations
        return self.start(iterations, every)

    @property
    def num_steps(self) -> int:
        return self.num_iterations

    def load(self) -> None:
        """Reads the last checkpoint, into the checkout's own model."""
        found = importlib.util.spec_from_file_location("nanogpt", self.checkout / "model.py")
        assert found is not None
        assert found.loader is not None
        module: Any = importlib.util.module_from_spec(found)
        sys.modules["nanogpt"] = module  # its dataclass looks itself up there
        found.loader.exec_module(module)
        content = torch.load(self.folder / "ckpt.pt", map_location=self.device, weights_only=True)
        with redirect_stdout(StringIO()):  # it prints its number of parameters
            self.model = module.GPT(module.GPTConfig(**content["model_args"])).to(self.device)
        prefix = "_orig_mod."  # of a compiled model
        weights = {name.removeprefix(prefix): w for name, w in content["model"].items()}
        self.model.load_state_dict(weights)
        self.context_length = content["model_args"]["block_size"]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return self.model(x, y)[1]
