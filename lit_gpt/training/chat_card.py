"""What a run prints about conversations: what its windows hold, and which are in both splits."""

from __future__ import annotations

from lit_gpt.data import TextDataModule
from lit_gpt.text.packing import Packs, shared_conversations

NAMES = {"train": "Training", "val": "Validation"}


def chat_card(data: TextDataModule) -> list[tuple[str, str]]:
    """Names and values; none of plain text."""
    packs = {name: x for name, x in data.windows.items() if isinstance(x, Packs)}
    card = [(f"{NAMES[name]} conversations", found.describe()) for name, found in packs.items()]
    if len(packs) == len(NAMES):
        splits = data.splits
        both = packs.values()
        number = splits.remember("shared-conversations", lambda: shared_conversations(*both))
        total = packs["val"].num_conversations
        value = f"{number:,} of {total:,} ({number / total:.1%})"
        card.append(("Validation conversations also in the training text", value))
    return card
