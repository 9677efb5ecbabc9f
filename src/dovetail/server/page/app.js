// The page at "/": a chat, and what this engine can show of its answers. It loads nothing from other hosts.
// All text is set by textContent, so that nothing a model writes becomes markup.

const $ = (id) => document.getElementById(id);
const KEPT = "dovetail-chat"; // name in localStorage
const NUMBERS = ["temperature", "top_p", "min_p", "max_tokens", "seed"];

let messages = []; // {role, content, reasoning?}: what is sent, and what is kept
let model = null;
let running = null; // AbortController of the answer that is coming

// ---- what the server says of itself

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function explain(response) {
  const text = await response.text();
  let said = text;
  try { said = JSON.parse(text).error.message; } catch { /* the body is no JSON of OpenAI's shape: shown as it is */ }
  const remedy = response.status === 401 ? " Put the server's API key into the settings." : "";
  return `The server answered ${response.status}: ${said || response.statusText}.${remedy}`;
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw new Error(await explain(response));
  model = (await response.json()).data[0].id;
  $("model").textContent = model;
}

// The figures come from /metrics: lines such as  name_total{model_name="m",position="0"} 12.0
function readMetrics(text) {
  const unescape = (label) => label.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
  const found = { accepted: [], drafted: [], speculation: "" };
  for (const line of text.split("\n")) {
    const [, name, labels, value] = line.match(/^([\w:]+)\{(.*)\} (\S+)$/) ?? [];
    if (!name) continue;
    const position = labels.match(/position="(\d+)"/)?.[1];
    if (name === "vllm:spec_decode_num_accepted_tokens_per_pos_total") found.accepted[position] = Number(value);
    if (name === "dovetail_draft_tokens_per_position_total") found.drafted[position] = Number(value);
    if (name === "dovetail_speculation_info") found.speculation = unescape(labels.match(/why="((?:\\.|[^"\\])*)"/)[1]);
  }
  return found;
}

async function showMetrics() {
  let text;
  try {
    const response = await fetch("metrics", { headers: headers() });
    if (!response.ok) return;
    text = await response.text();
  } catch { return; } // only figures: a question says itself when the server is gone
  const { accepted, drafted, speculation } = readMetrics(text);
  $("speculation").textContent = speculation ? `speculation: ${speculation}` : "";
  $("positions").replaceChildren(...drafted.flatMap((count, place) => {
    const share = count ? (accepted[place] ?? 0) / count : 0;
    const meter = element("meter", { min: 0, max: 1, value: share });
    meter.setAttribute("aria-label", `draft ${place + 1} accepted`);
    return [element("span", {}, `draft ${place + 1}`), meter,
      element("span", {}, count ? `${Math.round(100 * share)} % of ${count}` : "none yet")];
  }));
  if (!drafted.some((count) => count)) $("positions").textContent = "No draft has been tried.";
}

// ---- the conversation

function element(name, properties = {}, text = null) {
  const made = Object.assign(document.createElement(name), properties);
  if (text !== null) made.textContent = text;
  return made;
}

function addMessage(role, content) {
  const article = element("article", { className: role });
  const text = element("div", { className: "text" }, content);
  article.append(element("h3", {}, role === "user" ? "You" : "Model"), text);
  $("log").append(article);
  $("log").scrollTop = $("log").scrollHeight;
  return { article, text };
}

function keep() {
  const settings = Object.fromEntries([...NUMBERS, "system"].map((name) => [name, $(name).value]));
  try { localStorage.setItem(KEPT, JSON.stringify({ messages, settings })); } catch { /* full or forbidden: in memory */ }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEPT));
    for (const [name, value] of Object.entries(kept?.settings ?? {})) $(name).value = value;
    messages = kept?.messages ?? [];
  } catch { messages = []; }
  for (const message of messages) {
    const { article, text } = addMessage(message.role, message.content);
    if (message.reasoning) article.insertBefore(foldable(message.reasoning).box, text);
  }
}

function foldable(content = "") {
  const box = element("details", { className: "reasoning" });
  const text = element("div", { className: "text" }, content);
  box.append(element("summary", {}, "Reasoning"), text);
  return { box, text };
}

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function request() {
  const system = $("system").value.trim();
  const sent = messages.map(({ role, content }) => ({ role, content }));
  const numbers = NUMBERS.filter((name) => $(name).value !== "").map((name) => [name, Number($(name).value)]);
  return {
    model, stream: true, stream_options: { include_usage: true }, token_details: true, routed_experts: true,
    ...Object.fromEntries(numbers),
    messages: system ? [{ role: "system", content: system }, ...sent] : sent,
  };
}

// ---- one answer

class Answer {
  constructor() {
    const { article, text } = addMessage("assistant", "");
    this.article = article;
    this.messages = messages; // a new chat may have begun before this ends
    this.into = { content: text };
    this.written = { content: "", reasoning: "" };
    this.tokens = []; // details of all, in order
    this.waiting = []; // tokens without text yet: part of a character, or of a possible stop string
    this.chosen = -1;
    this.start = performance.now();
    this.first = null;
    this.finish = null;
    this.usage = null;
    article.answer = this;
    article.tabIndex = 0;
    article.setAttribute("aria-label", "Answer. Left and right arrow keys choose a token.");
  }

