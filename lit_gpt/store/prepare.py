"""The prepare command: text files to a token store, by one process or many."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lit_gpt.command import call, command_line, option
from lit_gpt.errors import UserError, check_least
from lit_gpt.store.objects import Objects
from lit_gpt.store.plan import make_plan, sizes_of
from lit_gpt.store.writing import finish, write_task
from lit_gpt.text.files import TextFiles

TASK = re.compile("([0-9]{1,6})/([0-9]{1,6})")


@dataclass(frozen=True)
class StoreText:
    """The text to encode, and how.

    Args:
        path: text file, folder of them, glob, or list of such.
        exclude: files of folders, globs and archives to leave out, by glob.
        encoding: of the files.
        text_field: field or column that holds the documents, or a list of them.
        tsv_quotes: true if fields of .tsv files may be in double quotes.
        tokenizer: as in training, but with all its tokens: cl100k_base, bytes, bpe:N, chars, or a
            .tiktoken or SentencePiece .model file.
    """

    path: str | list[str]
    exclude: str | list[str] | None = None
    encoding: str = "utf-8"
    text_field: str | list[str] | None = None
    tsv_quotes: bool = False
    tokenizer: str = "cl100k_base"

    @property
    def files(self) -> TextFiles:
        return TextFiles(self.path, self.exclude, self.encoding, self.text_field, self.tsv_quotes)


def prepare(
    *,
    data: StoreText,
    out: str,
    task: str | None = None,
    shard_tokens: int = 1 << 23,
    block_tokens: int = 1 << 20,
) -> None:
    """Encode a text once, into a token store that training reads part by part.

    Args:
        data: the text.
        out: folder or address of the store: DIR, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
        task: this process's part of the work, as 3/64: the fourth of 64 tasks, in any order. By
            default, the processes that torchrun or srun started divide it.
        shard_tokens: tokens per shard.
        block_tokens: tokens that training fetches and mixes as a whole.

    Raises:
        UserError: a text, tokenizer or place that can't be used.
    """
    check_least(1, shard_tokens=shard_tokens, block_tokens=block_tokens)
    number, tasks = parse_task(task) if task else launched_task()
    objects = Objects(out, field="out")
    files = data.files
    sizes = sizes_of(files)
    plan = make_plan(objects, files, sizes, data.tokenizer, tasks, shard_tokens, block_tokens)
    write_task(objects, files, sizes, plan, number)
    if index := finish(objects, plan):
        info = index.info
        print(f"Token store: {out}")
        print(f"Text length: {info.num_characters:,} characters, {info.num_bytes:,} bytes")
        for name, count in info.changes:
            print(f"{name}: {count:,}")
        shards = f"{len(index.shards):,} of up to {shard_tokens:,} tokens, {index.dtype}"
        print(f"Total: {info.num_tokens:,} tokens\nShards: {shards}")
        print(f"Vocabulary: {index.tokenizer.vocab_size:,} tokens ({data.tokenizer})")
        print(f"Train on it:  {command_line('train', '--data.path', out)}")


def launched_task() -> tuple[int, int]:
    """This process's number, and how many torchrun or srun started; see distributed/launch.py."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"])
    if "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    return 0, 1


def parse_task(task: str) -> tuple[int, int]:
    """`3/64` as 3 and 64."""
    found = TASK.fullmatch(task)
    if found and int(found[1]) < int(found[2]):
        return int(found[1]), int(found[2])
    hint = "the tasks of 64 are 0/64 to 63/64"
    raise UserError(
        "must be a number, a slash and how many tasks there are",
        field="task",
        value=task,
        hint=hint,
    )


def option_name(field: str) -> str:
    """A field as the command line spells it; the text's fields are in the group `data`."""
    return option(f"data.{field}" if field in StoreText.__dataclass_fields__ else field)


def main(argv: list[str]) -> int:
    call(prepare, argv, groups=[StoreText])
    return 0
