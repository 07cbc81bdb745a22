"""Checkpoint files: enough by themselves, written whole or not at all, never run as code."""

from __future__ import annotations

import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import zipfile
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_gpt.checkpoint import (
    RESUME_KEYS,
    Checkpoint,
    Contents,
    load_checkpoint,
    read_checkpoint,
)
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text.tokenizer import Tokenizer
from lit_gpt.text.vocabularies import load_tokenizer
from tests.conftest import limited_memory, write_text
from tests.small_run import fit


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, GPT, Tokenizer]:
    """A checkpoint, and the model and tokenizer that it was saved from."""
    folder = tmp_path_factory.mktemp("trained")
    save = ModelCheckpoint(folder, "last", every_n_train_steps=6)
    trainer = fit(write_text(folder / "text.txt"), folder, [save], style="modern", num_kv_heads=1)
    return folder / "last.ckpt", trainer.model.gpt, trainer.datamodule.tokenizer


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """The file alone, without its text, cache or configuration."""
    return Path(shutil.copy(saved[0], tmp_path / "last.ckpt"))


def test_one_file_is_enough(checkpoint, saved):
    """Model and tokenizer come back exactly."""
    _, gpt, tokenizer = saved
    model, loaded = load_checkpoint(checkpoint)
    assert loaded == tokenizer
    assert model.config == gpt.config
    assert not model.training
    weights = gpt.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_it_holds_only_plain_data_under_the_keys_of_the_schema(checkpoint):
    content = torch.load(checkpoint, weights_only=True)  # fails on anything else
    assert set(content) <= Contents.__annotations__.keys()
    assert set(content) >= RESUME_KEYS.keys()
    assert all(isinstance(content[key], kind) for key, kind in RESUME_KEYS.items())
    assert content["gpt"]["style"] == "modern"
    assert set(content["tokenizer"]) == {
        *("name", "pattern", "vocabulary", "end_of_text", "end_is_used")
    }


def test_what_it_says_of_its_run(checkpoint):
    read = Checkpoint.read(checkpoint)
    assert read.path == checkpoint
    assert (read.global_step, read.skipped_steps) == (6, 0)
    assert read.gpt_config.num_kv_heads == 1
    assert read.hyperparameters["learning_rate"] == 1e-3
    assert read.data_hyperparameters["batch_size"] == 2
    assert read.trainer_settings == {
        "accumulate_grad_batches": 1,
        "gradient_clip_val": None,
        "precision": "32-true",
        "max_steps": 6,
        "world_size": 1,
    }
    assert read.corpus_info["num_tokens"] > 1000
    assert read.has_tokenizer(read.tokenizer)
    assert len(read.optimizer_state["state"]) == len(read.weights) - 1  # tied: one matrix twice
    small = read.without_tensors()
    assert not {"state_dict", "optimizer_states"} & set(small.contents)
    assert small.gpt_config == read.gpt_config


@pytest.mark.parametrize(
    "rubbish", [None, 3, "x", [1], {"StepLines": 1}, {"StepLines": {"best": 3}}]
)
def test_what_an_odd_file_says_is_empty(rubbish):
    keys = ("hyper_parameters", "datamodule_hyper_parameters", "trainer", "corpus", "callbacks")
    contents = dict.fromkeys(keys, rubbish) | {"global_step": "many"}
    odd = Checkpoint(Path("odd.ckpt"), contents)
    assert odd.global_step is None
    assert odd.best_evaluation == {}
    if not isinstance(rubbish, dict):
        assert odd.hyperparameters == odd.trainer_settings == odd.corpus_info == {}


class Call:
    """Pickled as a call."""

    def __init__(self, function, *args) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path):
    sprung, path = tmp_path / "sprung", tmp_path / "trap.ckpt"
    touch = f"open({str(sprung)!r}, 'w')"
    for trap in (
        Call(os.mkdir, str(sprung)),
        Call(os.system, f"touch {sprung}"),
        Call(subprocess.run, ["touch", str(sprung)]),
        Call(eval, touch),
        Call(exec, touch),
        Call(open, str(sprung), "w"),
        Call(torch.save, {}, str(sprung)),
        Call(torch.hub.load_state_dict_from_url, "file:///" + str(sprung)),
        Call(getattr, Call(__import__, "os"), "system"),
        Call(runpy.run_path, str(sprung)),
        Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(sprung)))),
        Call(bytearray, 10**13),
    ):
        for content in (trap, {"state_dict": trap}, read_checkpoint(checkpoint) | {"gpt": trap}):
            torch.save(content, path)
            assert refused(path, path.read_bytes())
            torch.save(content, path, _use_new_zipfile_serialization=False)
            assert refused(path, path.read_bytes())
            assert refused(path, pickle.dumps(content))
            repack(checkpoint, path, zipfile.ZIP_STORED, data_pkl=pickle.dumps(content))
            assert refused(path, path.read_bytes())
    assert not sprung.exists()


def test_the_environment_cannot_switch_the_check_off(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_code_in_a_checkpoint_is_never_run(checkpoint, tmp_path)


def refused(path: Path, content: bytes) -> bool:
    """Whether a file of these bytes is refused, in one line that names it."""
    path.write_bytes(content)
    try:
        load_checkpoint(path)
    except UserError as error:
        return path.name in str(error)
    return False


def test_a_file_truncated_anywhere_is_refused(checkpoint, tmp_path):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    sizes = [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(50))]
    assert all(refused(tmp_path / "cut.ckpt", whole[:size]) for size in sizes)


