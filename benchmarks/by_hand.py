"""`--budget` alone, beside the same seconds with vocabulary, size and batch given by hand."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Column, Table

from benchmarks.measure import Options, at_least_one, read_text, run_training, save, show
from lit_gpt.errors import UserError
from lit_gpt.reports.history import read_history
from lit_gpt.reports.run_files import load_options

SETTINGS = (  # tokenizer, width, blocks, windows of 128 tokens a step
    *(("cl100k_base", 64, 2, 4), ("cl100k_base", 96, 2, 4), ("cl100k_base", 128, 3, 4)),
    *(("bpe:1024", 96, 3, 4), ("bpe:2048", 64, 2, 4), ("bpe:2048", 96, 3, 4)),
    *(("bpe:2048", 128, 3, 8), ("bpe:4096", 64, 2, 4), ("bpe:4096", 96, 3, 4)),
    *(("bpe:8192", 64, 2, 4), ("bpe:8192", 96, 2, 4), ("bytes", 128, 4, 8)),
)
NAMES = ("data.tokenizer", "model.d_model", "model.num_blocks", "data.batch_size")


def describe(tokenizer: object, width: object, blocks: object, windows: object) -> str:
    return f"{tokenizer}, {width} x {blocks}, {windows} windows"


GIVEN = {describe(*setting).removesuffix(", 4 windows"): setting for setting in SETTINGS}
NOTHING = "nothing"


@dataclass
class Row:
    """A run.

    Args:
        given: by hand.
        chosen: what it trained.
        seconds: that its process took.
        bits_per_byte: over the whole validation split.
    """

    given: str
    chosen: str
    seconds: float
    steps: int
    bits_per_byte: float


def train(given: str, argv: list[str]) -> Row:
    """Trains in a process.

    Args:
        given: of GIVEN, or NOTHING.
        argv: options of train.py for all runs alike.
    """
    options = []
    if given != NOTHING:
        options = [f"--{n}={value}" for n, value in zip(NAMES, GIVEN[given], strict=True)]
        options.append("--data.context_length=128")
    with tempfile.TemporaryDirectory() as folder:
        process, _ = run_training(folder, *argv, *options)
        run = Path(folder, "version_0")
        final = read_history(run).final
        config = load_options((run / "config.yaml").read_bytes())
    assert final is not None
    assert final.is_whole
    chosen = describe(*(config[name] for name in NAMES))
    steps = int(config["trainer.max_steps"])
    return Row(given, chosen, process.seconds, steps, final.bits_per_byte)


def by_hand(
    options: Options, seconds: float = 60, threads: int | None = None, given: str = ""
) -> None:
    """`--budget` alone, beside the same seconds with vocabulary, size and batch given by hand.

    Args:
        seconds: of each run.
        threads: of each run; default: each chooses.
        given: the settings that begin so, such as `bpe:`; default: all twelve.

    Raises:
        UserError: no text to read, or no such setting.
    """
    at_least_one(repeats=options.repeats)
    settings = [setting for setting in GIVEN if setting.startswith(given)]
    if not settings:
        raise UserError(f"must begin one of {'; '.join(GIVEN)}", field="given", value=given)
    read_text(options.path)
    argv = [f"--data.path={options.path}", f"--budget={seconds:g}s", "--final.max_tokens=null"]
    argv += [] if threads is None else [f"--threads={threads}"]
    sides = [NOTHING] * options.repeats + settings
    rows = []
    for side in sides:
        print(f"{seconds:g} s with {side} given", flush=True)
        rows.append(train(side, argv))
    best = min(row.bits_per_byte for row in rows if row.given != NOTHING)
    first = Column("given", no_wrap=True)
    table = Table(first, "trained", "process, s", "steps", "bits/byte", "above the best by hand")
    for row in rows:
        bits = row.bits_per_byte
        cells = (f"{row.seconds:.1f}", f"{row.steps:,}", f"{bits:.3f}", f"{bits - best:+.3f}")
        table.add_row(row.given, row.chosen, *cells)
    show(table)
    save("by_hand", [asdict(row) for row in rows], options.out, f"{seconds:g} s each")
