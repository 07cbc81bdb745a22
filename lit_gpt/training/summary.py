"""What a run prints before its first step and after its last."""

from __future__ import annotations

import json
import shlex
from dataclasses import astuple
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_gpt.budget.processor import bfloat16_slowdown
from lit_gpt.callbacks.samples import line_starts
from lit_gpt.checkpoint import is_sharded
from lit_gpt.command import command_line
from lit_gpt.data import TextDataModule
from lit_gpt.distributed import launch
from lit_gpt.distributed.sharded_files import whole_file
from lit_gpt.optim import fastest_dtype
from lit_gpt.store.splits import NoFiles
from lit_gpt.text.ngrams import frequency_baselines
from lit_gpt.text.overlap import SharedLines, copied_tokens, shared_lines
from lit_gpt.text.packing import Packs
from lit_gpt.training.adapters import trained_weights
from lit_gpt.training.changes import changed_devices, changed_options, plan_of, schedule_jump
from lit_gpt.training.chat_card import chat_card

if TYPE_CHECKING:
    from lit_gpt.training.options import TrainOptions
    from lit_gpt.training.train import Run

LEFT_OUT = "not checked for shared lines and copied text; no frequency baselines"
CHAT = ("--chat", "--interactive")
MIN_COPY = 20  # tokens in a row that the training text has too, to count as copied


@rank_zero_only
def print_start(run: Run) -> list[tuple[str, str]]:
    """Prints what is trained on what; returns the data card, which is most of it."""
    card = data_card(run)
    *lines, parameters = (f"{name}: {value}" for name, value in card)
    print("\n".join(lines))
    if run.model.hparams.init_from and not run.checkpoint:
        print(f"Weights, model and tokenizer: {run.model.hparams.init_from}")
    if changes := changed_options(run):
        print(f"Resumed with different options, so results may differ: {', '.join(changes)}")
    if sentence := changed_devices(run):
        print(sentence)
    print(parameters)
    if sentence := slow_precision(run):
        print(sentence)
    return card


@rank_zero_only
def print_choice(options: TrainOptions) -> None:
    """Prints what a budget chose, why, and the same command without it."""
    choice = options.choice
    if choice is None:
        return
    from lit_gpt.training.budget import plain_command

    print("\n".join(choice.reasons))
    expected, low, high = choice.bits_per_byte
    print(f"Expected: {expected:.2f} bits per byte ({low:.2f} to {high:.2f})")
    print(f"The same without --budget:  {plain_command(options)}")


def choice_numbers(options: TrainOptions) -> dict[str, Any]:
    """The same as plain data; empty without a choice."""
    choice = options.choice
    if choice is None:
        return {}
    expected, low, high = choice.bits_per_byte
    return {
        "options": choice.options,
        "reasons": choice.reasons,
        "bits_per_byte": expected,
        "bits_per_byte_range": [low, high],
    }


def text_card(data: TextDataModule) -> list[tuple[str, str]]:
    """Names and values: what the text is, and how it is split."""
    info = data.corpus.info
    sizes = f"{len(data.train_tokens):,} tokens, validation: {len(data.val_tokens):,}"
    store = store_of(data)
    vocabulary = data.vocabulary.describe(data.hparams.tokenizer, data.vocab_size)
    lines = find_shared_lines(data)
    shared = []
    if lines.num_lines:  # a text may have no line ends
        share = f"{lines.num_shared / lines.num_lines:.1%}, {lines.share_of_bytes:.1%} of the bytes"
        value = f"{lines.num_shared:,} of {lines.num_lines:,} ({share})"
        shared = [("Validation lines also in the training text", value)]
    return [
        *([("Token store", f"{data.hparams.path}, {LEFT_OUT}")] if store else []),
        ("Text length", f"{info.num_characters:,} characters"),
        *((name, f"{number:,}") for name, number in info.changes),
        *excluded(data),
        *validation_card(data),
        ("Total", f"{info.num_tokens:,} tokens"),
        ("Training", sizes),
        *chat_card(data),
        *shared,
        ("Vocabulary", f"{data.vocab_size:,} tokens ({store or vocabulary})"),
        ("Bytes per token", f"{info.num_bytes / info.num_tokens:.2f}"),
    ]


