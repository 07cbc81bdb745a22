"""The output layer and its cross-entropy; for a large vocabulary, in parts or in two steps.

Shapes: N targets, C d_model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from lit_gpt.embeddings import Parts
from lit_gpt.windows import IGNORED

MAX_LOGITS = 1 << 28  # 1 GiB as float32; up to there, a GPU is faster if it computes all at once
# 8 MB as float32: from there on, parts are faster on a CPU, whose cache holds them. The system even
# takes back what is larger than 32 MB, and clears it at each step. The loss of 1,024 targets among
# 13,340 tokens took 115 ms at once, 42 in parts; that of 512 among 4,700 took 27 and 19.
CACHED_LOGITS = 1 << 21


def is_half(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16)


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if is_half(x) else x


def rows_at_once(hidden_states: Tensor, vocab_size: int) -> int:
    """For how many of the hidden states (N, C) to compute logits at a time."""
    count, size = hidden_states.shape
    if hidden_states.is_cpu and count * vocab_size > CACHED_LOGITS:
        parts = -(-count * vocab_size // CACHED_LOGITS)
        # At least C rows, as each part adds a (V, C) to the output layer's gradient.
        return min(count, max(size, -(-count // parts)), max(1, MAX_LOGITS // vocab_size))
    return count if count * vocab_size <= MAX_LOGITS else max(1, MAX_LOGITS // 4 // vocab_size)


def one_softmax(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy for hidden states (N, C), output weights (V, C) and targets (N,)."""
    rows = rows_at_once(hidden_states, len(weight))
    if rows >= len(targets):
        return F.cross_entropy(at_least_float32(F.linear(hidden_states, weight)), targets)
    return cross_entropy_in_parts(hidden_states, weight, targets, rows)


class OutputLayer(nn.Linear):
    """A vector for each token, whose product with a hidden state is the token's logit.

    Args:
        cutoff: it decides in two steps (adaptive softmax, Grave et al. 2017), first between the
            tokens below this one and all others taken as one, then among those. Training computes
            the second step only for the targets that need it: BPE's first tokens are the frequent
            ones. 0: in one step.
        spelling_rows: of a table of the parts of tokens' spelling, which are added to their
            vectors; 0: no table.
    """

    def __init__(
        self, d_model: int, vocab_size: int, cutoff: int = 0, spelling_rows: int = 0
    ) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        self.cutoff = cutoff
        self.others = nn.Parameter(torch.empty(1, d_model)) if cutoff else None
        self.parts = Parts(vocab_size, d_model, spelling_rows) if spelling_rows else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (..., V) of both steps together, for x (..., C)."""
        logits = super().forward(x)
        if self.parts is not None:
            logits = logits + self.parts.logits(x)
        if self.others is None:
            return logits
        first, second = at_least_float32(logits).tensor_split([self.cutoff], dim=-1)
        others = at_least_float32(F.linear(x, self.others))  # (..., 1)
        return torch.cat([first, others + second.log_softmax(-1)], dim=-1)

    def cross_entropy(self, hidden_states: Tensor, targets: Tensor) -> Tensor:
        """The mean for hidden states (N, C) and those targets (N,) that are not IGNORED.

        In float32, or float64 if the weights are.
        """
        weight = self.weight
        if self.parts is not None:
            weight = weight + self.parts.of_all_tokens()
        if self.others is None:
            return one_softmax(hidden_states, weight, targets)
        first, second = weight.tensor_split([self.cutoff])
        first = torch.cat([first, self.others])  # (cutoff + 1, C)
        loss = one_softmax(hidden_states, first, targets.clamp(max=self.cutoff))
        (rare,) = (targets >= self.cutoff).nonzero(as_tuple=True)
        if not len(rare):
            return loss
        others = one_softmax(hidden_states[rare], second, targets[rare] - self.cutoff)
        return loss + others * (len(rare) / (targets != IGNORED).sum())


def cross_entropy_in_parts(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, rows: int
) -> Tensor:
    """The mean cross-entropy of targets (N,), for hidden states (N, C) and output weights (V, C).

    Only `rows` rows of the logits (N, V) and of their gradient exist at a time.
    """
    # Since torch 2.13; in half precision, it rounds the loss to that.
    in_half = is_half(weight) or torch.is_autocast_enabled(weight.device.type)
    if hasattr(F, "linear_cross_entropy") and not in_half:
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return F.linear_cross_entropy(hidden_states, weight, targets, options=options)

    def summed_loss(part: Tensor, part_targets: Tensor) -> Tensor:
        logits = at_least_float32(F.linear(part, weight))
        return F.cross_entropy(logits, part_targets, reduction="sum")

    parts = zip(hidden_states.split(rows), targets.split(rows), strict=True)
    losses = [recompute(summed_loss, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum() / (targets != IGNORED).sum()
