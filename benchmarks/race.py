"""The race: lit_gpt beside what people would use instead, for the same wall-clock time."""

from __future__ import annotations

import math
import shlex
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median_low

from rich.table import Column, Table

from benchmarks.checkout import Checkout, check_checkout
from benchmarks.measure import Options, at_least_one, read_text, run_script, save, show
from benchmarks.racers import RACERS
from benchmarks.racing import Point
from lit_gpt.errors import UserError
from lit_gpt.evaluation.evaluate import Accelerator, find_device

LEAST = 20_000  # bytes of text: a window of each side must fit into its last tenth
NAMES = {
    "nanogpt": "nanoGPT's CPU recipe",
    "checkout": "nanoGPT itself",
    "loop": "the classic loop",
    "trainer": "Hugging Face Trainer",
    "trainer_1e-3": "Hugging Face Trainer, lr 1e-3",
    "lit_gpt": "lit_gpt",
}
PACKAGES = {
    "trainer": ("transformers", "accelerate"),
    "trainer_1e-3": ("transformers", "accelerate"),
}


@dataclass
class Result:
    """How a side did.

    Args:
        name: of the side.
        seconds: that its process took, from outside.
        steps: that it made.
        bits_per_byte: over the whole validation text, when it ended.
        curve: seconds since its start and bits per byte on the way, over the whole text too.
        estimated: whether those on the way are the side's own, over a few batches.
        reached: the seconds after which it had the final quality of each other side; None: never.
    """

    name: str
    seconds: float
    steps: int
    bits_per_byte: float
    curve: list[Point]
    estimated: bool = False
    reached: dict[str, float | None] = field(default_factory=dict)


def first_below(curve: list[Point], level: float) -> float | None:
    """When the line through the points is first at this level or below it."""
    if curve and curve[0][1] <= level:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= level:
            return x0 + (x1 - x0) * (y0 - level) / (y0 - y1)
    return None


def compare(results: list[Result]) -> None:
    """Fills in when each reached the others' final quality."""
    for one in results:
        for other in results:
            if other is not one:
                one.reached[other.name] = first_below(one.curve, other.bits_per_byte)


def write_texts(text: bytes, folder: Path) -> None:
    """Splits at nine tenths of the bytes, or up to three later, where a character ends."""
    cut = len(text) * 9 // 10
    while text[cut] & 0b1100_0000 == 0b1000_0000:  # inside a character
        cut += 1
    (folder / "train.txt").write_bytes(text[:cut])
    (folder / "val.txt").write_bytes(text[cut:])


def run_side(side: str, folder: Path, seconds: float, device: str, argv: list[str]) -> Result:
    """Trains in a process, then evaluates what it left.

    Args:
        side: of RACERS.
        folder: of the texts, and of nothing else.
        argv: options of train.py, for lit_gpt.
    """
    given = argv if side == "lit_gpt" else []
    command = [side, str(folder), str(seconds), device, *given]
    process = run_script("benchmarks/racers.py", *command)
    racer = RACERS[side](folder, device)
    curve = racer.curve()
    final = curve[-1][1]
    curve.append((process.seconds, final))
    return Result(NAMES[side], process.seconds, racer.num_steps, final, curve)


def run_checkout(folder: Path, seconds: float, device: str, checkout: str) -> Result:
    racer = Checkout(folder, device, checkout)
    lines = racer.race(seconds)
    racer.load()
    final = racer.bits_per_byte()
    per_character = len(racer.val) / math.log(2) / int(racer.lengths[racer.val].sum())
    curve = [(at, loss * per_character) for at, loss in lines.evaluations]
    curve.append((lines.seconds, final))
    name = NAMES["checkout"]
    return Result(name, lines.seconds, racer.num_steps, final, curve, estimated=True)


