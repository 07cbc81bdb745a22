"""The machine that a benchmark ran on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

# What decides how fast matrices are multiplied, by the names of Linux, then those of macOS.
INSTRUCTIONS = {
    "AVX2": ("avx2",),
    "AVX-512": ("avx512f",),
    "AVX512_BF16": ("avx512_bf16",),
    "AMX": ("amx_bf16",),
    "NEON": ("asimd", "neon"),
    "SVE": ("sve",),
    "BF16": ("bf16", "feat_bf16"),
    "SME": ("sme", "feat_sme"),
}
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def described() -> tuple[str, str]:
    """The processor's name and its flags, as the system has them; empty where it doesn't tell."""
    if sys.platform == "darwin":
        lines = subprocess.run(["sysctl", "-a"], capture_output=True, text=True).stdout
        values = dict(line.split(": ", 1) for line in lines.splitlines() if ": " in line)
        flags = [values.get(f"machdep.cpu.{name}", "") for name in ("features", "leaf7_features")]
        optional = "hw.optional."
        flags += [
            n.rpartition(".")[2] for n in values if n.startswith(optional) and values[n] == "1"
        ]
        return values.get("machdep.cpu.brand_string", ""), " ".join(flags)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        lines = ""
    values = {}
    for line in lines.splitlines():
        name, _, value = line.partition(":")
        values.setdefault(name.strip(), value.strip())
    flags = values.get("flags") or values.get("Features") or ""
    return values.get("model name", ""), flags


def machine() -> dict[str, str | int]:
    """Names and values: processor, instruction sets, their limits by the environment, versions."""
    name, text = described()
    flags = set(text.lower().split())
    found = [known for known, names in INSTRUCTIONS.items() if not flags.isdisjoint(names)]
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    torchs = torch.backends.cpu.get_cpu_capability()
    return {
        "processor": name or platform.processor() or platform.machine(),
        "instructions": " ".join([*(found or [torchs]), *limits]),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }
