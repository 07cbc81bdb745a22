"""Owns the server's page: a prompt, sliders, and what the model writes, as it is written.

It loads nothing but the completions. What the model writes is put in as text, never as HTML.
"""

from __future__ import annotations

from html import escape

from lit_gpt.generation.completion import Request
from lit_gpt.generation.sampling import Sampling
from lit_gpt.reports.html import page

STYLE = """
.try { display: grid; gap: 14px; grid-template-columns: minmax(0, 1fr) 300px; align-items: start }
.left { display: grid; gap: 14px }
label { display: block }
textarea, input { font: inherit; color: inherit }
textarea, .field input { width: 100%; margin-top: 4px; padding: 8px 10px; border-radius: 6px;
  background: var(--page); border: 1px solid var(--line) }
textarea { display: block; min-height: 96px; resize: vertical; unicode-bidi: plaintext }
:is(textarea, input, button):focus-visible { outline: 2px solid var(--c0); outline-offset: 1px }
.slider, .field { margin-bottom: 12px; font-size: 14px }
.slider span { float: right; font-variant-numeric: tabular-nums; color: var(--soft) }
.slider input { display: block; width: 100%; margin: 4px 0 0; accent-color: var(--c0) }
.row { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; margin-top: 12px }
button { font: inherit; font-weight: 600; padding: 7px 18px; border-radius: 6px; cursor: pointer;
  border: 1px solid var(--line); background: var(--card); color: var(--ink) }
button.main { background: var(--c0); border-color: var(--c0); color: var(--page) }
button:disabled { opacity: .45; cursor: default }
#answer { white-space: pre-wrap; unicode-bidi: plaintext; min-height: 140px; margin: 0 }
#answer .soft { font-size: inherit }
#status { flex: 1 1 150px }
#status.error { color: var(--c1) }
@media (max-width: 760px) { .try { grid-template-columns: minmax(0, 1fr) } }
"""

SCRIPT = r"""
const $ = id => document.getElementById(id);
const form = $("form"), answer = $("answer"), note = $("status");
let running = null;

for (const input of document.querySelectorAll(".slider input")) {
  const show = () => input.previousElementSibling.textContent =
    input.dataset.off === input.value ? "off" : input.value;
  input.addEventListener("input", show);
  show();
}
const escaped = {n: "\n", t: "\t", "\\": "\\"};
const body = () => {
  const body = {model: form.dataset.model, prompt: $("prompt").value, stream: true,
    stream_options: {include_usage: true}};
  for (const input of document.querySelectorAll(".slider input"))
    if (input.dataset.off !== input.value) body[input.name] = Number(input.value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  if ($("stop").value) body.stop = $("stop").value.replace(/\\([nt\\])/g, (_, c) => escaped[c]);
  return body;
};
const say = (text, kind = "soft") => Object.assign(note, {textContent: text, className: kind});

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("the server broke off");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write() {
  if (running) return;
  const own = running = new AbortController(), asked = body(), begin = performance.now();
  const busy = yes => { $("go").disabled = yes; $("halt").disabled = !yes };
  let unseen = "", timer = 0;
  const show = () => { answer.append(unseen); unseen = ""; timer = 0 };
  answer.textContent = "";
  say("waiting ...");
  busy(true);
  try {
    const response = await fetch("v1/completions", {method: "POST", signal: own.signal,
      headers: {"Content-Type": "application/json"}, body: JSON.stringify(asked)});
    if (!response.ok) throw new Error((await response.json()).error.message);
    answer.appendChild(Object.assign(document.createElement("span"),
      {textContent: asked.prompt, className: "soft"}));
    let reason = "";
    for await (const {error, choices, usage} of events(response)) {
      if (error) throw new Error(error.message);
      for (const choice of choices) {
        unseen += choice.text;
        timer ||= setTimeout(show, 40);  // tokens may come by the thousand a second
        reason = choice.finish_reason || reason;
      }
      if (usage) {
        const seconds = (performance.now() - begin) / 1000, count = usage.completion_tokens;
        const speed = Math.round(count / seconds);
        say(`${count} tokens in ${seconds.toFixed(1)} s, ${speed} a second; ` +
          (reason === "length" ? "it ends at the limit" : "the model or a stop ended it"));
      }
    }
  } catch (error) {
    if (own.signal.aborted) say("stopped");
    else say(error instanceof TypeError ? "The server can't be reached." : error.message, "error");
  } finally {
    clearTimeout(timer);
    show();
    running = null;
    busy(false);
  }
}
form.addEventListener("submit", event => { event.preventDefault(); write() });
$("halt").addEventListener("click", () => running && running.abort());
document.addEventListener("keydown", event => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
});
"""


def serve_page(model: str, facts: str, max_tokens: int, vocab_size: int) -> str:
    """The whole page.

    Args:
        model: as requests call it.
        facts: what it is, in a line.
        max_tokens: the most that a request may ask for.
        vocab_size: tokens of the model.
    """
    usual = Sampling()
    sliders = [
        _slider("temperature", 0, 2, 0.05, usual.temperature),
        _slider("top_p", 0.05, 1, 0.05, usual.top_p, off=1),
        _slider("top_k", 0, min(200, vocab_size), 1, 0, off=0),
        _slider("min_p", 0, 0.5, 0.01, usual.min_p, off=0),
        _slider("repetition_penalty", 1, 2, 0.05, usual.repetition_penalty, off=1),
        _slider("max_tokens", 1, max_tokens, 1, min(max_tokens, Request("").max_new_tokens)),
    ]
    body = f"""<header><h1>{escape(model)}</h1><p class="soft">{escape(facts)}</p></header>
<form id="form" class="try" data-model="{escape(model)}">
<div class="left"><div class="card"><label for="prompt">Prompt</label>
<textarea id="prompt" autofocus spellcheck="false"></textarea>
<div class="row"><button id="go" class="main">Write</button>
<button id="halt" type="button" disabled>Stop</button>
<span id="status" class="soft" role="status">Ctrl+Enter writes, too</span></div></div>
<div class="card"><p id="answer"></p></div></div>
<div class="card">{"".join(sliders)}
<label class="field">Seed<input id="seed" type="number" min="0" max="{2**53 - 1}"
placeholder="random"></label>
<label class="field">Stop before<input id="stop" placeholder="\\n ends at the line's end"></label>
</div></form>"""
    return page(model, body, STYLE, SCRIPT, connect="'self'")


def _slider(
    name: str, least: float, most: float, step: float, value: float, off: float | None = None
) -> str:
    """At `off` the option is left out of the request."""
    words = name.replace("_", " ").capitalize()
    idle = "" if off is None else f' data-off="{off:g}"'
    return (
        f'<label class="slider">{words}<span></span><input type="range" name="{name}" '
        f'min="{least:g}" max="{most:g}" step="{step:g}" value="{value:g}"{idle}></label>'
    )
