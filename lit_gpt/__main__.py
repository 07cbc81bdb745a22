"""The command-line entry point: `lit-gpt`, `python -m lit_gpt` and the scripts in scripts/."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

COMMANDS = {  # each module has `main(argv) -> exit status`
    "train": ("lit_gpt.training.train", "train a GPT on a text"),
    "generate": ("lit_gpt.generation.generate", "write text with a trained model"),
    "evaluate": ("lit_gpt.evaluation.evaluate", "measure how well a model predicts any text"),
    "plan": ("lit_gpt.planning.plan", "predict a run's time and memory before it starts"),
    "report": ("lit_gpt.reports.report", "write a page about one run, or compare several"),
    "sweep": ("lit_gpt.tuning.sweep", "search for good settings"),
    "serve": ("lit_gpt.serving.serve", "serve an OpenAI-compatible completions API"),
    "export": ("lit_gpt.huggingface.export", "export a folder that transformers loads"),
}
USAGE = "usage: lit-gpt COMMAND [options]\n\n" + "\n".join(
    f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()
)


@contextmanager
def importing() -> Iterator[None]:
    """Makes Ctrl-C end the process without a traceback, until `run` takes care of it."""
    old = signal.getsignal(signal.SIGINT)
    if old is not signal.SIG_IGN:  # in the background of some shells
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    yield
    signal.signal(signal.SIGINT, old)


def configure_allocator() -> None:
    """Lets PyTorch grow its segments of CUDA memory, unless the user's environment configures it.

    It reads the setting when CUDA starts. With fixed segments, freed blocks of the wrong size add
    up, and a run can be out of memory that it has reserved itself. `max_split_size_mb:512` was the
    remedy before; PyTorch's own message advises this one. Only Linux supports it.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    if sys.platform == "linux" and not any(name in os.environ for name in names):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Args:
        argv: the command's name and its options; None: those of this process.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    path, _ = COMMANDS.get(name, ("", ""))
    configure_allocator()
    with importing():
        from lit_gpt.command import option, run
        from lit_gpt.errors import UserError

    def start() -> int:
        if name in ("-h", "--help"):
            print(f"{USAGE}\n\nlit-gpt COMMAND --help lists a command's options.")
            return 0
        if not path:
            raise UserError(f"no command {name!r}", hint=f"use one of {', '.join(COMMANDS)}")
        return import_module(path).main(options)  # here, where Ctrl-C is handled already

    def name_of(field: str) -> str:
        return getattr(sys.modules.get(path), "option_name", option)(field)

    return run(start, name_of)


if __name__ == "__main__":
    sys.exit(main())
