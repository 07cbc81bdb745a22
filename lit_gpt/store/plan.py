"""What all tasks that write a store agree on: the tokenizer, and which files each of them encodes.

The first task that gets there writes it, by a conditional put; the others read it. So all use one
tokenizer, and a task with other options or another text is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.store.objects import Objects
from lit_gpt.text import archives, bpe
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.documents import format_of
from lit_gpt.text.files import Reader, TextFiles, holds_conversations, no_fields
from lit_gpt.text.finding import INDEX, PLAN, find_files
from lit_gpt.text.manifest import Known
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import PATTERN, Vocabulary, bpe_size

SAMPLED_FILES = 64  # that a vocabulary is trained on, spread over the text
TRAINING_SHARE = 0.9  # of the text, from the front, that a vocabulary is trained on

Sizes = list[tuple[Path, int]]  # the files of a text and their bytes


@dataclass(frozen=True)
class Plan:
    """Plain data; `compared` is what a task must have in common with the others."""

    tokenizer_option: str
    tasks: int
    shard_tokens: int
    block_tokens: int
    text: dict[str, Any]
    has_documents: bool
    tokenizer_state: dict[str, str]

    @property
    def compared(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "tokenizer_state"}

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_dict(self.tokenizer_state)
        if self.tokenizer_option == "cl100k_base" or bpe_size(self.tokenizer_option):
            tokenizer.use_splintr()  # as where they are loaded and trained
        return tokenizer


def sizes_of(files: TextFiles) -> Sizes:
    """The files and their bytes.

    Raises:
        UserError: there are none.
    """
    found = find_files(files.path, files.exclude)
    return [(path, path.stat().st_size) for path in found]


def share(sizes: Sizes, task: int, tasks: int) -> list[Path]:
    """The files of one task: a part of the list of about the same size for each."""
    total = sum(size for _, size in sizes) or 1
    ends = accumulate(size for _, size in sizes)
    middles = ((end - size / 2) / total for end, (_, size) in zip(ends, sizes, strict=True))
    pairs = zip(middles, sizes, strict=True)
    return [path for middle, (path, _) in pairs if min(int(middle * tasks), tasks - 1) == task]


def make_plan(
    objects: Objects,
    files: TextFiles,
    sizes: Sizes,
    tokenizer_option: str,
    tasks: int,
    shard_tokens: int,
    block_tokens: int,
) -> Plan:
    """The plan in this place, or a new one that is written there.

    Raises:
        UserError: there is a finished store, or one that was begun otherwise.
    """
    if tasks > len(sizes):
        problem = f"more tasks than files ({len(sizes):,}): a file is encoded by one task"
        raise UserError(problem, field="task", value=tasks, hint="use fewer, or split the files")
    reader = replace(files, path=[str(path) for path, _ in sizes])
    listed = json.dumps([(str(path), size) for path, size in sizes])
    text = {**asdict(files), "path": hashlib.sha256(listed.encode()).hexdigest()}
    text.pop("cache")
    text.pop("loss_on")
    plan = Plan(
        tokenizer_option, tasks, shard_tokens, block_tokens, text, has_documents(reader), {}
    )
    if files.text_field is not None and not plan.has_documents:
        raise no_fields(files.text_field, "`path`")
    if plan.has_documents and holds_conversations(reader):
        raise UserError(
            "holds conversations, which a token store would cut where its blocks end",
            field="path",
            hint="train on the files themselves, or name a field of text as `text_field`",
        )
    found = objects.find(PLAN)
    if objects.find(INDEX) is not None and (tasks == 1 or found is None):
        problem = "there is a finished token store already"
        raise UserError(problem, field="out", value=objects.place, hint="name another place")
    if found is None:
        tokenizer = load_tokenizer(tokenizer_option, files, sizes)
        plan = replace(plan, tokenizer_state=tokenizer.to_dict())
        if objects.create(PLAN, storage.dump_json(asdict(plan)).encode()):
            return plan
        found = objects.get(PLAN)  # another task was faster
    return check_same(found, plan, objects)


def check_same(content: bytes, plan: Plan, objects: Objects) -> Plan:
    """The plan of another task, which must be for the same store."""
    try:
        written = Plan(**storage.parse_json(content.decode(), PLAN))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"its {PLAN} is damaged", field="out", value=objects.place, hint="name another place"
        ) from error
    if written.compared != plan.compared:
        pairs = zip(written.compared.items(), plan.compared.values(), strict=True)
        names = ", ".join(name for (name, then), now in pairs if then != now)
        raise UserError(
            f"a store was begun here with other options or another text ({names})",
            field="out",
            value=objects.place,
            hint="use those, or name another place",
        )
    return written


def has_documents(files: TextFiles) -> bool:
    """Whether any of the files has documents; only archives are opened."""
    paths = [Path(path) for path in files.path]
    kinds = {path: format_of(path, files.text_field, files.tsv_quotes).kind for path in paths}
    packed = [path for path, kind in kinds.items() if kind in archives.KINDS]
    if any(kind != "text" for path, kind in kinds.items() if path not in packed):
        return True
    some = replace(files, path=[str(path) for path in packed])
    return bool(packed) and Reader(some, needs_fields=False).has_documents


def load_tokenizer(option: str, files: TextFiles, sizes: Sizes) -> Tokenizer:
    """The whole vocabulary; bpe:N and chars are made from a part of the text."""
    vocabulary = Vocabulary(option)
    if vocabulary.trained_size:
        texts = cut_safely(sample(files, sizes), PATTERN)
        train = bpe.load_trainer(vocabulary.trained_size, has_end=True)
        return train(bpe.training_text(texts, bpe.SAMPLE))
    return vocabulary.load(sample(files, sizes))


def sample(files: TextFiles, sizes: Sizes) -> Iterator[str | None]:
    """The beginnings of files spread over the text, of the share that trains.

    At most bpe.SAMPLE bytes, for a vocabulary: more of a text changes little.
    """
    total = sum(size for _, size in sizes) * TRAINING_SHARE
    begins = accumulate((size for _, size in sizes), initial=0)
    training = [
        (path, min(size, int(total - begin)))
        for begin, (path, size) in zip(begins, sizes, strict=False)
        if size and begin < total
    ]
    every = -(-len(training) // SAMPLED_FILES)
    chosen = training[::every]
    for path, size in chosen:
        left = min(size, bpe.SAMPLE // len(chosen))
        unread = Known("", False, {})  # so that no whole file is read for it
        reader = Reader(replace(files, path=str(path)), needs_fields=False, known=unread)
        for text in reader.beginning():
            if text is not None:
                text = text.encode()[:left].decode("utf-8", "ignore")
                left -= len(text.encode())
            yield text
            if left <= 0:
                break
