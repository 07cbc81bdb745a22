"""Measure lit_gpt beside reference implementations: `python benchmarks/run.py KIND [options]`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.command import call, run
from lit_gpt.errors import UserError

KINDS = {
    "loop": ("training.loop", "the default job against the classic loop in plain PyTorch (12 min)"),
    "step": ("step.step", "where a step's time goes, and its share of the machine's limit"),
    "start": ("start.start", "from the start of the process to the first training step"),
    "overhead": ("training.overhead", "a step inside the Trainer against a bare one"),
    "charlm": ("training.charlm", "a byte-level model on --path against nanoGPT's recipe"),
    "race": ("race.race", "nanoGPT's recipe, the loop, Hugging Face's Trainer, for the same time"),
    "by_hand": ("by_hand.by_hand", "--budget beside twelve settings given by hand (13 min)"),
    "generate": ("parts.generation", "with a key/value cache against the whole window each token"),
    "serve": ("serving.serving", "50 staggered requests: latencies and tokens/s, batched and not"),
    "loss": ("parts.loss", "of a large vocabulary, all logits at once against parts of them"),
    "tokenize": ("parts.tokenization", "text file to token cache against tiktoken"),
    "scaling": ("scaling.scaling", "`text` or `files`: long texts, many files to token cache"),
    "store": ("token_store.token_store", "a token store: requests, first batch, order on 4 ranks"),
    "devices": ("devices.devices", "losses on 2 and 4 processes against one process (5 min)"),
    "sharded": ("sharded.sharded", "activation checkpointing's memory; Muon over shards (2 min)"),
    "lora": ("lora.lora", "adapters beside full tuning and beside peft: time, memory (1 min)"),
    "plan": ("plan.plan", "the time and memory that plan.py predicts against train.py's"),
    "gpu": ("gpu.gpu", "GPT-2 124M's shape on an NVIDIA card: steps, loss, shares"),
}


def main(argv: list[str]) -> int:
    kind, *options = argv or ["--help"]
    if kind in ("-h", "--help"):
        print("usage: run.py KIND [options]\n")
        for name, (_, text) in KINDS.items():
            print(f"  {name:<10}{text}")
        print("\nrun.py KIND --help lists the options of one.")
        return 0
    if kind not in KINDS:
        raise UserError(f"no benchmark {kind!r}", hint=f"use one of {', '.join(KINDS)}")
    from benchmarks.measure import Options  # after the help: torch takes a second to load

    module, _, function = KINDS[kind][0].partition(".")
    measure = getattr(import_module(f"benchmarks.{module}"), function)
    call(measure, options, Options, prog=f"run.py {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: main(sys.argv[1:])))