def draw(results: list[Result], path: Path) -> None:
    """Bits per byte over the seconds, a line for each side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    lowest = min(result.bits_per_byte for result in results)
    for i, result in enumerate(sorted(results, key=lambda r: r.bits_per_byte)):
        is_ours = result.name == NAMES["lit_gpt"]
        label = f"{result.name}: {result.bits_per_byte:.3f} after {result.seconds:.0f} s"
        style = {"linestyle": "--" if result.estimated else "-", "linewidth": 3 if is_ours else 1.8}
        color = "#d62728" if is_ours else f"C{(0, 1, 2, 4, 5, 8)[i % 6]}"
        axes.plot(*zip(*result.curve, strict=True), label=label, color=color, **style)
        axes.plot(*result.curve[-1], "o", color=color)
    axes.set_xlabel("seconds since the start of the process")
    axes.set_ylabel("bits per byte, whole validation text")
    axes.set_xlim(0, None)
    top = max(result.bits_per_byte for result in results)
    axes.set_ylim(lowest - 0.15, min(8.2, top + 1.0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def table_of(results: list[Result]) -> Table:
    """A row for each side; a column for the second at which it had what another one ended with."""
    columns = [f"as good as {i}" for i in range(1, len(results) + 1)]
    table = Table("", Column("race", no_wrap=True), "process, s", "steps", "bits/byte", *columns)
    for i, result in enumerate(results, 1):
        cells = []
        for other in results:
            at = result.reached.get(other.name)
            cells.append("" if other is result else "never" if at is None else f"{at:.1f}")
        numbers = (f"{result.seconds:.1f}", f"{result.steps:,}", f"{result.bits_per_byte:.3f}")
        table.add_row(str(i), result.name, *numbers, *cells)
    return table


def check_sides(sides: str) -> list[str]:
    """The names of the sides; refuses a wrong one, and one whose packages are not installed."""
    names = sides.split(",")
    for name in names:
        if name not in RACERS:
            raise UserError(f"must be some of {','.join(RACERS)}", field="sides", value=sides)
    packages = {"matplotlib": None} | {p: n for n in names for p in PACKAGES.get(n, ())}
    for package, name in packages.items():
        if find_spec(package) is None:
            hint = 'pip install -e ".[race]"' + (
                f", or leave {name} out of `sides`" if name else ""
            )
            raise UserError(f"needs the package {package}", hint=hint)
    return names


def race(
    options: Options,
    seconds: float = 60,
    sides: str = ",".join(RACERS),
    ours: str | None = None,
    nanogpt: str | None = None,
    accelerator: Accelerator = "cpu",
    repeats: int = 1,
) -> None:
    """lit_gpt, nanoGPT's recipe, the classic loop and Hugging Face's Trainer, for the same time.

    Args:
        options: shared by all benchmarks.
        seconds: of each process, from its start to its end.
        sides: who takes part.
        ours: options of lit_gpt's train.py; default: --budget with these seconds.
        nanogpt: folder of a checkout of nanoGPT, which then takes part too.
        accelerator: auto, cpu, gpu, cuda or mps; all sides use it.
        repeats: how often each side runs; the run with the median result is shown.
    """
    at_least_one(seconds=seconds, repeats=repeats)
    check_checkout(nanogpt)
    names = check_sides(sides)
    text = read_text(options.path)
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 ({error.reason})", field="path", value=options.path) from error
    if len(text) < LEAST:
        problem = f"too short: {len(text):,} bytes, and a race needs {LEAST:,}"
        raise UserError(problem, field="path", value=options.path)
    device = find_device(accelerator).type
    argv = shlex.split(ours) if ours is not None else [f"--budget={seconds:g}s"]
    found: dict[str, list[Result]] = {}
    for _ in range(repeats):
        for name in [*(["checkout"] if nanogpt else []), *names]:
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                write_texts(text, folder)
                if name == "checkout":
                    assert nanogpt is not None
                    result = run_checkout(folder, seconds, device, nanogpt)
                else:
                    result = run_side(name, folder, seconds, device, argv)
            print(
                f"{result.name}: {result.bits_per_byte:.3f} after {result.seconds:.1f} s",
                flush=True,
            )
            found.setdefault(name, []).append(result)
    report_race([middle(runs) for runs in found.values()], options, seconds, device, argv)


def middle(runs: list[Result]) -> Result:
    """The run with the median result."""
    level = median_low(run.bits_per_byte for run in runs)
    return next(run for run in runs if run.bits_per_byte == level)


def report_race(
    results: list[Result], options: Options, seconds: float, device: str, argv: list[str]
) -> None:
    """The table, the picture and the JSON."""
    compare(results)
    show(table_of(results))
    note = (
        f"{options.path}, {seconds:g} s each on {device}. Validation: the last tenth of the bytes, "
        "each token predicted once, evaluated after the race from snapshots of the weights; "
        f"lit_gpt's own evaluations and final loss count. lit_gpt: {shlex.join(argv)}"
    )
    save("race", [asdict(result) for result in results], options.out, note)
    path = Path(options.out, "race.svg")
    draw(results, path)
    print(f"Written to {path}")
