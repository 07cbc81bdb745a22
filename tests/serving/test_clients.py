"""Programs that people put before a server, each with its own defaults; docs/ecosystem.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.generation.sampling import Sampling
from lit_gpt.huggingface.export import write_folder
from lit_gpt.text.vocabularies import load_tokenizer
from tests.generation.models import save_model, small_model
from tests.serving.servers import CONTEXT, serving

MODEL = "version_7/best"
PROMPT = "User:\nhi\n\nAssistant:\n"  # what the plain template makes of it
Expected = Callable[..., str]


@pytest.fixture(scope="module")
def right(expected) -> str:
    """The answer to `hi`, greedy."""
    return expected(PROMPT, 9, Sampling(0), 1)


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl(server, right):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "temperature": 0}
    url = f"{server.url}/v1/chat/completions"
    answer = json.loads(run("curl", "-sS", url, "-d", json.dumps(body)))
    assert answer["choices"][0]["message"]["content"] == right


def test_llm(server, right, tmp_path):
    """The command of Simon Willison, with a model of its own file."""
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mine\n  model_name: {MODEL}\n  api_base: {server.url}/v1\n"
    )
    options = ["-m", "mine", "-o", "temperature", "0", "-o", "max_tokens", "9"]
    for mode in ([], ["--no-stream"]):
        assert run("llm", *options, *mode, "hi", LLM_USER_PATH=str(tmp_path)) == right + "\n"


def test_langchain(server, right):
    openai = pytest.importorskip("langchain_openai")
    chat = openai.ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=9
    )
    assert chat.invoke("hi").content == right
    assert "".join(chunk.content for chunk in chat.stream("hi")) == right


def test_litellm(server, right, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads prices
    litellm = pytest.importorskip("litellm")
    options = {"model": f"openai/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none"}
    options |= {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 9}
    assert litellm.completion(**options).choices[0].message.content == right
    chunks = litellm.completion(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == right


def test_javascript(server, right, tmp_path):
    """Needs node, and `npm install openai` where NODE_PATH says."""
    folder = os.environ.get("NODE_PATH")
    if shutil.which("node") is None or not (folder and Path(folder, "openai").is_dir()):
        pytest.skip("needs node, and openai in NODE_PATH")
    script = tmp_path / "ask.cjs"
    script.write_text(
        f"""const OpenAI = require("openai");
const client = new OpenAI({{baseURL: "{server.url}/v1", apiKey: "none"}});
const ask = {{model: "{MODEL}", messages: [{{role: "user", content: "hi"}}],
  temperature: 0, max_completion_tokens: 9}};
(async () => {{
  const texts = [(await client.chat.completions.create(ask)).choices[0].message.content, ""];
  for await (const chunk of await client.chat.completions.create({{...ask, stream: true}}))
    texts[1] += chunk.choices[0].delta.content ?? "";
  console.log(JSON.stringify(texts));
}})();
"""
    )
    assert json.loads(run("node", str(script))) == [right, right]


ENDINGS = [" the mat", " a dog", "猫", " it rained"]
TASKS = {
    "mine_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "mine_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "mine_generate": {
        "output_type": "generate_until",  # transformers can't continue an empty prompt
        "doc_to_text": "{{question[:20] or 'b'}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["zz"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder: Path) -> None:
    """A task of each kind; some questions are empty, or longer than the context."""
    questions = ["the cat sat on", "", "a" * (CONTEXT + 9), "坐在垫子上", "while"]
    rows = [
        {"question": question, "choices": ENDINGS, "label": i % 4, "text": f"{i} {question}猫 b"}
        for i, question in enumerate(questions * 2)
    ]
    rows[0]["text"] = "the cat sat on a mat and " * 12  # several windows
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, task in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
            "target_delimiter": "",
            **task,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task), encoding="utf-8")


def harness(folder: Path, out: Path, model: str, model_args: str, batch_size: int = 1) -> Any:
    """What lm-evaluation-harness prints and logs, run as people run it, without a network."""
    run(
        "lm_eval", "run", "--model", model, "--model_args", model_args, "--tasks", ",".join(TASKS),
        "--include_path", str(folder), "--output_path", str(out), "--log_samples", "--device=cpu",
        f"--batch_size={batch_size}", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1",
        HF_HOME=str(folder / "home"), TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    results = json.loads(next(out.rglob("results_*.json")).read_text())["results"]
    samples = {
        name: [
            json.loads(line)
            for line in next(out.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        ]
        for name in TASKS
    }
    return results, samples


@pytest.mark.slow
def test_lm_evaluation_harness_gets_what_its_hf_model_gets(tmp_path):
    """Log-probabilities, losses over windows, greedy texts: by the server, and by transformers."""
    pytest.importorskip("lm_eval")
    tokenizer = load_tokenizer("bytes").with_end_of_text()
    model = small_model(tokenizer.vocab_size, CONTEXT)
    model.head.weight.data[128:256] *= 0.1  # transformers would write parts of characters
    folder = tmp_path / "export"
    folder.mkdir()
    write_folder(folder, model, tokenizer)
    write_tasks(tmp_path)
    path = save_model(model, tokenizer, tmp_path / "mine.ckpt")
    local, local_samples = harness(
        tmp_path, tmp_path / "hf", "hf", f"pretrained={folder},dtype=float32"
    )
    here = tmp_path / "here"
    here.mkdir()
    with serving(f"--ckpt_path={path}", folder=here) as server:
        for batch_size in (1, 4):
            args = f"model=mine,base_url={server.url}/v1/completions,tokenizer={folder},"
            args += f"tokenizer_backend=huggingface,max_length={CONTEXT + 2}"
            out = tmp_path / f"api{batch_size}"
            served, samples = harness(tmp_path, out, "local-completions", args, batch_size)
            compare(local, served)
            for name in TASKS:
                for ours, theirs in zip(samples[name], local_samples[name], strict=True):
                    compare(theirs["filtered_resps"], ours["filtered_resps"])


def compare(right: Any, found: Any) -> None:
    """Numbers to 1e-3, and all else exactly."""
    if isinstance(right, dict):
        for name, value in right.items():
            compare(value, found[name])
    elif isinstance(right, list):
        assert len(right) == len(found)
        for pair in zip(right, found, strict=True):
            compare(*pair)
    elif isinstance(right, float) or re.fullmatch(r"-?\d+\.\d+", str(right)):
        assert float(found) == pytest.approx(float(right), abs=1e-3, rel=1e-5)
    else:
        assert found == right
