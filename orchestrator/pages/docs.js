// The API, browsable: what /openapi.json says, for people.
const METHODS = ["get", "head", "post", "put", "patch", "delete"];

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.className = className;
  made.append(text);
  return made;
}

/** A schema in a few words; what it refers to is shown below the operations. */
function words(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const options = schema.oneOf ?? schema.anyOf;
  if (options) return options.map(words).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `[${words(schema.items)}, …]`;
  if (schema.type === "object" && typeof schema.additionalProperties === "object") return `{…: ${words(schema.additionalProperties)}}`;
  return [schema.type ?? "any"].flat().join(" | ");
}

/** What a reference refers to. */
function resolved(thing) {
  return thing.$ref ? thing.$ref.slice(2).split("/").reduce((found, name) => found[name], spec) : thing;
}

function table(rows) {
  const made = element("table");
  for (const cells of rows) {
    const row = element("tr");
    row.append(...cells.map((cell) => element("td", cell)));
    made.append(row);
  }
  return made;
}

function operation(method, path, facts) {
  const made = element("details");
  const head = element("summary");
  head.append(element("code", `${method.toUpperCase()} ${path}`), ` — ${facts.summary ?? ""}`);
  made.append(head, element("p", facts.description ?? ""));
  const parameters = (facts.parameters ?? []).map((one) => [one.name, one.in, words(one.schema), one.description ?? ""]);
  if (parameters.length) made.append(element("h4", "Parameters"), table(parameters));
  const bodies = Object.entries(facts.requestBody?.content ?? {});
  if (bodies.length) made.append(element("h4", "Body"), table(bodies.map(([type, body]) => [type, words(body.schema)])));
  const answers = Object.entries(facts.responses ?? {}).map(([status, given]) => {
    const answer = resolved(given);
    const types = Object.entries(answer.content ?? {}).map(([type, body]) => `${type} ${words(body.schema)}`);
    return [status, types.join(", "), answer.description ?? ""];
  });
  made.append(element("h4", "Answers"), table(answers));
  return made;
}

function component(name, schema) {
  const made = element("details");
  made.id = name;
  made.append(element("summary", name), element("p", schema.description ?? ""));
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([field, facts]) => [
    required.has(field) ? field : `${field}?`,
    words(facts),
    facts.description ?? "",
  ]);
  made.append(table(rows));
  return made;
}

const key = sessionStorage.getItem("sandbox-key");
const answer = await fetch("/openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
const spec = await answer.json();
const place = document.getElementById("operations");
if (!answer.ok) {
  place.textContent = `${spec.detail} Enter the key in the console first, and come here from there.`;
  throw new Error(spec.detail);
}
const groups = new Map();
for (const [path, item] of Object.entries(spec.paths)) {
  for (const method of METHODS.filter((one) => item[one])) {
    const tag = item[method].tags?.[0] ?? "other";
    groups.set(tag, [...(groups.get(tag) ?? []), operation(method, path, item[method])]);
  }
}
document.getElementById("about").textContent = `${spec.info.title} ${spec.info.version}: ${spec.info.description ?? ""}`;
place.replaceChildren();
for (const [tag, made] of groups) place.append(element("h2", tag), ...made);
place.append(element("h2", "schemas"));
for (const [name, schema] of Object.entries(spec.components?.schemas ?? {})) place.append(component(name, schema));
