"""The plan for other devices beside published runs, and what it prints, suggests and refuses.

Sources of the runs are in docs/scaling.md#planning.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from lit_gpt.command import run as run_command
from lit_gpt.model import GPTConfig
from lit_gpt.planning import plan
from lit_gpt.planning.cluster import Choice, Cluster
from lit_gpt.planning.devices import DEVICES, find_device

GPT2 = {"d_model": 768, "num_blocks": 12, "num_heads": 12, "dropout": 0.0}
GPT2 |= {"position": "learned", "activation": "gelu", "tie_embeddings": True}
LLAMA = {"style": "modern", "qk_norm": False, "tie_embeddings": False, "dropout": 0.0}
TINY = {"d_model": 2048, "num_blocks": 22, "num_heads": 32, "num_kv_heads": 4, "hidden_size": 5632}
LLAMA8 = {"d_model": 4096, "num_blocks": 32, "num_heads": 32, "num_kv_heads": 8}
LLAMA8 |= {"hidden_size": 14336}
CONFIGS = {
    "gpt2": GPTConfig(50304, 1024, **GPT2),
    "tinyllama": GPTConfig(32000, 2048, **LLAMA | TINY),
    "llama8": GPTConfig(128256, 8192, **LLAMA | LLAMA8),
}
GIB = 1 << 30


def make_cluster(name: str, device: str, devices: int = 8, nodes: int = 1, **options) -> Cluster:
    given = {"precision": "bf16-mixed", "optimizer": "adamw", "batch_size": 1, "parts": 1}
    given |= {"tokens": None} | options
    return Cluster(CONFIGS[name], find_device(device), devices, nodes, **given)


def matrices(width: int, keys: int, hidden: int, parts: int) -> int:
    """Weights of a block's matrices: q, k, v, out, and the feed-forward layer's."""
    return 2 * width * width + 2 * width * keys + parts * width * hidden


# By hand: 6 N + 12 L d T. N has the output layer, and no table that is only looked up.
FLOPS = {
    "gpt2": 6 * (12 * matrices(768, 768, 3072, 2) + 50304 * 768) + 12 * 12 * 768 * 1024,
    "tinyllama": 6 * (22 * matrices(2048, 256, 5632, 3) + 32000 * 2048) + 12 * 22 * 2048 * 2048,
    "llama8": 6 * (32 * matrices(4096, 1024, 14336, 3) + 128256 * 4096) + 12 * 32 * 4096 * 8192,
}
PUBLISHED = [  # tokens per second on each device, and the share of its peak that this is
    ("gpt2", "A100-40GB", 8, 1, 107_000, 0.293),  # nanoGPT
    ("gpt2", "A100", 8, 1, 231_000, 0.634),  # llm.c
    ("gpt2", "H100", 8, 1, 463_000, 0.401),  # llm.c
    ("tinyllama", "A100-40GB", 8, 2, 24_000, 0.563),  # which say 56 %
    ("llama8", "H100", 8, 1, 5_762, 0.337),  # torchtitan, which says 33 to 39 %
    ("llama8", "H100", 8, 1, 6_667, 0.390),  # compiled
    ("llama8", "H100", 8, 16, 5_605, 0.328),
    ("llama8", "H100", 8, 16, 6_514, 0.381),
]


@pytest.mark.parametrize(("name", "device", "devices", "nodes", "speed", "share"), PUBLISHED)
def test_published_runs_are_as_fast_as_predicted(name, device, devices, nodes, speed, share):
    cluster = make_cluster(name, device, devices, nodes)
    assert cluster.flops == FLOPS[name]
    slow, _, fast = cluster.speeds(checkpointing=False)
    assert slow < speed < fast
    assert speed * FLOPS[name] / (1e12 * find_device(device).half) == pytest.approx(share, abs=2e-3)
    slow, _, fast = cluster.speeds(checkpointing=True)
    assert fast == pytest.approx(0.64 * cluster.peak / (FLOPS[name] * 4 / 3))


def test_the_time_of_nanogpt_is_about_four_days():
    cluster = make_cluster("gpt2", "A100-40GB", batch_size=12, parts=5, price=2.0)
    assert cluster.step_tokens == 491_520
    cluster = replace(cluster, tokens=600_000 * cluster.step_tokens)
    slow, _, fast = (cluster.seconds(speed) / 86_400 for speed in cluster.speeds(False))
    assert fast < 4 < slow < 4.1
    assert cluster.cost(3600) == 16


@pytest.mark.parametrize(
    ("nodes", "published"),
    [(1, 82.4), (1, 77.0), (16, 67.0), (16, 62.0)],  # GiB, the second and fourth compiled
)
def test_memory_is_that_of_torchtitan(nodes, published):
    """Its FSDP2 gathers weights in bfloat16, its loss is not in parts, and it recomputes less."""
    tokens, layers = 2 * 8192, 32
    cluster = make_cluster("llama8", "H100", 8, nodes, batch_size=2)
    ours = cluster.memory("fsdp2", checkpointing=True)
    # Selective checkpointing keeps the input, every second matrix product (q, v, w1, w2 of seven)
    # and the output of attention with its 32 log-sum-exps.
    kept = 2 * (4096 + 4096 + 1024 + 14336 + 4096 + 4096) + 4 * 32
    theirs = replace(
        ours,
        activations=tokens * layers * kept,
        logits=3 * 4 * tokens * 128256,
        copies=0,
        gathered=ours.gathered / 2,
    )
    assert (theirs.total - 0.4e9) / GIB == pytest.approx(published, rel=0.15)  # no context
    # Ours is less than theirs with full checkpointing, and more with none.
    assert ours.total / GIB < published < cluster.memory("fsdp2", False).total / GIB


def test_sixteen_times_the_devices_save_what_torchtitan_saved():
    few, many = (
        make_cluster("llama8", "H100", 8, nodes).memory("fsdp2", True) for nodes in (1, 16)
    )
    saved = sum(
        getattr(few, part) - getattr(many, part) for part in ("weights", "gradients", "moments")
    )
    assert saved / GIB == pytest.approx(82.4 - 67.0, rel=0.1)
    assert saved / GIB == pytest.approx(77.0 - 62.0, rel=0.1)


@pytest.mark.parametrize(
    ("name", "device", "devices", "nodes", "batch_size", "choice"),
    [
        ("gpt2", "A100-40GB", 1, 1, 12, Choice("single", False)),
        ("gpt2", "RTX-4090", 1, 1, 64, Choice("single", True)),
        ("gpt2", "A100-40GB", 8, 1, 12, Choice("ddp", False)),
        ("gpt2", "T4", 4, 1, 256, None),
        ("tinyllama", "A100-40GB", 8, 2, 4, Choice("fsdp2", False)),
        ("tinyllama", "A100-40GB", 8, 2, 12, Choice("ddp", True)),
        ("llama8", "H100", 8, 1, 2, Choice("fsdp2", True)),
        ("llama8", "H100", 1, 1, 1, None),
    ],
)
def test_the_fastest_way_that_fits(name, device, devices, nodes, batch_size, choice):
    precision = "bf16-mixed" if find_device(device).has_bfloat16 else "16-mixed"
    options = {"batch_size": batch_size, "precision": precision}
    cluster = make_cluster(name, device, devices, nodes, **options)
    assert cluster.choice == choice
    if choice:
        assert cluster.memory(choice.strategy, choice.checkpointing).total < 1e9 * cluster.device.gb


def test_checkpointing_that_is_wanted_is_planned():
    assert make_cluster("gpt2", "A100", checkpointing=True).choice == Choice("ddp", True)


@pytest.mark.parametrize(
    ("name", "text"), [("H100", "H100"), ("nvidia h100 80GB", "H100"), ("rtx 4090", "RTX-4090")]
)
def test_names_of_devices_are_taken_as_people_write_them(name, text):
    assert find_device(name).name == text


def test_every_device_has_a_source_and_plausible_figures():
    for device in DEVICES:
        assert device.source
        assert find_device(device.name) is device
        assert 1.9 < device.half / device.single < 30
    assert (find_device("A100").half, find_device("A100").single) == (312, 19.5)


@pytest.fixture
def make_plan(text_file, tmp_path, capfd, monkeypatch):
    """`make_plan("--devices=8", ...)`: status, output and errors of the command, run here."""
    monkeypatch.setattr("sys.argv", ["plan.py"])
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        status = run_command(lambda: plan.main(list(words)), plan.option_name)
        return status, *capfd.readouterr()

    return run


SHAPE = ["--vocab_size=128256", "--data.context_length=8192", "--data.batch_size=2"]
SHAPE += [f"--model.{name}={value}" for name, value in (LLAMA | LLAMA8).items()]


def numbers_in(line: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", line)]


def test_what_is_printed_is_what_json_has(make_plan, tmp_path):
    words = ["--devices=8", "--device_name=H100", "--nodes=4", "--tokens=15e9", "--price=2.5"]
    status, out, err = make_plan(*SHAPE, *words, "--data.path=nowhere", "--json")
    assert (status, err) == (0, "")
    assert not list(tmp_path.glob("logs*"))
    *lines, last = out.splitlines()
    found = json.loads(last)
    assert (found["devices"], found["nodes"], found["device_name"]) == (8, 4, "H100")
    assert found["parameters"] == 8_030_261_248  # as Meta's Llama 3.1 8B
    assert (found["strategy"], found["activation_checkpointing"]) == ("fsdp2", True)
    peak = 989.4e12 / (FLOPS["llama8"] * 4 / 3)
    assert found["tokens_per_second"] == pytest.approx([0.29 * peak, 0.4 * peak, 0.64 * peak])
    seconds = [15e9 / 32 / speed for speed in found["tokens_per_second"]]
    assert found["seconds"] == pytest.approx(seconds)
    assert found["cost"] == pytest.approx([s / 3600 * 32 * 2.5 for s in seconds])
    card = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert card["Devices"] == "32 x H100 (4 nodes of 8), 989.4 TFLOP/s each in bf16-mixed"
    assert card["Step"] == "524,288 tokens, 2 windows on each device"
    assert card["Fits"] == "FSDP2 with activation checkpointing"
    assert card["Options"].split() == [
        "--trainer.strategy=fsdp2",
        "--trainer.devices=8",
        "--trainer.num_nodes=4",
        "--model.activation_checkpointing=true",
    ]
    assert numbers_in(card["Speed"])[:2] == [3716, 8200]
    assert card["Time"].startswith("15 h 52 min to 35 h 2 min for 1.5e+10 tokens")
    assert numbers_in(card["Cost"])[:2] == pytest.approx(
        [found["cost"][2], found["cost"][0]], abs=0.01
    )
    ways = {(w["strategy"], w["activation_checkpointing"]): w for w in found["memory_bytes"]}
    for row, flag in (("total", False), ("total with checkpointing", True)):
        line = next(line for line in lines if re.match(rf"  {row}  ", line))
        totals = [ways[name, flag]["total"] / 1e9 for name in ("single", "ddp", "fsdp2")]
        assert numbers_in(line) == pytest.approx(totals, abs=0.01)
    assert all(len(line) <= 80 for line in lines if not line.startswith("Options"))


@pytest.mark.parametrize("words", [["--data.batch_size=16", "--devices=8"], ["--devices=1"]])
def test_what_is_suggested_where_nothing_fits_would_fit(make_plan, words):
    _, out, _ = make_plan(*SHAPE, "--device_name=H100", *words)
    assert "Fits: nothing" in out
    line = next(line for line in out.splitlines() if line.startswith("Would fit"))
    suggested = [word for word in line.split() if word.startswith("--")]
    assert suggested
    _, out, _ = make_plan(*SHAPE, "--device_name=H100", *words, *suggested)
    assert "Fits: FSDP2 with activation checkpointing" in out


def test_a_model_that_fits_nowhere_is_said(make_plan):
    sizes = ["--model.d_model=65536", "--model.num_heads=64", "--model.num_blocks=100"]
    status, out, err = make_plan("--device_name=T4", "--vocab_size=100", *sizes)
    assert (status, err) == (0, "")
    assert "No number of devices would do" in out


def test_the_text_gives_what_is_not_given(make_plan, text_file, tmp_path):
    words = [f"--data.path={text_file}", f"--data.cache={tmp_path / 'cache'}"]
    words += ["--trainer.max_epochs=3", "--trainer.devices=2", "--trainer.num_nodes=3"]
    status, out, err = make_plan("--device_name=t4", *words, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out.splitlines()[-1])
    vocabulary, train = (
        numbers_in(re.search(rf"^{name}: (.+?) tokens", out, re.M)[1])[0]
        for name in ("Vocabulary", "Training")
    )
    assert found["tokens"] == 3 * train
    gpt = GPTConfig(int(vocabulary))
    assert (
        found["flops_per_token"] == 6 * (6 * 12 * 80 * 80 + gpt.vocab_size * 80) + 12 * 6 * 80 * 128
    )
    assert (found["devices"], found["nodes"], found["precision"]) == (2, 3, "32-true")
    assert "expect less of this one" in out


def test_a_run_without_an_end_has_no_time(make_plan):
    words = ["--device_name=L4", "--vocab_size=1000", "--trainer.max_steps=-1", "--json"]
    status, out, _ = make_plan(*words)
    assert status == 0
    assert "Time: no number of steps or tokens is planned" in out
    found = json.loads(out.splitlines()[-1])
    assert (found["tokens"], found["seconds"], found["cost"]) == (None, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device_name=H101"], "--device_name 'H101': is not known; use one of A10, A100-40GB"),
        (["--device_name=H100", "--devices=0"], "--devices 0: must be at least 1"),
        (["--device_name=H100", "--devices=x"], "--devices 'x': must be a whole number or null"),
        (["--device_name=H100", "--nodes=0"], "--nodes 0: must be at least 1"),
        (["--device_name=H100", "--tokens=0"], "--tokens 0: must be at least 1"),
        (["--device_name=H100", "--vocab_size=0"], "--vocab_size 0: must be at least 1"),
        (["--device_name=H100", "--price=-1"], "--price -1.0: must be at least 0"),
        (["--device_name=H100", "--price=nan"], "--price 'nan': must be a number or null"),
        (["--devices=8"], "--devices 8: is for other devices than this machine's"),
        (["--tokens=5"], "give --device_name too, such as H100"),
        (["--device_name=T4", "--trainer.precision=bf16"], "T4 does not compute in bfloat16"),
        (["--device_name=A100", "--trainer.precision=64-true"], "can't be planned for"),
        (["--device_name=A100", "--budget=10m"], "--budget: measures this machine"),
        (["--device_name=A100", "--ckpt_path=last"], "--ckpt_path: continues a run"),
        (["--device_name=A100", "--trainer.devices=-1"], "--trainer.devices '-1': does not say"),
        (["--device_name=A100", "--model.d_model=15"], "--model.d_model 15: must be divisible by"),
        (["--device_name=A100", "--trainer.fast_dev_run=true"], "is not a run to plan"),
    ],
)
def test_wrong_input_is_one_line(make_plan, words, message):
    vocabulary = [] if "--tokens=5" in words or "--devices=8" in words else ["--vocab_size=100"]
    status, out, err = make_plan(*vocabulary, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1
