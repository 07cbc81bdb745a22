"""What all sides of `run.py race` share: the clock, snapshots of the weights, their evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.command import option, seconds_since_start
from lit_gpt.text.files import TextFiles

MARGIN = 0.5  # seconds in which a process ends
GROWTH = 1.2  # of the seconds between snapshots: some fifteen in a minute
Point = tuple[float, float]  # seconds, bits per byte


class Snapshots:
    """Copies of the weights, ever less often; and the clock, from the start of the process.

    Args:
        folder: for the copies.
        seconds: that the process has.
        start: in seconds since 1970; None: of this process.
    """

    def __init__(self, folder: Path, seconds: float, start: float | None = None) -> None:
        self.folder = folder
        self.seconds = seconds
        self.start = time.time() - seconds_since_start() if start is None else start
        self.next = 0.0
        folder.mkdir(exist_ok=True)

    @property
    def now(self) -> float:
        return time.time() - self.start

    @property
    def is_over(self) -> bool:
        return self.now >= self.seconds - MARGIN

    def take(self, model: nn.Module, step: int) -> None:
        content = {"seconds": self.now, "weights": model.state_dict()}
        torch.save(content, self.folder / f"{step:09}.pt")
        self.next = self.now * GROWTH

    def after(self, step: int, model: nn.Module) -> bool:
        """What is due after `step` steps; whether the time is up."""
        if (is_over := self.is_over) or self.now >= self.next:
            self.take(model, step)
        return is_over

    def steps(self, model: nn.Module) -> Iterator[int]:
        """The numbers of the steps, from 0, until the time is up; at least one."""
        self.take(model, 0)
        for step in count():
            yield step
            if self.after(step + 1, model):
                return


class Racer:
    """A side: what it trains on, and how it predicts.

    Args:
        folder: of the texts; all that the side writes goes there too.
        device: as PyTorch names it.
    """

    context_length = 128
    model: nn.Module  # on the device
    lengths: np.ndarray  # bytes of each token, (V,)
    val: np.ndarray  # ids of the validation text

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = torch.device(device)

    @property
    def texts(self) -> TextFiles:
        return TextFiles(str(self.folder / "train.txt"), cache=str(self.folder / "cache"))

    def read(self, split: str) -> str:
        return (self.folder / f"{split}.txt").read_bytes().decode()

    def option_name(self, field: str) -> str:
        """How the side spells an option."""
        return option(field)

    def train(self, snapshots: Snapshots, argv: list[str]) -> None:
        raise NotImplementedError

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """Over the whole validation text, each token but the first predicted once."""
        from lit_gpt.evaluation.whole_text import WholeText  # loads Lightning: not while racing

        self.model.eval()
        nats = sum(
            self.loss(x.to(self.device), y.to(self.device)).item() * y.numel()
            for x, y in WholeText(self.val, 16, self.context_length)
        )
        return nats / math.log(2) / int(self.lengths[self.val[1:]].sum())

    def curve(self) -> list[Point]:
        """Seconds and bits per byte of each snapshot."""
        points = []
        for path in sorted((self.folder / "snapshots").iterdir()):
            snapshot = torch.load(path, map_location=self.device, weights_only=True)
            self.model.load_state_dict(snapshot["weights"])
            points.append((snapshot["seconds"], self.bits_per_byte()))
        return points

    @property
    def num_steps(self) -> int:
        return max(int(path.stem) for path in (self.folder / "snapshots").iterdir())
