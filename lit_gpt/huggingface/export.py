"""Owns the export command: a checkpoint in, a whole and checked Hugging Face folder out."""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lit_gpt.checkpoint import build_model, find_newest, read_checkpoint
from lit_gpt.command import call, option
from lit_gpt.errors import UserError
from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface.architectures import hf_weights, layout_of
from lit_gpt.huggingface.config import hf_config
from lit_gpt.huggingface.export_check import check_export
from lit_gpt.huggingface.model_card import describe_findings, dig, model_card, quoted
from lit_gpt.huggingface.tokenizer import import_transformers, to_hf, tokenizer_config
from lit_gpt.model import GPT
from lit_gpt.storage import UNFINISHED
from lit_gpt.text.corpus import Corpus, TextSource
from lit_gpt.text.tokenizer import Tokenizer

DATA = "datamodule_hyper_parameters"


def refuse_taken(out: Path) -> None:
    if out.is_symlink() or os.path.ismount(out):
        raise UserError(
            "is a link or a mounted disk", field="out", value=str(out), hint="name a folder in it"
        )
    with suppress(OSError):
        if out.name and out.is_dir() and not any(out.iterdir()):
            return
    if os.path.lexists(out):
        raise UserError(
            "already exists", field="out", value=str(out), hint="name a new or an empty folder"
        )


def find_text(
    content: dict[str, Any],
    data_path: str | None,
    data_encoding: str | None,
    data_field: str | None,
) -> TextSource:
    """The text to compare on: the one that is named, or that of the run."""
    path, encoding, field = (dig(content, DATA, n) for n in ("path", "encoding", "text_field"))
    named = isinstance(path, str) or (
        isinstance(path, list) and all(isinstance(part, str) for part in path)
    )
    if not (data_path or named):
        raise UserError(
            "the checkpoint does not name the text it was trained on",
            hint="name any text to compare on with `path`",
        )
    if data_path:  # it is read as itself is, whatever the run's text was
        path, encoding, field = data_path, None, None
    return TextSource(
        path,
        data_encoding or (encoding if isinstance(encoding, str) else "utf-8"),
        data_field or (field if isinstance(field, str) else None),
    )


def open_text(source: TextSource, tokenizer: Tokenizer, cache: Path) -> Corpus:
    try:
        return source.load(tokenizer, str(cache))
    except UserError as error:
        raise UserError(
            error.problem,
            field=error.field,
            value=error.value,
            hint="the export is compared on a text: name any with `path`",
        ) from error


def fill(
    work: Path,
    out: Path,
    path: Path,
    content: dict[str, Any],
    model: GPT,
    tokenizer: Tokenizer,
    source: TextSource,
) -> list[str]:
    """Makes the folder below `work` and moves it to `out`; what there is to say of it."""
    folder = work / out.name
    corpus = open_text(source, tokenizer, work / "tokens")
    write_folder(folder, model, tokenizer)
    fraction = dig(content, DATA, "train_fraction")
    fraction = fraction if isinstance(fraction, float) and 0 < fraction < 1 else 0.9
    findings = check_export(folder, model, source, corpus, fraction)
    own = corpus.info.fingerprint == dig(content, "corpus", "fingerprint")
    prompt = example(corpus) if own else "\n"  # of no file that a stranger's checkpoint names
    card = model_card(out.name, path, content, model, tokenizer, findings, prompt, own)
    (folder / "README.md").write_text(card, encoding="utf-8")
    refuse_taken(out)
    if out.is_dir():
        out.rmdir()  # it is empty; not everywhere can it be written over
    folder.rename(out)
    made = f'pipeline("text-generation", {quoted(str(out))})({quoted(prompt)})'
    use = f"from transformers import pipeline; print({made})"
    return [
        *describe_findings(findings),
        f"Exported as {layout_of(model.config).label}: {out}",
        f"Use it:  python -c {shlex.quote(use)}",
    ]


def example(corpus: Corpus) -> str:
    """A prompt: how the text begins."""
    begun = corpus.tokenizer.decode(corpus.tokens[:64]).replace("\ufffd", "").split("\n")[0]
    return begun.strip()[:4] or "\n"


def write_folder(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """All files but the model card."""
    from safetensors.torch import save_file

    folder.mkdir()
    end, context = tokenizer.end_of_text, model.config.context_length
    weights = folder / "model.safetensors"
    save_file(hf_weights(model), weights, metadata={"format": "pt"})
    to_hf(tokenizer).save(str(folder / "tokenizer.json"))
    sampling = asdict(Sampling()) | {"top_k": 0}  # all; absent, some versions take 50
    generation = {"do_sample": True, **sampling, "max_length": context}
    for name, values in {
        "config": hf_config(model.config, end),
        "tokenizer_config": tokenizer_config(tokenizer, context),
        "generation_config": generation | {"bos_token_id": end, "eos_token_id": end},
    }.items():
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    weights.chmod((folder / "config.json").stat().st_mode)  # safetensors writes for its user only


def export(
    out: str,
    ckpt_path: str | None = None,
    logs: str = "logs",
    data_path: str | None = None,
    encoding: str | None = None,
    text_field: str | None = None,
) -> None:
    """Write a folder that transformers loads, after checking that it computes the same.

    Args:
        out: the folder to create; an existing one must be empty.
        ckpt_path: the checkpoint to export; default: the newest run's best.
        logs: where to look for the newest run.
        data_path: text to compare on; default: the one the model was trained on.
        encoding: of that text; default: utf-8, or for the run's own text what the run used.
        text_field: of that text's documents; default: none, or what the run used.

    Raises:
        UserError: a checkpoint, text or folder that can't be used, or a comparison that failed.
    """
    import_transformers()
    folder = Path(os.path.expanduser(out))
    refuse_taken(folder)
    path = Path(os.path.expanduser(ckpt_path or find_newest(logs)))
    content = read_checkpoint(path)
    model, tokenizer = build_model(content, path)
    layout_of(model.config)
    source = find_text(content, data_path, encoding, text_field)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(UNFINISHED, f".{folder.name}-", folder.parent) as work:
            lines = fill(Path(work), folder, path, content, model, tokenizer, source)
    except Exception as error:
        told = re.search(r"([^:]+) \(os error \d+\)", str(error))  # by safetensors and tokenizers
        reason = getattr(error, "strerror", None) or (told and told[1].strip())
        if not reason:
            raise
        raise UserError(f"cannot write {folder}: {reason}", hint="choose another `out`") from error
    print(*lines, sep="\n")


def option_name(field: str) -> str:
    """A field as the command line spells it; the text's fields are those of the data module."""
    return option({"path": "data_path", "cache": "out"}.get(field, field))


def main(argv: list[str]) -> int:
    call(export, argv)
    return 0
