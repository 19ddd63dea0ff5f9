// Runs inside the sandbox: waits for one job, runs it, reports its value. The JavaScript sibling of bootstrap.py.
//
// Everything here happens in the user's reach; nothing outside trusts it.
"use strict";

const fs = require("node:fs");
const Module = require("node:module");
const { inspect, types } = require("node:util");
const { pathToFileURL } = require("node:url");
const vm = require("node:vm");

const VALUE_FD = 3;
const JOB_FD = 4;
const MAIN = `${process.cwd()}/main.js`;
const PARAMETERS = ["exports", "require", "module", "__filename", "__dirname"];
const OWN_FRAME = new RegExp(`^\\s+at (?:.*\\()?(?:async )?(?:node:|file://${__filename}:|${__filename}:)`);
const MODULE_WORD = /\b(import|export|await)\b/; // what is no script may be a module, if it has one of these
const MODULE_FAULT = /module|'export'|await/; // what V8 says of a script that has them
// Lambda's names of the facts in the context; a client's own facts keep theirs.
const FACTS = {
  aws_request_id: "awsRequestId",
  function_name: "functionName",
  function_version: "functionVersion",
  memory_limit_in_mb: "memoryLimitInMB",
  log_group_name: "logGroupName",
  log_stream_name: "logStreamName",
  invoked_function_arn: "invokedFunctionArn",
};

const importing = vm.constants?.USE_MAIN_CONTEXT_DEFAULT_LOADER;
const { stringify, parse } = JSON;
const now = process.hrtime.bigint;
const end = process.exit.bind(process);
let answer = null; // the one report of this job: JSON of its value or its error
let pending = null; // what ends the handler's call when nothing is left to wait for

// An error of the handler's contract, with the type that Lambda gives it.
class RuntimeFault extends Error {
  constructor(kind, message, cause) {
    super(message);
    this.kind = kind;
    this.origin = cause;
  }
}

function readAll(fd) {
  const chunks = [];
  const chunk = Buffer.allocUnsafe(65536);
  for (let count; (count = fs.readSync(fd, chunk)); ) {
    chunks.push(Buffer.from(chunk.subarray(0, count)));
  }
  fs.closeSync(fd);
  return Buffer.concat(chunks);
}

// Touch what every job needs: what is first used while a client waits costs it milliseconds.
async function warmUp() {
  const warn = process.emitWarning;
  process.emitWarning = () => {}; // node calls modules from text an experiment
  const facts = { event: {}, context: { function_name: "f" }, deadline: 0 };
  const module = await evaluateModule("import fs from 'node:fs'; export const handler = async () => import('node:os')");
  const script = evaluateScript(compileScript("exports.handler = (event) => import('node:os')"));
  for (const { handler } of [module, script]) {
    await call(handler, facts);
  }
  process.emitWarning = warn;
  encode({ n: [1.5, "text", null] });
  userStack(new Error("none"));
  inspect(new Error("none"));
  for (const stream of [process.stdout, process.stderr]) {
    stream._handle?.setBlocking?.(true); // else what a pipe has not yet taken is lost at an exit
  }
}

async function run(job) {
  try {
    Object.assign(process.env, job.env);
    process.argv = [process.execPath, MAIN, ...job.args];
    const exported = job.code === null ? undefined : await evaluate(job.code);
    const handler = await findHandler(job.handler, exported);
    if (handler === undefined) {
      return; // a script: it ends when nothing is left to wait for
    }
    const { value, waits } = await call(handler, job);
    pending = null;
    answer = `{"value":${encode(value)}}`;
    if (!waits) {
      end();
    }
  } catch (error) {
    fail(error);
  }
}

// Return what the code exports.
function evaluate(code) {
  let script;
  try {
    script = compileScript(code);
  } catch (error) {
    if (!MODULE_WORD.test(code)) {
      throw error;
    }
    script = error;
  }
  return script instanceof Error ? evaluateModule(code, script) : evaluateScript(script);
}

