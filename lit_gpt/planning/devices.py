"""What common devices can do, from their vendors' data sheets.

Peaks are dense: data sheets of recent NVIDIA cards give twice as much, with sparsity. Apple
publishes no such figures for its chips. Of the A10G no document was at hand, so it is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lit_gpt.errors import UserError


@dataclass(frozen=True)
class Device:
    """A kind of device.

    Attributes:
        gb: memory, in units of 10^9 bytes. Most cards have GiB, 7 % more, of which error correction
            and the driver take up to 6 %.
        half: peak of matrix products in bfloat16, or float16 without it, summed in float32, in
            10^12 FLOP/s.
        single: peak in float32, without TF32, in 10^12 FLOP/s.
        has_bfloat16: whether it computes in bfloat16.
        source: the vendor's document.
    """

    name: str
    gb: float
    half: float
    single: float
    source: str
    has_bfloat16: bool = True


A100 = "NVIDIA A100 data sheet (1758950, 2021)"
H100 = "NVIDIA H100 data sheet; 989.4, 66.9 and 51.2 from the H100 architecture white paper"
VOLTA = "NVIDIA V100 data sheet (1165301, 2020)"
DEVICES = (
    Device("A10", 24, 125, 31.2, "NVIDIA A10 data sheet (2021)"),
    Device("A100-40GB", 40, 312, 19.5, A100),
    Device("A100", 80, 312, 19.5, A100),
    Device("B200", 180, 2250, 80, "NVIDIA Blackwell architecture brief, HGX B200 (2024)"),
    Device("H100", 80, 989.4, 66.9, H100),
    Device("H100-PCIe", 80, 756, 51.2, H100),
    Device("H200", 141, 989.4, 66.9, "NVIDIA H200 data sheet (2024)"),
    Device("L4", 24, 121, 30.3, "NVIDIA L4 data sheet (2023)"),
    Device("L40S", 48, 362, 91.6, "NVIDIA L40S data sheet (2023)"),
    Device("MI300X", 192, 1307.4, 163.4, "AMD Instinct MI300X data sheet (2023)"),
    Device("RTX-3090", 24, 71, 35.6, "NVIDIA GA102 white paper, appendix A (2021)"),
    Device("RTX-4090", 24, 165.2, 82.6, "NVIDIA Ada architecture white paper, appendix A (2023)"),
    Device("RTX-5090", 32, 209.5, 104.8, "NVIDIA RTX Blackwell architecture white paper (2025)"),
    Device("T4", 16, 65, 8.1, "NVIDIA T4 data sheet (2019)", has_bfloat16=False),
    Device("V100", 32, 125, 15.7, VOLTA, has_bfloat16=False),
    Device("V100-16GB", 16, 125, 15.7, VOLTA, has_bfloat16=False),
)
OTHER_NAMES = {"a10080gb": "a100", "h100sxm": "h100", "h10080gb": "h100", "v10032gb": "v100"}


def plain(name: str) -> str:
    """`NVIDIA A100 80GB` and `a100-80gb` alike as a10080gb."""
    letters = re.sub(r"[^a-z0-9]", "", name.lower())
    letters = re.sub(r"^(nvidia|amd|geforce|tesla|instinct)+", "", letters)
    return OTHER_NAMES.get(letters, letters)


def find_device(name: str) -> Device:
    """The device of this name, whatever its case, spaces and hyphens.

    Raises:
        UserError: it is not in the table.
    """
    for device in DEVICES:
        if plain(device.name) == plain(name):
            return device
    known = ", ".join(device.name for device in DEVICES)
    raise UserError(
        "is not known", field="plan.device_name", value=name, hint=f"use one of {known}"
    )
