"""The command-line entry point: `lit-gpt`, `python -m lit_gpt` and the scripts in scripts/."""

from __future__ import annotations

import gc
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
    "prepare": ("lit_gpt.store.prepare", "write a text into a token store that training reads"),
    "export": ("lit_gpt.huggingface.export", "export a folder that transformers loads"),
    "consolidate": ("lit_gpt.distributed.consolidate", "make one file of a sharded checkpoint"),
}
USAGE = "usage: lit-gpt COMMAND [options]\n\n" + "\n".join(
    f"  {name:<13}{text}" for name, (_, text) in COMMANDS.items()
)
STARTING = "Starting: loading PyTorch ..."


@contextmanager
def importing(notice: str = "") -> Iterator[None]:
    """Imports faster, with a notice on the terminal meanwhile; Ctrl-C ends it without a traceback.

    Garbage is not collected: PyTorch and Lightning make 400,000 objects that stay, and to look
    through them again and again is a quarter of the time. Later collections pass over them too.
    """
    num_modules = len(sys.modules)
    collects = gc.isenabled()
    gc.disable()
    old = signal.getsignal(signal.SIGINT)
    if old is not signal.SIG_IGN:  # in the background of some shells
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        with on_terminal(notice):
            yield
    finally:
        signal.signal(signal.SIGINT, old)
        if len(sys.modules) > num_modules:
            gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def on_terminal(notice: str) -> Iterator[None]:
    """Shows a text where it can be wiped out again: on the terminal, as the only process there."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not (notice and is_first and sys.stderr and sys.stderr.isatty()):
        yield
        return
    print(notice, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print(f"\r{' ' * len(notice)}\r", end="", file=sys.stderr, flush=True)


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
    notice = "" if name in ("report", "prepare") or not path else STARTING
    with importing(notice):
        from lit_gpt.command import option, run
        from lit_gpt.distributed.launch import check_one_process, reports_error
        from lit_gpt.errors import UserError

    def start() -> int:
        if name in ("-h", "--help"):
            print(f"{USAGE}\n\nlit-gpt COMMAND --help lists a command's options.")
            return 0
        if not path:
            raise UserError(f"no command {name!r}", hint=f"use one of {', '.join(COMMANDS)}")
        if name not in ("train", "prepare"):  # their processes divide the work
            check_one_process(name)
        with importing(notice):
            module = import_module(path)
        return module.main(options)

    def name_of(field: str) -> str:
        return getattr(sys.modules.get(path), "option_name", option)(field)

    return run(start, name_of, reports_error)


if __name__ == "__main__":
    sys.exit(main())