def excluded(data: TextDataModule) -> list[tuple[str, str]]:
    """How many files and folders each glob left out; one that matches nothing may be a mistake."""
    found = data.corpus.reader.excluded.copy()
    if not data.splits.is_one_text:
        found.update(data.splits.val_corpus.reader.excluded)
    parts = [f"{number or 'nothing'} by {pattern}" for pattern, number in found.items()]
    return [("Files and folders excluded", ", ".join(parts))] if parts else []


def validation_card(data: TextDataModule) -> list[tuple[str, str]]:
    """What is known of a validation text of its own."""
    h = data.hparams
    if h.val_path is None:
        return []
    info = data.splits.val_corpus.info
    counts = "".join(f", {name.lower()}: {number:,}" for name, number in info.changes)
    value = f"{h.val_path}, {info.num_characters:,} characters{counts}"
    lines = [("Validation text", value)]
    if h.train_fraction != signature(TextDataModule).parameters["train_fraction"].default:
        lines.append(("Training share", "all of the text: train_fraction does not apply"))
    return lines


def data_card(run: Run) -> list[tuple[str, str]]:
    """Names and values: text, device and model."""
    outer, blocks = run.model.gpt.num_parameters()
    tables = "embedding, pairs and output" if run.model.gpt.pairs else "embedding and output"
    parameters = f"{outer + blocks:,} ({tables} {outer:,}, blocks {blocks:,})"
    trained = trained_weights(run.model)
    return [
        *text_card(run.data),
        ("Steps", steps(run)),
        *device_card(run),
        *([("Trained parameters", trained)] if trained else []),
        ("Parameters", parameters),
    ]


def device_card(run: Run) -> list[tuple[str, str]]:
    """What the run computes on; of several devices, also how much they read in a step."""
    trainer = run.trainer
    device = trainer.strategy.root_device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    value = f"{device.type}{name}, precision {precision(run)}{muon(run)}"
    number = trainer.world_size
    if number == 1:
        return [("Device", value)]
    nodes = trainer.num_nodes
    on_nodes = f" on {nodes} nodes" if nodes > 1 else ""
    parts = f"{number} devices x {run.data.hparams.batch_size} windows"
    if trainer.accumulate_grad_batches > 1:
        parts += f" x {trainer.accumulate_grad_batches} batches"
    epoch = run.epoch
    step = f"{epoch.step_windows:,} ({parts}), {epoch.step_tokens:,} tokens"
    return [("Devices", f"{number}{on_nodes}, {value}"), ("Windows per step", step)]


def precision(run: Run) -> str:
    """Of the Trainer, which takes another one where the asked one needs a GPU."""
    asked = run.options.config.trainer.precision
    used = str(run.trainer.precision)
    is_other = asked in (16, "16", "16-mixed") and used != "16-mixed"
    return f"{used} (16-mixed needs a GPU)" if is_other else used


def muon(run: Run) -> str:
    """What a new run's Muon computes in, which is measured; checkpoints keep it."""
    if run.checkpoint or run.model.hparams.optimizer != "muon":
        return ""
    is_half = run.trainer.precision == "bf16-true"
    dtype = torch.bfloat16 if is_half else fastest_dtype(run.trainer.strategy.root_device)
    return f", Muon in {str(dtype).removeprefix('torch.')}"


