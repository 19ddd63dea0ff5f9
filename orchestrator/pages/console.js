// The console: sessions, code with streamed output, files, a terminal. It speaks the API that everybody has.
const $ = (id) => document.getElementById(id);
const KEY = "sandbox-key"; // in the tab's session storage: gone with the tab
const LINES = 2000; // of the terminal that are kept
let sid = null;
let running = null; // {id, stop}
let socket = null;
const contexts = new Map(); // session → the context that keeps its variables

class Problem extends Error {}

async function call(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...options.headers };
  const response = await fetch(path, { ...options, headers });
  if (response.status === 401) login(key ? "This key is not valid." : "");
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Problem(problem.detail ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

const ask = async (path, options) => (await call(path, options)).json();
const send = (path, method, body) =>
  call(path, { method, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
const here = (rest = "") => `/v1/sessions/${encodeURIComponent(sid)}${rest}`;
const filePath = (path) => here(`/files/${path.split("/").map(encodeURIComponent).join("/")}`);

function element(name, text = "", properties = {}) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(text);
  return made;
}

/** Run what a person asked for; what goes wrong is shown, not thrown. */
async function attempt(work) {
  $("problem").textContent = "";
  try {
    return await work();
  } catch (error) {
    $("problem").textContent = error instanceof Problem ? error.message : `${error}`;
    return undefined;
  }
}

function login(text) {
  sessionStorage.removeItem(KEY);
  $("key-error").textContent = text;
  if (!$("login").open) $("login").showModal();
}

// --- sessions and pools

async function look() {
  const ready = await (await fetch("/ready")).json();
  $("state").textContent = ready.ready ? "ready for sessions" : `not ready: ${ready.reasons.join("; ")}`;
  $("forget").hidden = !sessionStorage.getItem(KEY);
  const [{ sessions }, { pools }] = await Promise.all([ask("/v1/sessions?limit=1000"), ask("/v1/pool")]);
  if (sid !== null && !sessions.some((session) => session.id === sid)) choose(null);
  $("sessions").replaceChildren(...sessions.map(sessionRow));
  $("pools").tBodies[0].replaceChildren(
    ...pools.map((pool) => {
      const row = element("tr");
      const cells = [pool.template, `${pool.ready}/${pool.target}`, pool.starting, pool.waiting, pool.hits];
      row.append(...cells.map((cell) => element("td", `${cell}`)));
      return row;
    }),
  );
}

function sessionRow(session) {
  const row = element("li", "", { className: session.id === sid ? "chosen" : "" });
  const open = element("button", session.id, { type: "button", title: `expires ${session.expires_at}` });
  open.onclick = () => attempt(() => choose(session.id));
  const end = element("button", "End", { type: "button" });
  end.onclick = () => attempt(async () => {
    await call(`/v1/sessions/${encodeURIComponent(session.id)}`, { method: "DELETE" });
    await look();
  });
  row.append(open, end);
  return row;
}

async function choose(id) {
  sid = id;
  closeTerminal();
  $("work").hidden = id === null;
  $("sid").textContent = id ?? "";
  $("output").replaceChildren();
  $("outcome").textContent = "";
  for (const row of $("sessions").children) row.className = row.firstChild.textContent === id ? "chosen" : "";
  if (id !== null) await listFiles();
}

// --- executions

/** Yield the server-sent events of a response: what is read of it, cut at the empty lines. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = block.split("\n").filter((line) => !line.startsWith(":"));
      const data = fields.filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trimStart());
      const kind = fields.find((line) => line.startsWith("event:"))?.slice(6).trim();
      if (data.length) yield { kind, data: JSON.parse(data.join("\n")) };
    }
  }
}

async function contextOf(session) {
  if (!contexts.has(session)) {
    const made = await (await send(here("/contexts"), "POST", {})).json();
    contexts.set(session, made.id);
  }
  return contexts.get(session);
}

async function run() {
  const output = $("output");
  output.replaceChildren();
  $("outcome").textContent = "running…";
  $("run").disabled = true;
  const body = { language: $("language").value, code: $("code").value, timeout_s: Number($("timeout").value) };
  try {
    if ($("keep").checked) body.context_id = await contextOf(sid);
    else if (body.language !== "shell" && $("event").value.trim()) body.event = JSON.parse($("event").value);
    const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
    const response = await call(here("/executions"), { method: "POST", headers, body: JSON.stringify(body) });
    for await (const { kind, data } of eventsOf(response)) show(kind, data);
  } catch (error) {
    $("outcome").textContent = "";
    throw error instanceof SyntaxError ? new Problem(`The event is no JSON: ${error.message}`) : error;
  } finally {
    running = null;
    $("run").disabled = false;
    $("stop").disabled = true;
  }
  await listFiles();
}

function show(kind, data) {
  const output = $("output");
  if (kind === "started") {
    running = data.id ?? data.execution_id ?? null;
    $("stop").disabled = running === null;
  } else if (kind === "stdout" || kind === "stderr") {
    output.append(element("span", data.text, { className: kind }));
  } else if (kind === "display") {
    output.append(displayed(data));
  } else if (kind === "done") {
    $("outcome").textContent = `${data.outcome} in ${((data.usage?.wall_s ?? 0) * 1000).toFixed(0)} ms`;
    if (data.error && data.outcome !== "error") output.append(element("span", data.error.message, { className: "stderr" }));
    if (data.value !== null && data.value !== undefined) {
      output.append(element("span", `\n→ ${JSON.stringify(data.value)}`, { className: "value", id: "value" }));
    }
  }
  output.scrollTop = output.scrollHeight;
}

/** The richest form of what was displayed that is safe to show: never markup of the sandbox. */
function displayed(forms) {
  const image = { "image/png": "base64,", "image/jpeg": "base64,", "image/svg+xml": "" };
  for (const [type, encoding] of Object.entries(image)) {
    if (typeof forms[type] === "string") {
      const data = encoding ? forms[type] : `charset=utf-8,${encodeURIComponent(forms[type])}`;
      return element("img", "", { src: `data:${type};${encoding}${data}`, alt: "displayed image" });
    }
  }
  const text = forms["text/plain"] ?? JSON.stringify(forms["application/json"] ?? forms);
  return element("span", `${text}\n`, { className: "display" });
}

// --- files

async function listFiles() {
  const { files } = await ask(here("/files?recursive=true"));
  $("files").tBodies[0].replaceChildren(...files.map(fileRow));
}

function fileRow(file) {
  const row = element("tr");
  const name = element("td");
  if (file.type === "file") {
    const open = element("button", file.path, { type: "button", title: "Download" });
    open.onclick = () => attempt(() => download(file.path));
    name.append(open);
  } else {
    name.append(file.path);
  }
  const remove = element("button", "Delete", { type: "button" });
  remove.onclick = () => attempt(async () => {
    await call(`${filePath(file.path)}?recursive=true`, { method: "DELETE" });
    await listFiles();
  });
  const last = element("td");
  last.append(remove);
  row.append(name, element("td", file.type === "file" ? `${file.size_bytes} B` : file.type), last);
  return row;
}

async function download(path) {
  const url = URL.createObjectURL(await (await call(filePath(path))).blob());
  element("a", "", { href: url, download: path.split("/").pop() }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

async function upload(list) {
  for (const file of list) await call(filePath(file.name), { method: "PUT", body: file });
  await listFiles();
}

// --- terminal: a plain one (TERM=dumb), so that what programs send is text with carriage returns and backspaces

const KEYS = { Enter: "\r", Backspace: "\x7f", Tab: "\t", Escape: "\x1b", ArrowUp: "\x1b[A", ArrowDown: "\x1b[B", ArrowRight: "\x1b[C", ArrowLeft: "\x1b[D", Delete: "\x1b[3~", Home: "\x1b[H", End: "\x1b[F" };
const screen = { lines: [""], column: 0 };

function write(text) {
  // eslint-disable-next-line no-control-regex
  for (const letter of text.replace(/\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]/g, "")) {
    const line = screen.lines.at(-1);
    if (letter === "\n") screen.lines.push("");
    if (letter === "\n" || letter === "\r") screen.column = 0;
    else if (letter === "\b") screen.column = Math.max(0, screen.column - 1);
    else if (letter >= " " || letter === "\t") {
      screen.lines[screen.lines.length - 1] = line.slice(0, screen.column) + letter + line.slice(screen.column + 1);
      screen.column += 1;
    }
  }
  screen.lines.splice(0, screen.lines.length - LINES);
  $("terminal").textContent = screen.lines.join("\n");
  $("terminal").scrollTop = $("terminal").scrollHeight;
}

function openTerminal() {
  const key = sessionStorage.getItem(KEY);
  const encoded = key && btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const url = new URL(here("/terminal?term=dumb&cols=100&rows=24"), location.href.replace(/^http/, "ws"));
  Object.assign(screen, { lines: [""], column: 0 });
  socket = new WebSocket(url, ["terminal", ...(encoded ? [`bearer.${encoded}`] : [])]);
  socket.binaryType = "arraybuffer";
  const decoder = new TextDecoder();
  socket.onmessage = ({ data }) => {
    if (typeof data !== "string") return write(decoder.decode(data, { stream: true }));
    const said = JSON.parse(data);
    return write(said.type === "exit" ? `\n[ended with ${said.exit_code}]\n` : `\n[${said.problem?.detail ?? data}]\n`);
  };
  socket.onclose = closeTerminal;
  $("terminal").hidden = false;
  $("terminal-open").disabled = true;
  $("terminal-close").disabled = false;
  $("terminal").focus();
}

function closeTerminal() {
  socket?.close();
  socket = null;
  $("terminal-open").disabled = false;
  $("terminal-close").disabled = true;
}

const type = (text) => socket?.readyState === WebSocket.OPEN && socket.send(new TextEncoder().encode(text));

function press(event) {
  let text = KEYS[event.key] ?? (event.key.length === 1 ? event.key : null);
  if (text === null || event.metaKey || event.altKey) return;
  if (event.ctrlKey) {
    if (!/^[a-z[\\\]]$/i.test(event.key)) return;
    text = String.fromCharCode(event.key.toUpperCase().charCodeAt(0) & 31);
  }
  event.preventDefault();
  type(text);
}

// --- life

$("key-form").onsubmit = () => {
  sessionStorage.setItem(KEY, $("key").value);
  $("key").value = "";
  setTimeout(() => attempt(begin));
};
$("forget").onclick = () => login("");
$("new-session").onsubmit = (event) => {
  event.preventDefault();
  attempt(async () => {
    const session = await (await send("/v1/sessions", "POST", { template: $("template").value })).json();
    await look();
    await choose(session.id);
  });
};
$("run-form").onsubmit = (event) => {
  event.preventDefault();
  attempt(run);
};
$("stop").onclick = () => attempt(() => running && call(here(`/executions/${running}`), { method: "DELETE" }));
$("upload").onchange = () => attempt(async () => {
  await upload($("upload").files);
  $("upload").value = "";
});
$("refresh").onclick = () => attempt(listFiles);
$("terminal-open").onclick = () => attempt(openTerminal);
$("terminal-close").onclick = closeTerminal;
$("terminal").onkeydown = press;
$("terminal").onpaste = (event) => {
  event.preventDefault();
  type(event.clipboardData.getData("text").replaceAll("\n", "\r"));
};

async function begin() {
  const { templates } = await ask("/v1/templates");
  $("template").replaceChildren(...templates.map((template) => element("option", template.name)));
  await look();
}

attempt(begin);
setInterval(() => $("login").open || attempt(look), 3000);