  take(event) {
    if (event.error) throw new Error(`The server stopped: ${event.error.message ?? event.error}`);
    this.usage = event.usage ?? this.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    this.finish = choice.finish_reason ?? this.finish;
    const delta = choice.delta ?? {};
    const details = choice.tokens ?? [];
    const reasoning = delta.reasoning_content ?? delta.reasoning;
    if (details.length || delta.content || reasoning) this.first ??= performance.now();
    this.waiting.push(...details);
    if (reasoning) this.write("reasoning", reasoning, delta.content ? [] : details);
    if (delta.content) this.write("content", delta.content, details);
    this.tokens.push(...details);
    for (const call of delta.tool_calls ?? []) this.write("content", toolText(call), details);
  }

  // A span for each token where their texts add up to what came; else one span for all of them.
  write(kind, text, details) {
    this.written[kind] += text;
    if (kind === "reasoning" && !this.into.reasoning) {
      const { box, text: inside } = foldable();
      this.article.insertBefore(box, this.into.content);
      this.into.reasoning = inside;
    }
    const spans = [];
    if (details.map((token) => token.text).join("") === text && details.length) {
      for (const token of details) {
        if (token.text) spans.push([token.text, this.waiting.splice(0, this.waiting.indexOf(token) + 1)]);
      }
    } else {
      spans.push([text, this.waiting.splice(0)]);
    }
    for (const [part, tokens] of spans) {
      const span = element("span", { className: "token" }, part);
      span.tokens = tokens;
      if (tokens.some((token) => token.is_draft)) {
        span.classList.add("draft");
        span.title = "an accepted draft";
      }
      this.into[kind].append(span);
    }
  }