def slow_precision(run: Run) -> str | None:
    """That bfloat16 was asked for where it is slower than float32, in a sentence."""
    used = run.trainer.precision
    if run.trainer.strategy.root_device.type != "cpu" or used not in ("bf16-mixed", "bf16-true"):
        return None
    slowdown = bfloat16_slowdown(run.model.gpt.config, str(used), run.data.hparams.batch_size)
    if slowdown < 1.1:
        return None
    saved = ", if the memory is enough" if used == "bf16-true" else ""
    return (
        f"On this processor a block takes {slowdown:.1f} times as long in {used} as in 32-true: "
        f"use --trainer.precision=32-true{saved}"
    )


def steps(run: Run) -> str:
    """How many there are, also in epochs: `500 of 256 tokens, 1.6 epochs`."""
    trainer = run.trainer
    if trainer.max_steps < 0:
        epoch = run.epoch
        text = f"until stopped, of {epoch.step_tokens:,} tokens, {epoch.steps(1):,} to an epoch"
    else:
        text = run.epoch.count(trainer.max_steps)
    if isinstance(run.options.config.trainer.val_check_interval, int):
        return text
    interval = int(trainer.val_check_interval) // trainer.accumulate_grad_batches
    return f"{text}, evaluated every {interval:,} steps"


def store_of(data: TextDataModule) -> str | None:
    """The tokenizer of the token store that is read; None: it is a text."""
    reader = data.corpus.reader
    return reader.tokenizer_option if isinstance(reader, NoFiles) else None


def is_chat(data: TextDataModule) -> bool:
    """Whether either split has conversations."""
    return any(isinstance(tokens, Packs) for tokens in data.windows.values())


def find_shared_lines(data: TextDataModule) -> SharedLines:
    """Which validation lines are in the training text too; computed once for each text.

    None of a token store, all of which would have to be fetched, nor of conversations, whose
    templates would be what they share.
    """
    splits = data.splits
    if store_of(data) or is_chat(data):
        return SharedLines(0, 0, 0.0)

    def compute() -> tuple[Any, ...]:
        tokens = data.tokenizer.tokens
        return astuple(shared_lines(splits.train, splits.val, tokens, splits.is_one_text))

    return SharedLines(*splits.remember("shared-lines", compute))


@rank_zero_only
def print_requeued(path: Path, step: int, max_steps: int) -> None:
    print(f"SLURM requeued this job: resuming {shorten(path)} at step {step}")
    if 0 <= max_steps <= step:
        print(f"Nothing is left to do: --trainer.max_steps is {max_steps}")


@rank_zero_only
def print_end(run: Run) -> None:
    trainer = run.trainer
    for text in run.samples.texts:
        print("Sample: " + " / ".join(text.splitlines()))
    print_stop(run)
    if result := run.final.result:
        print_copies(run.samples.new_ids, run.data)
        print(
            f"Final validation loss: {result.loss:.4f} nats/token over {result.extent}, "
            f"perplexity {result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
        )
        print_baselines(run.data)
    if skipped := run.guard.skipped:
        print(f"Skipped updates: {skipped} (non-finite loss or gradient)")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    last = shorten(Path(run.last.dirpath or "") / "last.ckpt")
    best = shorten(run.best.best_model_path) if run.best.best_model_path else last
    if run.best.best_model_score is not None:
        print(f"Best checkpoint: {best} (validation loss {run.best.best_model_score.item():.3f})")
    print(f"Last checkpoint: {last} (step {trainer.global_step})")
    print_commands(run, best, last)


def print_copies(written: list[list[int]], data: TextDataModule) -> None:
    total = sum(map(len, written))
    if store_of(data):
        return
    if total and max(map(len, written)) >= MIN_COPY:
        copied = copied_tokens(written, data.train_tokens, MIN_COPY)
        print(
            f"Copied from the training text ({MIN_COPY} tokens or more in a row): "
            f"{copied:,} of {total:,} generated tokens ({copied / total:.1%})"
        )


