"""What a benchmark says of the machine: name, instruction sets, limits, threads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import machine as module
from benchmarks.machine import LIMITS, machine

EPYC = """processor\t: 0
model name\t: AMD EPYC 9454
flags\t\t: fpu sse2 avx2 avx512f avx512bw avx512_bf16 avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
LAPTOP = "model name\t: AMD Ryzen 7 5800U\nflags\t\t: fpu sse2 avx2\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU part\t: 0xd40\n"
XEON = "model name\t: Xeon\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
APPLE = """machdep.cpu.brand_string: Apple M4
hw.optional.neon: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
hw.ncpu: 10
"""
INTEL_MAC = """machdep.cpu.brand_string: Intel(R) Core(TM) i7
machdep.cpu.features: FPU SSE4.2 AVX1.0
machdep.cpu.leaf7_features: AVX2 BMI2
"""


@pytest.fixture(autouse=True)
def no_limits(monkeypatch):
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "name", "instructions"),
    [
        (EPYC, "AMD EPYC 9454", "AVX2 AVX-512 AVX512_BF16"),
        (LAPTOP, "AMD Ryzen 7 5800U", "AVX2"),
        (XEON, "Xeon", "AVX2 AVX-512 AVX512_BF16 AMX"),
        (GRAVITON, None, "NEON SVE BF16"),
    ],
)
def test_on_linux(monkeypatch, text, name, instructions):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    found = machine()
    assert found["instructions"] == instructions
    assert found["processor"] == name if name else found["processor"]
    assert found["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("text", "name", "instructions"),
    [(APPLE, "Apple M4", "NEON BF16"), (INTEL_MAC, "Intel(R) Core(TM) i7", "AVX2")],
)
def test_on_macos(monkeypatch, text, name, instructions):
    monkeypatch.setattr(sys, "platform", "darwin")
    done = subprocess.CompletedProcess([], 0, stdout=text)
    monkeypatch.setattr(module.subprocess, "run", lambda *args, **kwargs: done)
    assert (machine()["processor"], machine()["instructions"]) == (name, instructions)


def test_elsewhere_pytorch_tells_what_it_uses(monkeypatch):
    def missing(self, encoding):
        raise FileNotFoundError

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(Path, "read_text", missing)
    assert machine()["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert machine()["processor"]


def test_limits_of_the_environment_are_said(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: EPYC)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    expected = "AVX2 AVX-512 AVX512_BF16 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2"
    assert machine()["instructions"] == expected
