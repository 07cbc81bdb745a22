"""Checkpoint files: what they hold, and how one becomes a GPT and its tokenizer.

A file may come from a stranger: checkpoint_file.py reads it without running anything in it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from torch import Tensor

from lit_gpt.checkpoint_file import parts_of, read_file
from lit_gpt.errors import UserError
from lit_gpt.lora import LoraConfig, add_adapters, fingerprint, is_adapter, merge_adapters
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.text.tokenizer import Tokenizer

Contents = TypedDict(  # the keys of a file; everything in it is of plain types
    "Contents",
    {
        # What is needed to generate text.
        "gpt": dict[str, Any],  # all fields of GPTConfig
        "tokenizer": dict[str, Any],  # Tokenizer.to_dict()
        "state_dict": dict[str, Tensor],  # weights of LitGPT: those of its GPT begin with "gpt."
        "lora": dict[str, Any],  # if these are adapters alone: LoraConfig, and of what: "base"
        # What the run was.
        "hyper_parameters": dict[str, Any],  # arguments of LitGPT
        "datamodule_hyper_parameters": dict[str, Any],  # arguments of TextDataModule
        "corpus": dict[str, Any],  # fields of text.corpus.CorpusInfo, the text's fingerprint too
        "trainer": dict[str, Any],  # what the Trainer made of its options, and of the machine
        "options": dict[str, Any],  # the training command's, by group; absent without it
        # How far the run got.
        "global_step": int,  # optimizer steps done, skipped ones included
        "skipped_steps": int,  # by the NonFiniteGuard; absent without one
        "optimizer_states": list[dict[str, Any]],  # of the one optimizer: optimizer_state.py
        "lr_schedulers": list[dict[str, Any]],  # none with a constant learning rate
        "callbacks": dict[str, Any],  # of each callback by its state_key
        "TextDataModule": dict[str, int],  # windows_seen; absent in runs of 0.1.0
        # Lightning's own: where its loops are, versions, names.
        "loops": dict[str, Any],
        "epoch": int,
        "pytorch-lightning_version": str,
        "hparams_name": str,
        "datamodule_hparams_name": str,
    },
    total=False,
)
INFERENCE_KEYS: dict[str, type] = {"gpt": dict, "tokenizer": dict, "state_dict": dict}
RESUME_KEYS: dict[str, type] = {
    **INFERENCE_KEYS,
    **dict.fromkeys(("corpus", "hyper_parameters", "datamodule_hyper_parameters"), dict),
    **dict.fromkeys(("loops", "callbacks"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
    "global_step": int,
    "pytorch-lightning_version": str,
}
SHARDED_KEYS = {  # of what is beside the tensors in a sharded checkpoint
    key: kind for key, kind in RESUME_KEYS.items() if key not in ("state_dict", "optimizer_states")
}
REST = "rest.ckpt"  # that file
PLAIN_KEYS = {  # without tensors, so that what they have can be compared
    *("gpt", "lora", "tokenizer", "corpus", "trainer", "global_step", "skipped_steps"),
    *("hyper_parameters", "datamodule_hyper_parameters"),
}
STATE_KEYS = ("BestCheckpoint", "LastCheckpoint")  # 0.1.0 had their arguments after the name
MAX_TABLE = 1 << 28  # bytes of a table of positions, whose size no weights confirm
WEIGHTS_OF_BLOCK = 6  # at least: four matrices and two norms


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file that was read. What an old or odd file lacks is empty or None here."""

    path: Path
    contents: Contents

    @classmethod
    def read(cls, path: str | Path, needed: Mapping[str, type] = INFERENCE_KEYS) -> Checkpoint:
        """Arguments and errors as for `read_checkpoint`."""
        return cls(Path(os.path.expanduser(path)), read_checkpoint(path, needed))

    @property
    def gpt_config(self) -> GPTConfig:
        """Fields added after the file was written take their defaults."""
        return GPTConfig(**self.contents["gpt"])

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_dict(self.contents["tokenizer"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those of the GPT, by their names in it."""
        weights = self.contents["state_dict"].items()
        return {name[4:]: weight for name, weight in weights if name.startswith("gpt.")}

    @property
    def lora(self) -> LoraConfig | None:
        """Of a checkpoint that has adapters alone."""
        if not (lora := self._dict("lora")):
            return None
        return LoraConfig(**{name: value for name, value in lora.items() if name != "base"})

    @property
    def base_path(self) -> Path:
        """Where the weights are that the adapters go with; files of several runs can mix."""
        return base_path(self.path.parent, str(self._dict("lora").get("base")))

    def base_weights(self) -> dict[str, Tensor]:
        """All weights of the GPT but its adapters.

        Raises:
            UserError: they are not where they were saved, or others are.
        """
        path = self.base_path
        if not path.is_file():
            problem = f"{self.path} contains only LoRA adapters, and their base model is missing"
            hint = f"put {path.name} back beside it, from the folder of its run"
            raise UserError(problem, hint=hint)
        weights = Checkpoint.read(path).weights
        if fingerprint(weights) != self._dict("lora").get("base"):
            problem = f"{path} is not the model that {self.path} adapts, or damaged"
            raise UserError(problem, hint="copy it again from the folder of its run")
        return weights

    @property
    def optimizer_state(self) -> dict[str, Any]:
        (state,) = self.contents["optimizer_states"]
        return state

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The arguments of LitGPT."""
        return self._dict("hyper_parameters")

    @property
    def data_hyperparameters(self) -> dict[str, Any]:
        """The arguments of TextDataModule."""
        return self._dict("datamodule_hyper_parameters")

    @property
    def trainer_settings(self) -> dict[str, Any]:
        return self._dict("trainer")

    @property
    def options(self) -> dict[str, Any]:
        """The training command's options, by group."""
        return self._dict("options")

    @property
    def corpus_info(self) -> dict[str, Any]:
        """The fields of CorpusInfo."""
        return self._dict("corpus")

    @property
    def ends_files(self) -> bool:
        """Whether its text was read with ends of text between files: not by earlier releases."""
        return self.corpus_info.get("file_ends") is not None

    @property
    def has_validation_tokens(self) -> bool:
        """Whether a compact vocabulary, of one text, has those of both splits: not any more."""
        return self.corpus_info.get("compact_tokens") is None

    @property
    def global_step(self) -> int | None:
        step = self.contents.get("global_step")
        return step if isinstance(step, int) else None

    @property
    def skipped_steps(self) -> int:
        return skipped_steps(self.contents)

    @property
    def data_state(self) -> Any:
        """The place in the data; empty in older runs, where it follows from the step."""
        return self.contents.get("TextDataModule", {})

    @property
    def best_evaluation(self) -> dict[str, Any]:
        """`step`, `val` and `train` (nats/token) of the evaluation with the lowest `val`."""
        best = self._dict("callbacks").get("StepLines")
        best = best.get("best") if isinstance(best, dict) else None
        return best if isinstance(best, dict) else {}

    @property
    def callback_states(self) -> dict[str, Any]:
        """The state of each callback by its state_key."""
        return self._dict("callbacks")

    @property
    def fit_loop_state(self) -> Any:
        """Lightning's counters."""
        return self._dict("loops").get("fit_loop")

    def _dict(self, key: str) -> dict[str, Any]:
        part = self.contents.get(key)
        return part if isinstance(part, dict) else {}

    def has_tokenizer(self, tokenizer: Tokenizer) -> bool:
        return self.contents["tokenizer"] == tokenizer.to_dict()

    def without_tensors(self) -> Checkpoint:
        """The same without weights and optimizer state, to be held for the length of a run."""
        large = ("state_dict", "optimizer_states")
        rest = {key: part for key, part in self.contents.items() if key not in large}
        return replace(self, contents=cast(Contents, rest))

    def build(self, merge: bool = True) -> tuple[GPT, Tokenizer]:
        """The model, in eval mode on the CPU, and its tokenizer.

        Args:
            merge: whether adapters become part of the weights; else they stay, these frozen.

        Raises:
            UserError: parts that do not fit together; no memory was allocated for them.
        """
        base = self.base_weights() if self._dict("lora") else {}
        try:
            config = self.gpt_config
            tokenizer = self.tokenizer
            weights = base | self.weights
            if WEIGHTS_OF_BLOCK * config.num_blocks > len(weights):
                raise ValueError(f"{config.num_blocks} blocks, {len(weights)} weights")
            if config.vocab_size != tokenizer.vocab_size:
                raise ValueError(f"{config.vocab_size} rows, {tokenizer.vocab_size} tokens")
            if config.least_weights() > sum(weight.numel() for weight in weights.values()):
                raise ValueError(f"a configuration larger than its {len(weights)} weights")
            is_rotary = config.position == "rotary"  # with a cosine and a sine of each channel
            width = 2 * config.rotary_size if is_rotary else config.d_model
            if 4 * config.context_length * width > MAX_TABLE:
                raise ValueError(f"a context of {config.context_length} tokens")
            model = GPT(config)
            model.spell(tokenizer)
            if lora := self.lora:
                add_adapters(model, lora)
            model.load_state_dict(weights)
            if lora and merge:
                merge_adapters(model)
        except Exception as error:
            reason = " ".join(str(error).split("\n")[:2])[:300] or type(error).__name__
            raise UserError(f"the parts of {self.path} do not fit together: {reason}") from error
        return model.eval(), tokenizer


def base_path(folder: Path, base: str) -> Path:
    """The file of the weights that have this fingerprint, among a run's checkpoints."""
    return folder / f"base-{base[:12]}.ckpt"


def base_contents(model: GPT, tokenizer: Tokenizer) -> tuple[Contents, str]:
    """An ordinary checkpoint of a model that is to get adapters, and its fingerprint."""
    weights = {name: weight for name, weight in model.state_dict().items() if not is_adapter(name)}
    contents: Contents = {
        "gpt": asdict(model.config),
        "tokenizer": tokenizer.to_dict(),
        "state_dict": {f"gpt.{name}": weight for name, weight in weights.items()},
    }
    return contents, fingerprint(weights)


def skipped_steps(contents: Mapping[str, Any]) -> int:
    return contents.get("skipped_steps", 0)


def is_sharded(path: str | Path) -> bool:
    """Whether this is a folder in which each process wrote a part: distributed/sharded_files.py."""
    return os.path.isfile(os.path.join(os.path.expanduser(path), REST))


def with_tensors(rest: Mapping[str, Any], weights: Any, optimizer_state: Any) -> dict[str, Any]:
    return {**rest, "state_dict": weights, "optimizer_states": [optimizer_state]}


def take_tensors(contents: dict[str, Any]) -> tuple[Any, Any]:
    """Removes the weights and the state of the optimizer, and returns them."""
    return contents.pop("state_dict"), contents.pop("optimizer_states")[0]


def write_options(contents: dict[str, Any], options: dict[str, Any]) -> None:
    contents["options"] = options


def write_skipped_steps(contents: dict[str, Any], number: int) -> None:
    contents["skipped_steps"] = number


def read_checkpoint(path: str | Path, needed: Mapping[str, type] = INFERENCE_KEYS) -> Contents:
    """Everything in a checkpoint, on the CPU. Never runs code from the file.

    Args:
        needed: keys that must be there, and their types: INFERENCE_KEYS or RESUME_KEYS.

    Raises:
        UserError: no such file, or one that is damaged or of something else.
    """
    path = Path(os.path.expanduser(path))  # Path's own fails for an unknown user
    if is_sharded(path):
        hint = f"make one file of it: lit-gpt consolidate {path}"
        raise UserError(f"{path} is a sharded checkpoint", hint=hint)
    if not path.is_file():
        raise UserError(f"no checkpoint at {str(path)!r}", hint="give the path of a .ckpt file")

    def refused(problem: str) -> UserError:
        return UserError(f"{path} {problem}", hint="use another checkpoint")

    try:
        contents = read_file(path)
    except Exception as error:  # whatever a malicious file can raise
        problem = "is not a checkpoint that can be loaded (truncated, damaged or not from lit_gpt)"
        raise refused(problem) from error
    if missing := sorted(needed.keys() - (contents if isinstance(contents, dict) else {})):
        raise refused(f"is not a complete checkpoint of lit_gpt: it has no {', '.join(missing)}")
    for key, kind in needed.items():
        if not isinstance(contents[key], kind):
            raise refused(f"is damaged or not from lit_gpt: its {key} is not a {kind.__name__}")
    for key in PLAIN_KEYS & contents.keys():
        if any(isinstance(part, Tensor) for part in parts_of(contents[key])):
            raise refused(f"is damaged or not from lit_gpt: its {key} has a tensor")
    if isinstance(states := contents.get("callbacks"), dict):
        contents["callbacks"] = {_state_key(key): state for key, state in states.items()}
    return contents


def _state_key(key: Any) -> Any:
    """A callback's key in the present version."""
    return next((ours for ours in STATE_KEYS if str(key).startswith(f"{ours}{{")), key)


def load_checkpoint(path: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, in eval mode on the CPU, and its tokenizer, from nothing but the file.

    Raises:
        UserError: a file that can't be used.
    """
    return Checkpoint.read(path).build()
