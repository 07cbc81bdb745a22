"""The export command: turns a checkpoint into a complete, checked Hugging Face folder."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint import Checkpoint
from lit_gpt.command import call, option
from lit_gpt.errors import UserError
from lit_gpt.generation.language_model import find_checkpoint
from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface.architectures import hf_weights, layout_of
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.export_check import check_export
from lit_gpt.huggingface.model_card import model_card, quoted
from lit_gpt.huggingface.tokenizer import (
    import_transformers,
    special_ids,
    to_hf,
    tokenizer_config,
)
from lit_gpt.model import GPT
from lit_gpt.storage import temporary_folder
from lit_gpt.text.corpus import Corpus, load_corpus
from lit_gpt.text.files import TextFiles
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import Vocabulary

NO_END = (
    "Missing: the model has no end-of-text token, and with it bos, eos and pad, without which "
    "TRL, lm-evaluation-harness and CTranslate2 stop; models trained by this release have one"
)
NAME_ANOTHER = "use `path` to name any text to compare the export on"


def refused(out: Path, problem: str, hint: str) -> UserError:
    return UserError(problem, field="out", value=str(out), hint=hint)


def check_is_free(folder: Path) -> None:
    """Refuses a folder that holds anything."""
    if folder.is_symlink() or os.path.ismount(folder):
        raise refused(folder, "is a link or a mounted disk", "name a folder in it")
    with suppress(OSError):
        if folder.name and folder.is_dir() and not any(folder.iterdir()):
            return
    if os.path.lexists(folder):
        raise refused(folder, "already exists", "name a new or an empty folder")


def load_text(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    cache: Path,
    path: str | None,
    given: dict[str, Any],
) -> Corpus:
    """Encodes the text at `path`, or else that of the checkpoint's run.

    Args:
        given: options of the text, each None if it is to be the default, or that of the run for
            the run's own text.

    Raises:
        UserError: the text can't be used. If it is the run's, the hint says that any other will do.
    """
    used: dict[str, Any] = {"path": path}
    data = {} if path else checkpoint.data_hyperparameters
    if not path:
        names = ("path", "exclude", "encoding", "text_field")
        used = {name: value for name in names if (value := as_option(data.get(name)))}
        if "path" not in used:
            raise UserError("the checkpoint does not name its training text", hint=NAME_ANOTHER)
        used["tsv_quotes"] = data.get("tsv_quotes", True) is True  # as release 0.1.0 read them
    used |= {name: value for name, value in given.items() if value}
    needs_fields = not data.get("val_path")  # which may have them instead
    try:
        text = TextFiles(cache=str(cache), **used)
        return load_corpus(text, Vocabulary(tokenizer), needs_fields=needs_fields)
    except UserError as error:
        if not path and error.field != "cache":
            error.hint = NAME_ANOTHER
        raise


def as_option(value: Any) -> str | list[str] | None:
    """A text or a list of them; None for whatever else a stranger's checkpoint has."""
    parts = value if isinstance(value, list) else [value]
    return value if all(isinstance(part, str) for part in parts) else None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `out` at the end, or removed if anything fails.

    Raises:
        UserError: it can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(out.parent) as work:
            folder = work / out.name
            folder.mkdir()
            yield folder
            check_is_free(out)
            if out.is_dir():
                out.rmdir()  # it is empty; not every system can rename a folder over it
            folder.rename(out)
    except OSError as error:
        if error.strerror is None:  # not from the file system
            raise
        problem = f"can't be written ({error.strerror})"
        raise refused(out, problem, "use another folder") from error


def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Writes all files but the model card."""
    from safetensors.torch import save

    ids = {f"{role}_token_id": i for role, i in special_ids(tokenizer).items()}
    context_length = model.config.context_length
    weights = save(hf_weights(model), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    contents = {
        "config": hf_config(model.config) | ids,
        "tokenizer_config": tokenizer_config(tokenizer, context_length),
        "generation_config": {
            "do_sample": True,
            **asdict(Sampling()),
            "top_k": 0,  # all; without it, some versions take 50
            **ids,
        },
    }
    for name, content in contents.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer.json").write_text(to_hf(tokenizer).to_str(pretty=True), encoding="utf-8")


def example(corpus: Corpus) -> str:
    """A prompt: the beginning of the text."""
    text = corpus.tokenizer.decode(corpus.tokens[:64]).replace("\ufffd", "")
    return text.split("\n")[0].strip()[:4] or "\n"


def export(
    out: str,
    ckpt_path: str | None = None,
    logs: str = "logs",
    data_path: str | None = None,
    encoding: str | None = None,
    text_field: str | list[str] | None = None,
) -> None:
    """Write a folder that transformers loads, after checking that it computes the same.

    Args:
        out: folder to create; it may exist if it is empty.
        ckpt_path: checkpoint, run's folder, best or last; default: the newest run's best.
        logs: where to look for the newest run.
        data_path: text to compare the export on; default: the run's own.
        encoding: of that text; default: utf-8, or for the run's own text as in the run.
        text_field: of its documents, or a list of them; default: none, or for the run's own text
            as in the run.

    Raises:
        UserError: a checkpoint, text or folder that can't be used, or a comparison that failed.
    """
    import_transformers()
    target = Path(os.path.expanduser(out))
    check_is_free(target)
    checkpoint = Checkpoint.read(find_checkpoint(ckpt_path, logs))
    model, tokenizer = checkpoint.build()
    label = layout_of(model.config).label
    given = {"encoding": encoding, "text_field": text_field}
    fraction = checkpoint.data_hyperparameters.get("train_fraction")
    if not (isinstance(fraction, float) and 0 < fraction < 1):
        fraction = 0.9
    with new_folder(target) as folder:
        corpus = load_text(checkpoint, tokenizer, folder.parent / "tokens", data_path, given)
        write_folder(folder, model, tokenizer)
        findings = check_export(folder, model, corpus, fraction)
        is_training_text = corpus.info.fingerprint == checkpoint.corpus_info.get("fingerprint")
        # A stranger's checkpoint may name any file of the user's: show none of its text.
        prompt = example(corpus) if is_training_text else "\n"
        card = model_card(
            target.name, checkpoint, model, tokenizer, findings, prompt, is_training_text
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    new_tokens = max(1, min(64, model.config.context_length - 16))  # the prompt takes the rest
    pipeline = f'pipeline("text-generation", {quoted(str(target))})'
    pipeline += f"({quoted(prompt)}, max_new_tokens={new_tokens})"
    code = f"from transformers import pipeline; print({pipeline})"
    print(*findings, sep="\n")
    if tokenizer.end_of_text is None:
        print(NO_END)
    print(f"Exported as {label}: {target}")
    print(f"Use it:  python -c {shlex.quote(code)}")


def option_name(field: str) -> str:
    """A field as the command line spells it; the text's fields are those of the data module."""
    if field == "style":
        return "--model.style"  # of the training command
    return option({"path": "data_path", "cache": "out"}.get(field, field))


def main(argv: list[str]) -> int:
    call(export, argv)
    return 0
