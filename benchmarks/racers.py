"""One side of `run.py race` as a process: trains until its time is up and leaves snapshots.

Usage: racers.py SIDE FOLDER SECONDS DEVICE [option of train.py ...]

FOLDER holds train.txt and val.txt. Seconds count from the start of the process, its imports and the
encoding of the text included. Snapshots are evaluated by the race, after the process has ended.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from benchmarks import reference_charlm, reference_loop
from benchmarks.racing import MARGIN, Point, Racer, Snapshots
from lit_gpt.command import run
from lit_gpt.optim import learning_rate_factor
from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.splits import Splits, two_texts
from lit_gpt.text.vocabularies import Vocabulary, load_tokenizer


class NanoGPT(Racer):
    """reference_charlm.py on the text's characters, its cosine on the clock: it ends in time."""

    context_length = reference_charlm.CONTEXT

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, device)
        texts = {split: self.read(split) for split in ("train", "val")}
        characters = sorted(set().union(*texts.values()))  # of the whole text, as nanoGPT does
        numbers = {character: i for i, character in enumerate(characters)}
        self.lengths = np.array([len(character.encode()) for character in characters])
        self.splits = {
            split: np.array([numbers[c] for c in text], np.uint32) for split, text in texts.items()
        }
        self.val = self.splits["val"]
        self.model = reference_charlm.build(len(characters)).to(self.device)

    def train(self, snapshots: Snapshots, argv: list[str]) -> None:
        warm = 0.0  # when the warm-up ended

        def factor(step: int) -> float:
            nonlocal warm
            if step < reference_charlm.WARMUP:
                return (step + 1) / reference_charlm.WARMUP
            warm = warm or snapshots.now
            share = (snapshots.now - warm) / max(1e-9, snapshots.seconds - MARGIN - warm)
            return learning_rate_factor(round(1e6 * share), 10**6, 0, "cosine", 0.1)

        steps = snapshots.steps(self.model)
        reference_charlm.train(self.model, self.splits, steps, factor)


class Loop(Racer):
    """reference_loop.py; its learning rate is constant."""

    context_length = reference_loop.CONTEXT

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        super().__init__(folder, device)
        tokenizer = load_tokenizer("cl100k_base")
        self.splits = {s: tokenizer.encode(self.read(s)).astype("int64") for s in ("train", "val")}
        self.val = self.splits["val"]
        self.lengths = tokenizer.token_lengths()
        self.model = reference_loop.ReferenceGPT(tokenizer.vocab_size).to(self.device)

    def train(self, snapshots: Snapshots, argv: list[str]) -> None:
        splits = {split: torch.from_numpy(ids) for split, ids in self.splits.items()}
        reference_loop.train(self.model, splits, snapshots.steps(self.model))


class HuggingFace(Racer):
    """A GPT-2 of the default job's size in transformers' Trainer, all else as it comes.

    AdamW, a linear schedule (on the clock, so that it ends in time), 8 windows a step, dropout 0.1.
    Offline there is no GPT-2 tokenizer: it gets lit_gpt's compact cl100k_base, which is as good and
    has a smaller output layer.
    """

    learning_rate: float | None = None  # its default: 5e-5

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__(folder, device)
        vocabulary = Vocabulary("cl100k_base", compact=True)
        self.splits: Splits = two_texts(self.texts, str(folder / "val.txt"), vocabulary)
        self.val = self.splits.val
        tokenizer = self.splits.corpus.tokenizer
        self.lengths = tokenizer.token_lengths()
        config = GPT2Config(
            vocab_size=tokenizer.vocab_size,
            n_positions=self.context_length,
            n_embd=80,
            n_layer=6,
            n_head=4,
            bos_token_id=None,  # its own are beyond a small vocabulary
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config)
        self.model.to(self.device)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x).logits.flatten(0, 1), y.flatten())

    def train(self, snapshots: Snapshots, argv: list[str]) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class OnTheClock(Trainer):
            def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
                began = snapshots.now

                def factor(step: int) -> float:
                    left = snapshots.seconds - MARGIN
                    return max(0.0, (left - snapshots.now) / max(1e-9, left - began))

                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
                return self.lr_scheduler

        class Watch(TrainerCallback):
            def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
                snapshots.take(model, 0)

            def on_step_end(
                self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
            ) -> None:
                control.should_training_stop = snapshots.after(state.global_step, model)

        length = self.context_length
        rows = self.splits.train[: len(self.splits.train) // length * length].reshape(-1, length)
        windows = [torch.from_numpy(row.astype(np.int64)) for row in rows]
        given = {"learning_rate": self.learning_rate} if self.learning_rate else {}
        arguments = TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=10**9,  # the clock ends it
            use_cpu=self.device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=self.device.type != "cpu",
            **given,
        )
        dataset: Any = [{"input_ids": window, "labels": window} for window in windows]
        OnTheClock(self.model, arguments, train_dataset=dataset, callbacks=[Watch()]).train()


class HuggingFaceFaster(HuggingFace):
    """The same with a learning rate for a model that starts from nothing, the classic loop's."""

    learning_rate = 1e-3


class LitGPTRacer(Racer):
    """lit_gpt's training command with the options it is given; it keeps the time itself."""

    def option_name(self, field: str) -> str:
        from lit_gpt.training.options import option_name

        return option_name(field)

    def train(self, snapshots: Snapshots, argv: list[str]) -> None:
        from lightning.pytorch.callbacks import Callback

        from lit_gpt.training.train import build_run, train
        from lit_gpt.training.warning_filters import silence_warnings

        class Watch(Callback):
            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                snapshots.take(pl_module.gpt, 0)

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                if snapshots.now >= snapshots.next:
                    snapshots.take(pl_module.gpt, trainer.global_step)

            def on_train_end(self, trainer: Any, pl_module: Any) -> None:
                snapshots.take(pl_module.gpt, trainer.global_step)

        silence_warnings()
        texts = [f"--data.{name}={self.folder / file}" for name, file in TEXTS.items()]
        places = [f"--trainer.default_root_dir={self.folder}", f"--data.cache={self.folder}/cache"]
        accelerator = f"--trainer.accelerator={self.device.type}"
        train(build_run([*texts, *places, accelerator, *argv], callbacks=[Watch()]))

    @property
    def run_folder(self) -> Path:
        return next(self.folder.glob("version_*"))

    def load(self) -> None:
        """Reads the model and its tokenizer from the run's checkpoint."""
        from lit_gpt.checkpoint import Checkpoint

        path = self.run_folder / "checkpoints" / "last.ckpt"
        self.model, tokenizer = Checkpoint.read(path).build()
        self.model.to(self.device)
        self.context_length = self.model.config.context_length
        self.lengths = tokenizer.token_lengths()
        texts = TextFiles(str(self.folder / "val.txt"), cache=str(self.folder / "cache"))
        self.val = load_corpus(texts, Vocabulary(tokenizer)).tokens

    def curve(self) -> list[Point]:
        self.load()
        return super().curve()


TEXTS = {"path": "train.txt", "val_path": "val.txt"}
RACERS: dict[str, type[Racer]] = {
    "nanogpt": NanoGPT,
    "loop": Loop,
    "trainer": HuggingFace,
    "trainer_1e-3": HuggingFaceFaster,
    "lit_gpt": LitGPTRacer,
}


def main(side: str, folder: str, seconds: str, device: str, *argv: str) -> int:
    torch.manual_seed(1337)
    snapshots = Snapshots(Path(folder, "snapshots"), float(seconds))
    racer = RACERS[side](Path(folder), device)
    return run(lambda: racer.train(snapshots, list(argv)), racer.option_name)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