def test_a_flipped_bit_is_found_or_changes_nothing(checkpoint, tmp_path):
    """Parts of an archive that hold no data (padding, time stamps) are in no checksum."""
    whole, rng, path = checkpoint.read_bytes(), random.Random(0), tmp_path / "flipped.ckpt"
    expected, found = read_checkpoint(checkpoint), 0
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        if refused(path, bytes(flipped)):
            found += 1
        else:
            assert equal(read_checkpoint(path), expected)
    assert found >= 180  # 54 parts of a small model leave more gaps than a large one's


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def test_each_flipped_bit_of_the_weights_is_found(checkpoint, tmp_path):
    whole, rng = checkpoint.read_bytes(), random.Random(0)
    with zipfile.ZipFile(checkpoint) as archive:
        parts = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size > 100]
    for part in parts:
        flipped = bytearray(whole)
        name_length, extra = struct.unpack_from("<HH", whole, part.header_offset + 26)
        start = part.header_offset + 30 + name_length + extra
        flipped[start + rng.randrange(part.file_size)] ^= 1 << rng.randrange(8)
        assert refused(tmp_path / "flipped.ckpt", bytes(flipped))


def repack(source: Path, target: Path, compression: int, **parts: bytes) -> None:
    """The same archive, packed otherwise, with other contents for some parts."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2].replace("/", "_").replace(".", "_")
            new.writestr(info.filename, parts.get(name, old.read(info)))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(checkpoint, tmp_path):
    path = tmp_path / "bomb.ckpt"
    repack(checkpoint, path, zipfile.ZIP_STORED)
    load_checkpoint(path)  # repacked as it was: all is well
    repack(checkpoint, path, zipfile.ZIP_DEFLATED, data_0=bytes(300_000_000))
    assert path.stat().st_size < 1_000_000
    with pytest.raises(UserError, match=r"bomb\.ckpt is not a checkpoint") as refusal:
        read_checkpoint(path)
    assert str(refusal.value.__cause__) == "parts that are compressed or overlap"


@pytest.mark.parametrize("shape", [(10**6, 10**6), (1 << 62,), (4, 4)])
def test_a_tensor_whose_shape_lies_is_refused(checkpoint, tmp_path, shape):
    content = read_checkpoint(checkpoint)
    for strides in ((0,) * len(shape), None):
        if strides is None:
            storage = torch.zeros(4).untyped_storage()
            lie = Rebuilt(storage, shape, (1,) * len(shape))
        else:
            lie = torch.zeros(1).as_strided(shape, strides)
        for part in ("state_dict", "optimizer_states", "elsewhere"):
            torch.save(content | {part: {"gpt.embedding.weight": [lie]}}, tmp_path / "lie.ckpt")
            with pytest.raises(
                UserError, match=r"lie\.ckpt is not a checkpoint that can be loaded"
            ):
                read_checkpoint(tmp_path / "lie.ckpt")


class Rebuilt:
    """Pickled as a tensor of any shape on a storage that is smaller."""

    def __init__(self, storage: torch.UntypedStorage, shape: tuple, strides: tuple) -> None:
        typed = torch.storage.TypedStorage(
            wrap_storage=storage, dtype=torch.float32, _internal=True
        )
        self.state = (typed, 0, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.state


def test_a_configuration_larger_than_its_weights_takes_no_memory(checkpoint, tmp_path):
    content = read_checkpoint(checkpoint)
    for name, value, reason in (
        ("vocab_size", 10**12, "1000000000000 rows"),
        ("d_model", 1 << 20, "a configuration larger than its"),
        ("num_blocks", 10**12, "1000000000000 blocks"),
        ("context_length", 10**8, "a context of 100000000 tokens"),
        ("context_length", 10**30, ""),
        ("context_length", 5 * 10**6, "a context of 5000000 tokens"),
        ("num_blocks", 10, "10 blocks"),
        ("hidden_size", 10**9, "a configuration larger than its"),
        ("num_kv_heads", 2, "size mismatch"),
    ):
        changed = content | {"gpt": content["gpt"] | {name: value}}
        torch.save(changed, tmp_path / "large.ckpt")
        words = rf"the parts of .*large\.ckpt do not fit together: .*{reason}"
        with limited_memory(100_000_000), pytest.raises(UserError, match=words) as refusal:
            load_checkpoint(tmp_path / "large.ckpt")
        assert len(str(refusal.value)) < 500


def test_a_rotary_table_is_as_wide_as_its_heads(tmp_path):
    """So that a long context of a wide model loads: here 34 MB, not 4 bytes of d_model each."""
    sizes = {"context_length": 1 << 20, "d_model": 256, "num_blocks": 1, "num_heads": 1}
    gpt = GPT(GPTConfig(257, **sizes, style="modern", head_size=4, hidden_size=8))
    weights = {f"gpt.{name}": weight for name, weight in gpt.state_dict().items()}
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    content = {"gpt": asdict(gpt.config), "tokenizer": tokenizer.to_dict(), "state_dict": weights}
    torch.save(content, tmp_path / "long.ckpt")
    assert load_checkpoint(tmp_path / "long.ckpt")[0].rotary.shape == (2, 1 << 20, 4)


def test_parts_that_do_not_fit_together_are_refused(checkpoint, tmp_path):
    for change in (
        {"gpt": {"vocab_size": 5, "sorcery": 1}},
        {"gpt": {"vocab_size": 5}},
        {"tokenizer": {"name": "x", "pattern": "(", "vocabulary": ""}},
        {"state_dict": {}},
    ):
        path = tmp_path / "mixed.ckpt"
        torch.save(read_checkpoint(checkpoint) | change, path)
        with pytest.raises(UserError, match=r"mixed\.ckpt"):
            load_checkpoint(path)