  figures() {
    const count = this.usage?.completion_tokens ?? this.tokens.length;
    const now = performance.now();
    const parts = [`${count} tokens`];
    if (this.first && count > 1) parts.push(`${(1000 * (count - 1) / (now - this.first)).toFixed(1)} tokens/s`);
    if (this.first) parts.push(`first after ${((this.first - this.start) / 1000).toFixed(2)} s`);
    const drafts = this.tokens.filter((token) => token.is_draft).length;
    if (this.tokens.length) parts.push(`${drafts} accepted drafts`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) parts.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens from the prefix cache`);
    if (this.finish === "length") parts.push("cut at the longest answer");
    return parts.join(" · ");
  }

  close(note) {
    const text = note ? `${this.figures()} · ${note}` : this.figures();
    this.article.append(element("p", { className: "figures" }, text));
    this.messages.push({ role: "assistant", content: this.written.content, reasoning: this.written.reasoning });
    if (this.messages === messages) showMap(this.tokens);
  }

  choose(place) {
    const spans = this.article.querySelectorAll(".token");
    if (!spans.length) return;
    this.chosen = Math.max(0, Math.min(place, spans.length - 1));
    document.querySelectorAll(".token.chosen").forEach((span) => span.classList.remove("chosen"));
    const span = spans[this.chosen];
    const fold = span.closest("details");
    if (fold) fold.open = true;
    span.classList.add("chosen");
    span.scrollIntoView({ block: "nearest" });
    showTokens(span.textContent, span.tokens);
  }
}

function toolText(call) {
  const { name, arguments: given } = call.function ?? {};
  return (name ? `${name} ` : "") + (given ?? "");
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r?\n/);
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function ask() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || running) return;
  showError("");
  running = new AbortController();
  let answer = null;
  let outcome = "The answer is complete.";
  try {
    if (!model) await findModel();
    messages.push({ role: "user", content: prompt });
    addMessage("user", prompt);
    $("prompt").value = "";
    busy("Waiting for the first token.");
    const body = JSON.stringify(request());
    const options = { method: "POST", headers: headers(), body, signal: running.signal };
    const response = await fetch("v1/chat/completions", options);
    if (!response.ok) throw new Error(await explain(response));
    answer = new Answer();
    for await (const event of events(response)) {
      answer.take(event);
      $("log").scrollTop = $("log").scrollHeight;
      $("rate").textContent = answer.figures(); // not read out, as the status is
    }
    answer.close(answer.finish ? "" : "the stream was cut off");
    if (!answer.finish) showError("The stream ended before the answer did.");
  } catch (error) {
    const isStopped = error.name === "AbortError";
    outcome = isStopped ? "Stopped." : ""; // an error is read out itself
    if (answer) answer.close(isStopped ? "stopped" : "broken off");
    else if (messages.at(-1)?.role === "user") takeBack(prompt);
    if (!isStopped) showError(error instanceof TypeError ? "The server cannot be reached; is it running?" : error.message);
  }
  running = null;
  busy(null);
  $("status").textContent = outcome;
  keep();
  showMetrics();
}

// What was not answered goes back to where it was written.
function takeBack(prompt) {
  messages.pop();
  $("log").lastElementChild.remove();
  $("prompt").value ||= prompt;
}

function busy(status) {
  $("send").disabled = status !== null;
  $("stop").disabled = status === null;
  $("log").setAttribute("aria-busy", status !== null);
  $("rate").textContent = "";
  $("status").textContent = status ?? "";
}

// ---- experts

// Fill a canvas of layers (down) by experts (across); counts[layer][expert] is how dark a cell is.
function draw(canvas, counts) {
  const experts = Math.max(...counts.map((row) => row.length));
  const cell = Math.max(2, Math.min(12, Math.floor(640 / experts)));
  canvas.width = cell * experts;
  canvas.height = cell * counts.length;
  const context = canvas.getContext("2d");
  context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
  const most = Math.max(1, ...counts.flat().filter(Boolean));
  counts.forEach((row, layer) => row.forEach((count, expert) => {
    if (!count) return;
    context.globalAlpha = 0.15 + 0.85 * count / most;
    context.fillRect(expert * cell, layer * cell, cell, cell);
  }));
}

let numExperts = 0; // as many as have been seen

function countExperts(tokens) {
  const counts = [];
  for (const token of tokens) {
    (token.experts ?? []).forEach((experts, layer) => {
      counts[layer] ??= [];
      for (const expert of experts) {
        counts[layer][expert] = (counts[layer][expert] ?? 0) + 1;
        numExperts = Math.max(numExperts, expert + 1);
      }
    });
  }
  return counts.map((row) => Array.from({ length: numExperts }, (_, expert) => row[expert] ?? 0));
}

function showTokens(text, tokens) {
  const parts = [element("p", {}, "")];
  parts[0].append(element("code", {}, text));
  for (const token of tokens) {
    const facts = [`id ${token.id}`, token.is_draft ? "accepted draft" : "drawn by the model"];
    if (token.logprob != null) facts.push(`log-probability ${token.logprob.toFixed(3)}`);
    if (token.sampler_logprob != null) facts.push(`as sampled ${token.sampler_logprob.toFixed(3)}`);
    parts.push(element("p", {}, facts.join(", ")));
  }
  const counts = countExperts(tokens);
  const lines = counts.map((row, layer) => {
    const chosen = row.flatMap((count, expert) => (count ? [expert] : []));
    return `MoE layer ${layer + 1}: ${chosen.join(", ")}`;
  });
  if (lines.length) {
    const list = element("details");
    list.append(element("summary", {}, "Experts by number"), ...lines.map((line) => element("div", {}, line)));
    parts.push(list);
  } else {
    parts.push(element("p", {}, tokens.length ? "The server told no experts." : "Nothing is known of this text."));
  }
  $("chosen").replaceChildren(...parts);
  $("strip").hidden = !lines.length;
  if (lines.length) {
    draw($("strip"), counts);
    $("strip").setAttribute("aria-label", `MoE layers down, experts across. ${lines.join("; ")}`);
  }
}

let mapCounts = [];

function showMap(tokens) {
  mapCounts = countExperts(tokens);
  $("map-section").hidden = !mapCounts.length;
  if (!mapCounts.length) return;
  draw($("map"), mapCounts);
  const met = mapCounts.flat().filter(Boolean).length;
  const text = `${met} of ${mapCounts.length * numExperts} experts in ${mapCounts.length} MoE layers (down) met the`
    + ` answer's ${tokens.length} tokens.`;
  $("map-text").textContent = text;
  $("map").setAttribute("aria-label", text);
}

function pointAtMap(event) {
  const box = $("map").getBoundingClientRect();
  const layer = Math.floor((event.clientY - box.top) / box.height * mapCounts.length);
  const expert = Math.floor((event.clientX - box.left) / box.width * numExperts);
  const count = mapCounts[layer]?.[expert];
  if (count !== undefined) $("map").title = `MoE layer ${layer + 1}, expert ${expert}: ${count} tokens`;
}

// ---- what the reader does

$("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(); }
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("log").addEventListener("click", (event) => {
  const span = event.target.closest(".token");
  const answer = span?.closest("article")?.answer;
  if (answer) answer.choose([...answer.article.querySelectorAll(".token")].indexOf(span));
});
$("log").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const answer = event.target.answer;
  if (!answer || !step) return;
  event.preventDefault();
  answer.choose(answer.chosen + step);
});
$("map").addEventListener("mousemove", pointAtMap);
$("settings").addEventListener("change", () => { if (!model) start(); keep(); });
$("new-chat").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("map-section").hidden = $("strip").hidden = true;
  $("chosen").replaceChildren();
  showError("");
  keep();
  $("prompt").focus();
});

async function start() {
  try { await findModel(); showError(""); } catch (error) { showError(error.message); }
  showMetrics();
}

restore();
start();
