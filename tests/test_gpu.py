"""What differs on an NVIDIA card; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from lit_gpt.data import TextDataModule

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def test_the_default_run_uses_the_card_and_its_bfloat16(train):
    result = train(**{"trainer.accelerator": "auto"})
    assert result.status == 0, result.err
    assert "Device: cuda" in result.out
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert "precision bf16-mixed" in result.out
    assert float(result.steps[-1].split()[-1]) == pytest.approx(
        float(train().steps[-1].split()[-1]), abs=0.05
    )


def test_batches_come_from_pinned_memory(text_file, tmp_path):
    data = TextDataModule(str(text_file), cache=str(tmp_path))
    batch = (torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.long))
    moved = data.transfer_batch_to_device(batch, torch.device("cuda"), 0)
    assert [part.device.type for part in moved] == ["cuda", "cuda"]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(moved, batch, strict=True))


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_compiled_blocks_train_on_the_card(train, mode):
    options = {"trainer.accelerator": "auto", "trainer.accumulate_grad_batches": 2}
    plain, compiled = train(**options), train(**options, **{"model.compile": mode})
    losses = [float(result.steps[-1].split()[-1]) for result in (plain, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
