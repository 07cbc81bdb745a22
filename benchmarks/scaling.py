"""Long texts and many files: time and memory to tokenize them, and to start on them again.

Also the process that is measured: scaling.py ROOT PATH CACHE loads a text with the lit_gpt in ROOT.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import lit_gpt.data  # noqa: F401 - with torch and Lightning, as in training
    from lit_gpt.text.corpus import load_corpus
    from lit_gpt.text.files import TextFiles
    from lit_gpt.text.vocabularies import Vocabulary

    def memory_mb(name: str) -> float:
        """A line of /proc/self/status, which only Linux has."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition(f"{name}:")[2].split()[0]) * 1024 / 1e6

    imports = memory_mb("VmRSS")
    wall = time.perf_counter()
    cpu = time.process_time()
    text = TextFiles(sys.argv[2], cache=sys.argv[3])
    corpus = load_corpus(text, Vocabulary("cl100k_base", compact=True))
    measured = {
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "imports_mb": imports,
        "peak_mb": memory_mb("VmHWM"),
        "tokens": len(corpus.tokens),
    }
    print(json.dumps(measured))
    sys.exit()

from rich.table import Table

from benchmarks.measure import ROOT, Options, at_least_one, read_text, run_script, save, show
from lit_gpt.errors import UserError, check_choice

SETTLED = 2.5  # seconds after which the times of a file tell whether it was changed
FILE = 1000  # bytes of each of many files


@dataclass
class Row:
    """One text, with one version of lit_gpt.

    Args:
        text: what it is.
        version: the folder of the version.
        seconds: to find, read and encode the text.
        cpu: the same in seconds of all cores together.
        imports_mb: memory before that: Python, torch, Lightning and lit_gpt.
        peak_mb: peak memory, with that; no other process is started.
        tokens: in the text.
        again: seconds of CPU to start on the encoded text, the second time.
    """

    text: str
    version: str
    seconds: float
    cpu: float
    imports_mb: float
    peak_mb: float
    tokens: int
    again: float


def scaling(
    parts: list[str],
    options: Options,
    megabytes: str = "10,100,1000",
    number: int = 50_000,
    before: str | None = None,
) -> None:
    """Time and memory from text to tokens, of long texts and of many files.

    Args:
        parts: text, files or both.
        options: shared by all benchmarks; each text is measured once.
        megabytes: lengths of the text, to which --path is repeated.
        number: of files of 1,000 bytes.
        before: folder of another version of lit_gpt to compare with.
    """
    rows: list[Row] = []
    versions = [str(ROOT)] if before is None else [before, str(ROOT)]
    at_least_one(number=number)
    for part in parts:
        check_choice(("text", "files"), parts=part)
    for part in parts:
        sizes = [number * FILE] if part == "files" else _sizes(megabytes)
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "text"
                text = f"{size / 1e6:,.0f} MB"
                if part == "files":
                    text = f"{number:,} files"
                    _write_files(path, read_text(options.path), number)
                else:
                    _write(path, read_text(options.path), size)
                time.sleep(SETTLED)
                rows += [measure(version, text, path, Path(folder)) for version in versions]
    table = Table("text", "version", "s", "s of CPU", "peak MB", "imports MB", "again, s of CPU")
    for row in rows:
        times = (f"{row.seconds:,.1f}", f"{row.cpu:,.1f}")
        memory = (f"{row.peak_mb:,.0f}", f"{row.imports_mb:,.0f}")
        table.add_row(row.text, row.version, *times, *memory, f"{row.again:,.2f}")
    show(table)
    save("scaling", [asdict(row) for row in rows], options.out)


def _sizes(megabytes: str) -> list[int]:
    try:
        sizes = [int(float(size) * 1e6) for size in megabytes.split(",")]
    except ValueError as error:
        problem = "must be numbers, with commas between them"
        raise UserError(problem, field="megabytes", value=megabytes) from error
    at_least_one(megabytes=min(sizes))
    return sizes


def _write(path: Path, text: bytes, size: int) -> None:
    """The text, repeated to so many bytes, less the part of a character at the end."""
    with path.open("wb") as file:
        for at in range(0, size, len(text)):
            file.write(text[: size - at].decode("utf-8", "ignore").encode())


def _write_files(folder: Path, text: bytes, number: int) -> None:
    """Files of FILE bytes from all over the text, a thousand in each folder."""
    characters = text.decode()
    for i in range(number):
        at = i * 577 % max(len(characters) - FILE, 1)
        place = folder / f"{i // 1000:04}" / f"{i:07}.txt"
        place.parent.mkdir(parents=True, exist_ok=True)
        content = characters[at : at + FILE].encode()[:FILE].decode("utf-8", "ignore")
        place.write_text(content, encoding="utf-8", newline="")


def measure(version: str, text: str, path: Path, folder: Path) -> Row:
    """Loads a text three times: it is encoded, its encoding is checked, it is known."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        arguments = (version, str(path), cache)
        first = run_script("benchmarks/scaling.py", *arguments).result()
        time.sleep(SETTLED)
        run_script("benchmarks/scaling.py", *arguments)
        again = run_script("benchmarks/scaling.py", *arguments).result()["cpu"]
    return Row(text, version, again=again, **first)
