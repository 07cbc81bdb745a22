"""Writing a store: the shards of one task, its mark, and the index once all tasks are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from lit_gpt import storage
from lit_gpt.errors import UserError
from lit_gpt.store.index import Index, Shard, pack_shard
from lit_gpt.store.objects import Objects
from lit_gpt.store.plan import Plan, Sizes, share
from lit_gpt.store.splits import fingerprint_of
from lit_gpt.text.cutting import cut_safely
from lit_gpt.text.encoding_pool import batches, encode_in_order
from lit_gpt.text.files import Reader, TextFiles
from lit_gpt.text.finding import INDEX
from lit_gpt.text.token_file import CorpusInfo, smallest_dtype
from lit_gpt.text.tokenizer import Tokenizer

MARKS = "tasks"  # a folder of objects, one for each task that is done
NUMBERS = [field.name for field in fields(CorpusInfo) if field.name != "fingerprint"]


@dataclass(frozen=True)
class Mark:
    """That a task is done: what it wrote."""

    shards: list[Shard]
    info: CorpusInfo  # of its part of the text


def mark_name(task: int, tasks: int) -> str:
    return f"{MARKS}/{task:06}-of-{tasks:06}.json"


def read_mark(objects: Objects, name: str) -> Mark | None:
    """None: the task isn't done, or its mark is damaged, so that it is done again."""
    content = objects.find(name)
    if content is None:
        return None
    try:
        value = storage.parse_json(content.decode(), name)
        return Mark([Shard(**s) for s in value["shards"]], CorpusInfo(**value["info"]))
    except (ValueError, LookupError, TypeError):
        return None


def encode(
    reader: Iterable[str | None], tokenizer: Tokenizer, totals: Counter[str]
) -> Iterator[np.ndarray]:
    """Ids of a text, in pieces (N,) uint32; counts characters and words that were cut."""
    cuts: Counter[str] = Counter()
    parts = batches(cut_safely(reader, tokenizer.pattern, cuts))
    with closing(encode_in_order(tokenizer.encode_parts, parts)) as encoded:
        for texts, ids in encoded:
            totals["num_characters"] += sum(len(text or "") for text in texts)
            yield ids
    totals["cut_words"] += cuts["words"]


def in_shards(pieces: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same ids in arrays of `size`, the last one shorter."""
    held: list[np.ndarray] = []
    num_held = 0
    for piece in pieces:
        held.append(piece)
        num_held += len(piece)
        if num_held >= size:
            ids = np.concatenate(held)
            whole = num_held - num_held % size
            yield from np.split(ids[:whole], whole // size)
            held = [ids[whole:].copy()]
            num_held -= whole
    if num_held:
        yield np.concatenate(held)


def ended(
    texts: Iterable[str | None], ends_files: bool, totals: Counter[str]
) -> Iterator[str | None]:
    """A plain text that others follow: with its end, or with a line end if it lacks one."""
    last = "\n"
    for text in texts:
        last = text or last
        yield text
    if ends_files:
        totals["file_ends"] += 1
        yield None
    elif not last.endswith("\n"):
        totals["added_line_ends"] += 1
        yield "\n"


def write_task(objects: Objects, files: TextFiles, sizes: Sizes, plan: Plan, task: int) -> None:
    """Encodes one task's files into shards; a task that is done is not done again.

    Raises:
        UserError: text that can't be read, or shards that can't be written.
    """
    name = mark_name(task, plan.tasks)
    if read_mark(objects, name):
        print(f"Task {task} of {plan.tasks} was done before")
        return
    totals: Counter[str] = Counter()
    shards: list[Shard] = []
    mine = share(sizes, task, plan.tasks)
    if any(path.stat().st_size for path in mine):
        reader = Reader(replace(files, path=[str(path) for path in mine]), needs_fields=False)
        reader.has_documents = plan.has_documents  # of all tasks' files
        reader.ends_files = plan.tokenizer.end_of_text is not None
        reader.task = "Encoding the text"
        last = [path for path, size in sizes if size][-1]
        texts: Iterable[str | None] = reader
        if not (plan.has_documents or last in mine):
            texts = ended(reader, reader.ends_files, totals)
        shards = list(_write_shards(objects, texts, plan, task, totals))
        totals.update(reader.counts)
    mark = Mark(shards, CorpusInfo("", **{n: totals[n] for n in NUMBERS}))
    objects.put(name, storage.dump_json(asdict(mark)).encode())


def _write_shards(
    objects: Objects,
    texts: Iterable[str | None],
    plan: Plan,
    task: int,
    totals: Counter[str],
) -> Iterator[Shard]:
    tokenizer = plan.tokenizer
    lengths = tokenizer.token_lengths()
    dtype = smallest_dtype(tokenizer)
    pieces = (ids.astype(dtype) for ids in encode(texts, tokenizer, totals))
    for number, ids in enumerate(in_shards(pieces, plan.shard_tokens)):
        content, checksum = pack_shard(ids)
        shard = Shard(f"shards/{task:06}-{number:06}.bin", len(ids), checksum)
        objects.put(shard.name, content)
        totals["num_tokens"] += len(ids)
        totals["num_bytes"] += int(lengths[ids].sum())
        print(f"{shard.name}: {shard.num_tokens:,} tokens", flush=True)
        yield shard


def finish(objects: Objects, plan: Plan) -> Index | None:
    """Writes the index if all tasks are done, each in its place; None: some aren't.

    Of two tasks that finish together, both find all done, and both write the same.
    """
    names = [mark_name(task, plan.tasks) for task in range(plan.tasks)]
    done = objects.names(MARKS).intersection(names)
    marks = [read_mark(objects, name) for name in names] if len(done) == plan.tasks else []
    whole = [mark for mark in marks if mark]
    if len(whole) < plan.tasks:
        print(f"{len(done):,} of {plan.tasks:,} tasks are done; the last one writes the index")
        return None
    shards = [shard for mark in whole for shard in mark.shards]
    if not shards:
        raise UserError("no text in `path`", hint="name files that have some")
    tokenizer = plan.tokenizer
    numbers = {name: sum(getattr(mark.info, name) or 0 for mark in whole) for name in NUMBERS}
    fingerprint = fingerprint_of([shard.checksum for shard in shards], tokenizer)
    index = Index(
        shards,
        smallest_dtype(tokenizer).name,
        plan.block_tokens,
        plan.tokenizer_state,
        plan.tokenizer_option,
        CorpusInfo(fingerprint, **numbers),
    )
    if not objects.create(INDEX, index.to_json()):
        problem = "another process wrote another index here meanwhile"
        raise UserError(problem, field="out", value=objects.place, hint="name another place")
    return index
