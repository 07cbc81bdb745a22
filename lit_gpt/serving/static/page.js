const $ = id => document.getElementById(id);
const form = $("form"), answer = $("answer"), sliders = document.querySelectorAll(".slider input");
let running = null;  // the AbortController of the current request

const isOff = slider => Number(slider.dataset.off) === Number(slider.value);
for (const slider of sliders) {
  const label = slider.previousElementSibling;
  const show = () => label.textContent = isOff(slider) ? "off" : slider.value;
  slider.addEventListener("input", show);
  show();
}

// The key is kept until the tab is closed, and hidden once it has worked.
const keyField = $("key-field");
if (keyField) keyField.hidden = Boolean(sessionStorage.getItem("api_key"));

function requestHeaders() {
  const headers = {"Content-Type": "application/json"};
  if (keyField) {
    const key = keyField.hidden ? sessionStorage.getItem("api_key") : $("key").value.trim();
    if (key) headers.Authorization = `Bearer ${key}`;
  }
  return headers;
}

function rememberKey(isRight) {
  if (!keyField || (isRight && keyField.hidden)) return;
  if (isRight) sessionStorage.setItem("api_key", $("key").value.trim());
  else sessionStorage.removeItem("api_key");
  keyField.hidden = isRight;
  if (!isRight) $("key").focus();
}

function requestBody() {
  const body = {
    model: form.dataset.model, prompt: $("prompt").value,
    stream: true, stream_options: {include_usage: true},
  };
  for (const slider of sliders) if (!isOff(slider)) body[slider.name] = Number(slider.value);
  if ($("seed").value !== "") body.seed = Number($("seed").value);
  const escapes = {n: "\n", t: "\t", "\\": "\\"};
  const stop = $("stop").value.replace(/\\([nt\\])/g, (_, letter) => escapes[letter]);
  if (stop) body.stop = stop;
  return body;
}

function showStatus(text, className = "soft") {
  Object.assign($("status"), {textContent: text, className});
}

function setRunning(controller) {
  running = controller;
  $("write").disabled = Boolean(controller);
  $("stop-writing").disabled = !controller;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("The server closed the connection.");
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
  const controller = new AbortController(), body = requestBody(), start = performance.now();
  let pending = "", timer = 0, reason = "";
  const showPending = () => { answer.append(pending); pending = ""; timer = 0 };
  setRunning(controller);
  answer.textContent = "";
  showStatus("waiting ...");
  try {
    const response = await fetch("v1/completions", {
      method: "POST", signal: controller.signal,
      headers: requestHeaders(), body: JSON.stringify(body),
    });
    rememberKey(response.status !== 401);
    if (!response.ok) throw new Error((await response.json()).error.message);
    const prompt = document.createElement("span");
    answer.append(Object.assign(prompt, {textContent: body.prompt, className: "soft"}));
    for await (const {error, choices, usage} of events(response)) {
      if (error) throw new Error(error.message);
      for (const choice of choices) {
        pending += choice.text;
        timer ||= setTimeout(showPending, 40);  // there may be thousands of tokens per second
        reason = choice.finish_reason || reason;
      }
      if (usage) {
        const seconds = (performance.now() - start) / 1000, count = usage.completion_tokens;
        showStatus(`${count} tokens in ${seconds.toFixed(1)} s, ` +
          `${Math.round(count / seconds)} tokens/s; ended by ` +
          (reason === "length" ? "the token limit" : "the model or a stop sequence"));
      }
    }
  } catch (error) {
    if (controller.signal.aborted) showStatus("stopped");
    else showStatus(error instanceof TypeError ? "The server can't be reached." : error.message, "error");
  } finally {
    clearTimeout(timer);
    showPending();
    setRunning(null);
  }
}

form.addEventListener("submit", event => { event.preventDefault(); write() });
$("stop-writing").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", event => {
  if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  form.requestSubmit();
});
