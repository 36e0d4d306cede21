// Asking the server, and telling what it answers.

const NUMBERS = ["max_new_tokens", "block_length", "steps", "threshold", "temperature", "top_p", "seed"];
// The request that runs, its clock, and what was told of it so far.
let running = null, ticking = null, clock = null;

const seconds = (value) => (value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(1)} s`);
const now = () => performance.now() / 1000;

function body() {
  const chat = $("chat").checked, text = $("prompt").value;
  const asked = { model: data.model, ...(chat ? { messages: [{ role: "user", content: text }] } : { prompt: text }) };
  for (const name of NUMBERS) {
    if ($(name).value !== "") asked[name === "max_new_tokens" ? "max_tokens" : name] = Number($(name).value);
  }
  if ($("cache").value) asked.cache = $("cache").value;
  if ($("more").value.trim()) Object.assign(asked, others($("more").value));
  return { ...asked, stream: true, draft: true };
}

function others(text) {
  let found;
  try {
    found = JSON.parse(text);
  } catch (error) {
    throw new Error(`The other settings are no JSON: ${error.message}`);
  }
  if (found === null || typeof found !== "object" || Array.isArray(found))
    throw new Error('The other settings must be a JSON object, such as {"refresh": 8}');
  return found;
}

async function generate() {
  if (running) return;
  fault(null);
  clearCanvas();
  $("answer").textContent = "";
  for (const id of ["passes", "filled", "rate", "first", "time", "waited", "share"]) $(id).textContent = "–";
  running = new AbortController();
  [$("go").disabled, $("stop").disabled] = [true, false];
  clock = { begin: now(), first: null, filled: 0 };
  ticking = setInterval(tell, 100);
  if (matchMedia("(max-width: 56rem)").matches) $("seen").scrollIntoView();
  say("asked");
  try {
    const asked = body();
    $("sent").textContent = JSON.stringify(asked, null, 2);
    await follow(asked, running.signal);
  } catch (error) {
    if (running.signal.aborted) say("stopped");
    else {
      say("failed");
      fault(error instanceof TypeError ? `The server does not answer: ${error.message}` : error.message);
    }
  } finally {
    clearInterval(ticking);
    running = null;
    [$("go").disabled, $("stop").disabled] = [false, true];
  }
}

async function follow(asked, signal) {
  const headers = { "Content-Type": "application/json", ...(data.key && { Authorization: `Bearer ${$("key").value}` }) };
  const path = asked.messages ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, { method: "POST", headers, signal, body: JSON.stringify(asked), cache: "no-store" });
  if (!response.ok) throw new Error(await refusal(response));
  say("waiting for a row");
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    // Of several answers the first is shown.
    for (const choice of event.choices) if (choice.index === 0) take(choice, asked);
  }
}

async function refusal(response) {
  try {
    return `${response.status}: ${(await response.json()).error.message}`;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

// The events of a stream, without the last.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const said = part.replace(/^data: /, "");
      if (said === "[DONE]") ended = true;
      else yield JSON.parse(said);
    }
  }
  if (!ended) throw new Error("The answer broke off");
}

function take(choice, asked) {
  $("answer").textContent += choice.text ?? choice.delta.content ?? "";
  if (choice.dkv) {
    if (!slots) {
      beginCanvas(choice.dkv, $("prompt").value, asked.block_length ?? data.settings.block_length);
      say("running");
    }
    takeDraft(choice.dkv);
    clock.filled = choice.dkv.stats?.new_tokens ?? choice.dkv.slots - choice.dkv.masked;
    if (choice.dkv.settled) clock.first ??= now() - clock.begin;
    clock.stats = choice.dkv.stats;
    tell();
  }
  if (choice.finish_reason) say(choice.finish_reason === "stop" ? "finished at an end" : "finished");
}

// Figures of this browser while it runs, and those of the server at the end.
function tell() {
  const { begin, first, filled, stats } = clock, passed = stats?.seconds ?? now() - begin;
  $("time").textContent = seconds(passed);
  if (!slots) return;
  $("passes").textContent = `${steps}`;
  $("filled").textContent = `${filled} / ${slots - prompt}`;
  $("rate").textContent = (stats?.tokens_per_second ?? filled / passed).toFixed(1);
  if ((stats?.first_token_seconds ?? first) !== null) $("first").textContent = seconds(stats?.first_token_seconds ?? first);
  if (stats) $("waited").textContent = seconds(stats.queued_seconds);
  $("share").textContent = percent(computed / told);
}

function say(state) {
  $("state").textContent = $("status").textContent = state;
}

function fault(message) {
  $("fault").hidden = message === null;
  $("fault").textContent = message ?? "";
  if (message !== null) $("fault").scrollIntoView({ block: "nearest" });
}

function build() {
  $("about").textContent = `dkv serve, prompts and answers of up to ${data.max_length} slots, ${data.policy}`;
  $("chat").checked = data.chat;
  $("chat").disabled = !data.chat;
  if (!data.chat) $("chat-note").textContent = "(the model has no chat template)";
  $("key-line").hidden = !data.key;
  for (const name of data.policies) $("cache").add(new Option(name, name));
  for (const [name, value] of Object.entries(data.settings)) $(name).placeholder = value ?? "–";
  $("max_new_tokens").max = data.max_length;
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
    else if (event.key === "Escape") running?.abort();
  });
  markBlocks(0);
  buildCanvas();
}

build();
