"""A trained model for Python code: `lit_gpt.load("logs/version_0").generate("Once upon")`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import is_sharded, load_checkpoint
from lit_gpt.errors import UserError
from lit_gpt.generation.completion import Request, complete
from lit_gpt.generation.sampling import Sampling
from lit_gpt.model import GPT
from lit_gpt.text.tokenizer import Tokenizer


@dataclass
class LanguageModel:
    """A GPT with its tokenizer: text in, text out.

        >>> model = lit_gpt.load("logs/version_0")
        >>> text = model.generate("Once upon", max_new_tokens=50, temperature=0.9, seed=7)
        >>> for part in model.stream("Once upon", stop=["\\n"]):
        ...     print(part, end="", flush=True)

    Args:
        gpt: in eval mode, on any device.
        tokenizer: the one it was trained with.
    """

    gpt: GPT
    tokenizer: Tokenizer

    def generate(
        self,
        prompt: str = "",
        max_new_tokens: int = Request.max_new_tokens,
        *,
        seed: int = Request.seed,
        stop: str | list[str] | tuple[str, ...] = Request.stop,
        **sampling: Any,
    ) -> str:
        """The text that follows the prompt; the same seed gives the same text.

        Args:
            prompt: text to continue; without one the model starts a new document.
            max_new_tokens: the most tokens to add.
            seed: of the random draws.
            stop: a stop sequence, or several; the text ends before the first.
            sampling: fields of `Sampling`, such as `temperature` and `top_k`.

        Raises:
            UserError: a value out of range.
        """
        return "".join(self.stream(prompt, max_new_tokens, seed=seed, stop=stop, **sampling))

    def stream(
        self,
        prompt: str = "",
        max_new_tokens: int = Request.max_new_tokens,
        *,
        seed: int = Request.seed,
        stop: str | list[str] | tuple[str, ...] = Request.stop,
        **sampling: Any,
    ) -> Iterator[str]:
        """Yields the text of `generate` in parts, as it is written; arguments as there."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        request = Request(prompt, max_new_tokens, Sampling(**sampling), seed, stops)
        pieces = complete(self.gpt, self.tokenizer, [request])
        return (piece.text for piece in pieces if piece.text)


def load(path: str | Path) -> LanguageModel:
    """Loads a trained model, on the CPU; `model.gpt.to("cuda")` moves it.

    Args:
        path: a .ckpt file, or a run's folder: its best checkpoint, or else its last. In a folder
            of several runs the newest checkpoint counts.

    Raises:
        UserError: no checkpoint there, or one that can't be loaded.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir() and not is_sharded(path):
        path = _best_or_last(path, hint="train a model first")
    return LanguageModel(*load_checkpoint(path))


def newest_checkpoint(root: str | Path, name: str) -> Path | None:
    """The most recently written `name`.ckpt of all runs below `root`; None: there is none."""
    found = Path(os.path.expanduser(root)).rglob(f"checkpoints/{name}.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def find_checkpoint(ckpt_path: str | None, logs: str) -> Path:
    """The checkpoint that a command's options name; prints which, unless it is named itself.

    Args:
        ckpt_path: see `named_checkpoint`; none: see `find_newest`.
        logs: folder of the runs.

    Raises:
        UserError: there is none.
    """
    if not ckpt_path:
        return find_newest(logs)
    path = named_checkpoint(ckpt_path, logs)
    if str(path) != ckpt_path:
        print(f"Using {path}", file=sys.stderr)
    return path


def named_checkpoint(ckpt_path: str, logs: str, of_run: tuple[str, ...] = ("best", "last")) -> Path:
    """The checkpoint that a text names, the same in every command.

    Args:
        ckpt_path: a file; `last` or `best`: the newest of all runs; or the folder of a run.
        logs: folder of the runs.
        of_run: which checkpoints of a run's folder will do, in this order.

    Raises:
        UserError: there is none.
    """
    names = of_run
    root = os.path.expanduser(ckpt_path)
    if ckpt_path in ("last", "best"):
        names = (ckpt_path,)
        root = logs
    elif not os.path.isdir(root) or is_sharded(root):
        return Path(ckpt_path)
    path = next(filter(None, (newest_checkpoint(root, name) for name in names)), None)
    if path is None:
        problem = f"no run below {root!r} has a {' or '.join(f'{name}.ckpt' for name in names)}"
        hint = "leave it out, or give the path of a checkpoint"
        raise UserError(problem, field="ckpt_path", value=ckpt_path, hint=hint)
    return path


def find_newest(logs: str) -> Path:
    """The newest run's best checkpoint below `logs`, or its last; prints which.

    Raises:
        UserError: there is none.
    """
    hint = "train a model first, or name a checkpoint with `ckpt_path`"
    path = _best_or_last(logs, hint)
    print(f"Using {path}", file=sys.stderr)
    return path


def _best_or_last(root: str | Path, hint: str) -> Path:
    path = newest_checkpoint(root, "best") or newest_checkpoint(root, "last")
    if path is None:
        raise UserError(f"no checkpoint below {str(root)!r}", hint=hint)
    return path
