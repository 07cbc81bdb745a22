"""Train a GPT on your own text with PyTorch Lightning.

>>> import lit_gpt
>>> model = lit_gpt.load("logs/version_0")
>>> model.generate("Once upon", max_new_tokens=50)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_gpt.checkpoint import load_checkpoint
    from lit_gpt.data import TextDataModule
    from lit_gpt.errors import UserError
    from lit_gpt.generation.language_model import LanguageModel, load
    from lit_gpt.generation.sampling import Sampling, generate
    from lit_gpt.model import GPT, GPTConfig
    from lit_gpt.module import LitGPT
    from lit_gpt.text.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "LanguageModel",
    "LitGPT",
    "Sampling",
    "TextDataModule",
    "Tokenizer",
    "UserError",
    "generate",
    "load",
    "load_checkpoint",
]
_MODULES = {
    "GPT": "lit_gpt.model",
    "GPTConfig": "lit_gpt.model",
    "LanguageModel": "lit_gpt.generation.language_model",
    "LitGPT": "lit_gpt.module",
    "Sampling": "lit_gpt.generation.sampling",
    "TextDataModule": "lit_gpt.data",
    "Tokenizer": "lit_gpt.text.tokenizer",
    "UserError": "lit_gpt.errors",
    "generate": "lit_gpt.generation.sampling",
    "load": "lit_gpt.generation.language_model",
    "load_checkpoint": "lit_gpt.checkpoint",
}


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used (PEP 562): torch alone takes a second to load."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
