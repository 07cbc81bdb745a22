"""Encode a text file; print seconds and peak memory as JSON: one side of `run.py tokenize`.

Usage: encode.py PATH encodes with tiktoken in memory; encode.py PATH FOLDER into a token cache.
"""

import json
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from any folder

from lit_gpt.text.corpus import load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.vocabularies import Vocabulary, load_tokenizer


def peak_mb() -> float:
    """The peak memory of this process.

    On Linux, getrusage reports that of the process that started it if that was larger.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e6
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on a Mac


def main(path: str, cache: str | None = None) -> None:
    encoding = load_tokenizer("cl100k_base").encoding
    start = time.perf_counter()
    if cache is None:
        encoding.encode_ordinary(Path(path).read_text(encoding="utf-8"))
    else:
        load_corpus(TextFiles(path, cache=cache), Vocabulary("cl100k_base", compact=True))
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
