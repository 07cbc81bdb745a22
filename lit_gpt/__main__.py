"""The command-line entry point: `lit-gpt`, `python -m lit_gpt` and the scripts in scripts/."""

from __future__ import annotations

import sys
from importlib import import_module

from lit_gpt.command import option, run
from lit_gpt.errors import UserError

COMMANDS = {  # each module has `main(argv) -> exit status`
    "train": ("lit_gpt.training.train", "train a GPT on a text"),
    "generate": ("lit_gpt.generation.generate", "write text with a trained model"),
    "plan": ("lit_gpt.planning.plan", "predict a run's time and memory before it starts"),
    "report": ("lit_gpt.reports.report", "write a page about one run, or compare several"),
    "sweep": ("lit_gpt.tuning.sweep", "search for good settings"),
    "serve": ("lit_gpt.serving.serve", "serve an OpenAI-compatible completions API"),
    "export": ("lit_gpt.huggingface.export", "export a folder that transformers loads"),
}
USAGE = "usage: lit-gpt COMMAND [options]\n\n" + "\n".join(
    f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()
)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status.

    Args:
        argv: the command's name and its options; None: those of this process.
    """
    name, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    path, _ = COMMANDS.get(name, ("", ""))

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