function compileScript(code) {
  const options = { filename: MAIN, ...(importing && { importModuleDynamically: importing }) };
  return vm.compileFunction(code.replace(/^#!.*/, ""), PARAMETERS, options);
}

function evaluateScript(script) {
  const main = new Module(MAIN, null);
  main.filename = MAIN;
  main.paths = Module._nodeModulePaths(process.cwd());
  process.mainModule = main;
  script.call(main.exports, main.exports, Module.createRequire(MAIN), main, MAIN, process.cwd());
  main.loaded = true;
  return main.exports;
}

// Evaluate code that as a script had this fault.
async function evaluateModule(code, fault) {
  const url = pathToFileURL(MAIN).href;
  const load = (specifier) => import(locate(specifier, url));
  let main;
  try {
    main = new vm.SourceTextModule(code, {
      identifier: MAIN,
      initializeImportMeta: (meta) => Object.assign(meta, { url, filename: MAIN, dirname: process.cwd() }),
      importModuleDynamically: load,
    });
  } catch (error) {
    throw MODULE_FAULT.test(fault.message) ? error : fault;
  }
  await main.link(async (specifier) => {
    const namespace = await load(specifier);
    const names = Object.keys(namespace);
    return new vm.SyntheticModule(names, function () {
      names.forEach((name) => this.setExport(name, namespace[name]));
    });
  });
  await main.evaluate();
  return main.namespace;
}

function locate(specifier, url) {
  if (/^\.{0,2}\//.test(specifier)) {
    return new URL(specifier, url).href;
  }
  if (Module.isBuiltin(specifier) || /^[a-z]+:/.test(specifier)) {
    return specifier;
  }
  return pathToFileURL(Module.createRequire(MAIN).resolve(specifier)).href;
}

// Return the handler, undefined for a script; it may be `module.function` of a workspace file.
async function findHandler(name, exported) {
  if (name === null) {
    return [exported?.handler, exported?.default?.handler, exported?.default, exported].find(isFunction);
  }
  const [owner, path] = splitHandler(name);
  const found = owner === null ? exported : await importFile(owner);
  const handler = [found, found?.default].map((from) => path.reduce((value, key) => value?.[key], from)).find(isFunction);
  if (handler === undefined) {
    const place = owner === null ? "the code" : `module '${owner}'`;
    throw new RuntimeFault("Runtime.HandlerNotFound", `Handler '${path.join(".")}' is undefined or not exported by ${place}`);
  }
  return handler;
}

// Return file and keys of `file.function`, where folders may be before the file and objects around the function.
function splitHandler(name) {
  const words = name.split(".");
  const splits = words.slice(1).map((_, at) => [words.slice(0, at + 1).join("/"), words.slice(at + 1)]);
  return splits.find(([owner]) => fileOf(owner)) ?? splits[0] ?? [null, words];
}

function fileOf(name) {
  return [".js", ".mjs", ".cjs"].map((suffix) => `${process.cwd()}/${name}${suffix}`).find(fs.existsSync);
}

function isFunction(value) {
  return typeof value === "function";
}

async function importFile(name) {
  const file = fileOf(name);
  if (file === undefined) {
    throw new RuntimeFault("Runtime.ImportModuleError", `Unable to import module '${name}': there is no ${name}.js`);
  }
  try {
    return await import(pathToFileURL(file).href);
  } catch (error) {
    if (error?.code === "MODULE_NOT_FOUND" || error?.code === "ERR_MODULE_NOT_FOUND") {
      throw new RuntimeFault("Runtime.ImportModuleError", `Unable to import module '${name}': ${error.message}`, error);
    }
    throw error;
  }
}

// Call the handler as AWS Lambda does. `waits`: it answered by its callback, and what it began is to end first.
async function call(handler, job) {
  let resolve, reject;
  const answered = new Promise((...both) => ([resolve, reject] = both));
  const context = contextOf(job);
  const done = (error, value) => {
    if (error === null || error === undefined) {
      resolve({ value, waits: context.callbackWaitsForEmptyEventLoop });
    } else {
      reject(error);
    }
  };
  Object.assign(context, { done, succeed: (value) => done(null, value), fail: (error) => done(error ?? "failed") });
  const returned = handler(job.event, context, done);
  if (isFunction(returned?.then)) {
    const unsettled = "The handler's promise never settled: nothing was left to wait for";
    pending = () => reject(new RuntimeFault("Runtime.NodeJsExit", unsettled));
    returned.then((value) => resolve({ value, waits: false }), reject);
  } else if (handler.length < 3) {
    return { value: returned, waits: false };
  } else {
    pending = () => resolve({ value: null, waits: false }); // as Lambda answers when no callback comes
  }
  return answered;
}

function contextOf(job) {
  const named = Object.entries(job.context).map(([name, fact]) => [FACTS[name] ?? name, fact]);
  return {
    callbackWaitsForEmptyEventLoop: true,
    identity: undefined,
    clientContext: undefined,
    ...Object.fromEntries(named),
    getRemainingTimeInMillis: () => Math.max(0, Math.floor(job.deadline * 1000 - Number(now()) / 1e6)),
  };
}

// Return the value as JSON.
function encode(value) {
  let text;
  try {
    text = stringify(value === undefined ? null : value);
  } catch (error) {
    throw new RuntimeFault("Runtime.MarshalError", `Unable to marshal response: ${error.message}`);
  }
  if (text === undefined) {
    throw new RuntimeFault("Runtime.MarshalError", `Unable to marshal response: a ${typeof value} is not JSON serializable`);
  }
  return text;
}

// Print the error with the user's frames, report type, message and stack trace, and end.
function fail(error) {
  pending = null;
  let facts = { type: "Error", message: "<error String() failed>", stack_trace: [] };
  let text = facts.message;
  try {
    const origin = error instanceof RuntimeFault ? error.origin : error;
    facts = { ...describe(error), stack_trace: types.isNativeError(origin) ? userStack(origin) : [] };
    text = types.isNativeError(origin) ? userText(origin) : `${facts.type}: ${facts.message}`;
  } catch {
    // the user's own getters and toString may throw anything
  }
  answer = `{"error":${stringify(facts)}}`;
  try {
    fs.writeSync(2, `${text}\n`);
  } catch {
    // the user's code closed stderr
  }
  end(1);
}

// Return type and message as Lambda has them: of what was thrown and is no error, its `typeof`.
function describe(error) {
  if (error instanceof RuntimeFault) {
    return { type: error.kind, message: plain(error.message) };
  }
  if (types.isNativeError(error)) {
    return { type: plain(error.name), message: plain(error.message) };
  }
  return { type: typeof error, message: plain(typeof error === "object" ? inspect(error) : error) };
}

// Return text that UTF-8 can carry.
function plain(value) {
  return Buffer.from(String(value)).toString();
}

function userStack(error) {
  const head = `${error.name}: ${error.message}`;
  const stack = String(error.stack);
  const lines = plain(stack.startsWith(head) ? stack.slice(head.length) : stack).split("\n");
  return lines.filter((line) => /^\s+at /.test(line) && !OWN_FRAME.test(line)).map((line) => line.trim());
}

function userText(error) {
  const kept = [];
  for (const line of inspect(error).split("\n")) {
    if (!OWN_FRAME.test(line)) {
      kept.push(line);
    } else if (line.endsWith(" {") && kept.length) {
      kept.push(`${kept.pop()} {`); // what follows are the error's own properties
    }
  }
  return kept.join("\n");
}

function watch() {
  process.on("exit", () => {
    for (let rest = Buffer.from(answer ?? ""); rest.length; ) {
      rest = rest.subarray(fs.writeSync(VALUE_FD, rest));
    }
  });
  process.on("beforeExit", () => pending?.());
  // The user's own listeners, where there are any, decide in the place of these.
  process.on("uncaughtException", (error) => {
    if (process.listenerCount("uncaughtException") === 1) {
      fail(error);
    }
  });
  process.on("unhandledRejection", (reason) => {
    if (process.listenerCount("unhandledRejection") === 1) {
      fail(new RuntimeFault("Runtime.UnhandledPromiseRejection", plain(describe(reason).message), reason));
    }
  });
}

warmUp().then(() => {
  pending = null;
  process.mainModule = undefined;
  fs.writeSync(VALUE_FD, "\n");
  const job = readAll(JOB_FD);
  if (!job.length) {
    end(); // the launcher gave this sandbox up
  }
  watch();
  return run(parse(job.toString()));
});