def print_baselines(data: TextDataModule) -> None:
    if store_of(data) or is_chat(data):  # which count all tokens
        return
    splits = data.splits
    lengths = data.tokenizer.token_lengths()
    unigram, bigram = splits.remember(
        "baselines", lambda: frequency_baselines(splits.train, splits.val, lengths)
    )
    print(
        f"For comparison, bits per byte from frequencies alone: unigram {unigram:.4f}, "
        f"bigram {bigram:.4f}"
    )


def print_commands(run: Run, best: str, last: str) -> None:
    """What to type next, to be pasted as it is."""
    trainer = run.trainer
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        logs = str(trainer.loggers[0].save_dir)
        print(f"See the curves:  {shlex.join(['tensorboard', '--logdir', logs])}")
    if is_sharded(best):
        print(f"Make one file:   {command_line('consolidate', best)}")
        best = str(whole_file(Path(best)))
    if is_chat(run.data):
        print(f"Chat with it:    {command_line('generate', '--ckpt_path', best, *CHAT)}")
    else:
        prompt = run.data.tokenizer.decode(line_starts(run.data, 1)[0]).strip("\n\ufffd")
        words = ("--ckpt_path", best, "--prompt", prompt)
        print(f"Generate text:   {command_line('generate', *words)}")
    config = run.config.path  # None: it could not be written
    argv = ["--config", shorten(config)] if config else run.options.argv
    argv = [*argv, "--ckpt_path", last, *more_training(run)]
    print(f"Continue:        {launch.command_line('train', *argv)}")
    step = trainer.global_step
    schedule = run.model.hparams.schedule
    if schedule != "constant" and 0 <= trainer.max_steps <= step:
        jump = schedule_jump(run, step, plan_of(run), [[0, 2 * step]])
        print(f"(its {schedule} schedule would end later: the learning rate jumps {jump})")


def more_training(run: Run) -> list[str]:
    """The options without which a resumed run would end where this one did."""
    options = run.options.config.trainer
    step = run.trainer.global_step
    argv = []
    if 0 <= run.trainer.max_steps <= step:
        if options.max_epochs and options.max_epochs > 0:
            argv.append(f"--trainer.max_epochs={2 * options.max_epochs}")
        if options.max_steps >= 0:
            argv.append(f"--trainer.max_steps={max(1, 2 * step)}")
    if run.early.is_exhausted:
        argv.append(f"--early_stopping.patience={2 * run.early.wait_count}")
    if reason_of_callbacks(run):  # which would end it again
        given = options.callbacks if isinstance(options.callbacks, list) else [options.callbacks]
        others = [c.as_dict() for c in given if "EarlyStopping" not in c.class_path]
        argv.append(f"--trainer.callbacks={json.dumps(others or None)}")
    return argv


def print_stop(run: Run) -> None:
    """Why the run ended before its last step."""
    step = run.trainer.global_step
    if name := run.stop.name:
        name = f"--trainer.{name}" if name == "max_time" else name
        print(f"Stopped by {name} after step {step}")
    elif run.early.is_exhausted and run.early.stopping_reason_message:
        print(
            f"Stopped early after step {step}: no lower validation loss in "
            f"{run.early.wait_count} evaluations, the lowest was {run.early.best_score:.3f} at "
            f"step {run.early.best_step}"
        )
    elif step < run.trainer.max_steps or run.trainer.max_steps < 0:
        reason = reason_of_callbacks(run) or "a callback asked for it"
        print(f"Stopped early after step {step}: {reason}")


def reason_of_callbacks(run: Run) -> str | None:
    """Why the user's own EarlyStopping ended the run; None: it didn't."""
    if run.stop.reason or 0 <= run.trainer.max_steps <= run.trainer.global_step:
        return None
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    own = (c for c in callbacks if isinstance(c, EarlyStopping) and c is not run.early)
    messages = (c.stopping_reason_message for c in own if c.stopping_reason_message)
    return next((m.removesuffix(" Signaling Trainer to stop.") for m in messages), None)


def shorten(path: str | Path) -> str:
    """The path as it would be typed from the current folder."""
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
