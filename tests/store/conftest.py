"""Small stores, on the disk and on an S3 server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.__main__ import main
from tests.conftest import WORDS
from tests.store.s3_server import ENVIRONMENT, Proxy, make_bucket, s3_server

SIZES = ("--shard_tokens=3000", "--block_tokens=500", "--data.tokenizer=bytes")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five plain texts of 1,000 to 5,000 characters; none but the last ends a line."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for i in range(5):
        lines = [" ".join(rng.choices(WORDS.split(), k=8)) + "." for _ in range(30 * (i + 1))]
        (folder / f"{i}.txt").write_text("\n".join(lines) + "\n" * (i == 4), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def ids(texts: Path) -> np.ndarray:
    """The tokens of a store of `texts` with the tokenizer `bytes`, found without the package.

    256 is the end of text.
    """
    contents = [path.read_bytes() for path in sorted(texts.iterdir())]
    return np.array([i for content in contents for i in (*content, 256)][:-1])


@pytest.fixture(scope="session")
def store(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of `texts` in a folder, by three tasks: shards of 3,000 tokens, blocks of 500."""
    folder = tmp_path_factory.mktemp("store") / "store"
    for task in (2, 0, 1):
        argv = [f"--data.path={texts}", f"--out={folder}", f"--task={task}/3", *SIZES]
        assert main(["prepare", *argv]) == 0
    return folder


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    with s3_server() as port:
        make_bucket(port, "bucket")
        yield port


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """An S3 server with an empty bucket `bucket`, named in the environment."""
    proxy = Proxy(s3_port)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT": proxy.address}.items():
        monkeypatch.setenv(name, value)
    yield proxy
    proxy.server.shutdown()


@pytest.fixture
def prepare(capfd: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """`prepare(path, out, "--task=0/2")`: the command; returns its status, output and errors."""

    def run(path: object, out: object, *options: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = main(["prepare", f"--data.path={path}", f"--out={out}", *SIZES, *options])
        return status, *capfd.readouterr()

    return run
