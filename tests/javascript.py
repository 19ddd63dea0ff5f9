"""What JavaScript does, row by row: for the local engine, where the host has node, and for the image."""

from typing import Any, NamedTuple

ABORT = 134
FILES = {
    "lib.js": "exports.main = (event) => ({ got: event }); exports.deep = { fn: async () => 'deep' }",
    "esm.mjs": "import os from 'node:os'; export const main = async (event) => [event, os.type()]",
    "src/deep/app.js": "exports.main = async () => __filename",
    "broken.js": "require('not-there')",
    "wrong.js": "exports.main = ;",
}
WRITE_FILES = "import os\nos.makedirs('src/deep')\n" + "\n".join(
    f"open({name!r}, 'w').write({text!r})" for name, text in FILES.items()
)


class Row(NamedTuple):
    """Code, or other fields of the request, and how its execution ends."""

    name: str
    fields: dict[str, Any]
    value: Any = None
    stdout: str = ""
    exit_code: int = 0
    error: str | None = None
    message: str | None = None
    stack: list[str] | None = None


def code(text: str, **fields: Any) -> dict[str, Any]:
    """Return the request for code."""
    return {"code": text} | fields


def handler(body: str, arguments: str = "event, context", **fields: Any) -> dict[str, Any]:
    """Return the request for an asynchronous handler with this body."""
    return code(f"exports.handler = async ({arguments}) => {{ {body} }}", **fields)


ROWS = [
    Row("a script", code("console.log('hi')"), stdout="hi\n"),
    Row("a script with a first line for the shell", code("#!/usr/bin/env node\nconsole.log(1)"), stdout="1\n"),
    Row("a script that waits", code("setTimeout(() => console.log('late'), 20)"), stdout="late\n"),
    Row("arguments", code("console.log(process.argv.slice(2))", args=["a", "b c"]), stdout="[ 'a', 'b c' ]\n"),
    Row("environment", code("console.log(process.env.A)", env={"A": "é"}), stdout="é\n"),
    Row("stdin", code("process.stdin.on('data', (d) => console.log(String(d)))", stdin="in"), stdout="in\n"),
    Row("main", code("console.log(require.main === module, __filename)"), stdout="true /workspace/main.js\n"),
    Row("much output before an exit", code("console.log('x'.repeat(500000)); process.exit(0)"), stdout="x" * 500000 + "\n"),
    # --- handlers
    Row("an async handler", handler("return event.a + 1", event={"a": 1}), 2),
    Row("a plain handler", code("exports.handler = (event) => [event]", event=None), [None]),
    Row("module.exports", code("module.exports = { handler: async () => 'm' }"), "m"),
    Row("module.exports itself", code("module.exports = async () => 'm'"), "m"),
    Row("a handler of another name", code("exports.main = () => 5", handler="main"), 5),
    Row("a callback", code("exports.handler = (e, c, done) => setTimeout(() => done(null, 'later'), 20)"), "later"),
    Row("a callback that fails", code("exports.handler = (e, c, done) => done(new TypeError('no'))"), exit_code=1, error="TypeError"),
    Row("a callback, and what it began", code("exports.handler = (e, c, done) => { done(null, 1); setTimeout(() => console.log('after'), 20) }"), 1, "after\n"),
    Row("a callback that waits for nothing", code("exports.handler = (e, c, done) => { c.callbackWaitsForEmptyEventLoop = false; done(null, 1); setTimeout(() => console.log('after'), 60000) }"), 1),
    Row("a callback that never comes", code("exports.handler = (e, c, done) => {}")),
    Row("what an async handler leaves running", handler("setInterval(() => {}, 1000); return 1"), 1),
    Row("a promise that never settles", code("exports.handler = () => new Promise(() => {})"), exit_code=1, error="Runtime.NodeJsExit"),
    Row("nothing returned", handler("")),
    Row("not a number", handler("return [NaN, undefined, 1.5]"), [None, None, 1.5]),
    Row("a date", handler("return new Date(0)"), "1970-01-01T00:00:00.000Z"),
    Row("context", handler("return [context.functionVersion, context.memoryLimitInMB, context.awsRequestId.length > 5, context.getRemainingTimeInMillis() > 1000]"), ["$LATEST", "128", True, True]),
    Row("the client's context", handler("return [context.functionName, context.tenant]", context={"function_name": "f", "tenant": 7}), ["f", 7]),
    Row("no thread goes before the agent", handler("const fs = require('fs'), tasks = '/proc/self/task'; return fs.readdirSync(tasks).every((task) => fs.readFileSync(`${tasks}/${task}/stat`, 'latin1').split(') ').pop().split(' ')[16] >= 5)"), True),
    # --- files of the workspace
    Row("a handler of a file", {"handler": "lib.main", "event": [1]}, {"got": [1]}),
    Row("a nested handler of a file", {"handler": "lib.deep.fn"}, "deep"),
    Row("a handler of a file in a folder", {"handler": "src.deep.app.main"}, "/workspace/src/deep/app.js"),
    Row("a handler of an ES module", {"handler": "esm.main", "event": 1}, [1, "Linux"]),
    Row("require of a file", handler("return require('./lib').main(2)"), {"got": 2}),
    Row("import() of a file", handler("return (await import('./lib.js')).main(2)"), {"got": 2}),
    Row("a file that is not there", {"handler": "gone.main"}, exit_code=1, error="Runtime.ImportModuleError"),
    Row("a file that requires what is not there", {"handler": "broken.main"}, exit_code=1, error="Runtime.ImportModuleError"),
    Row("a file that is wrong", {"handler": "wrong.main"}, exit_code=1, error="SyntaxError"),
    Row("a handler that the file lacks", {"handler": "lib.nope"}, exit_code=1, error="Runtime.HandlerNotFound"),
    Row("a handler that the code lacks", code("exports.a = 1", handler="b"), exit_code=1, error="Runtime.HandlerNotFound"),
    # --- ES modules
    Row("import and export", code("import { deep } from './lib.js'\nimport fs from 'fs'\nexport const handler = async (event) => [event, await deep.fn(), typeof fs.readFileSync, import.meta.filename]", event=1), [1, "deep", "function", "/workspace/main.js"]),
    Row("an export default", code("export default async (event) => event", event=1), 1),
    Row("await at the top", code("console.log(await Promise.resolve(5))"), stdout="5\n"),
    Row("a module with a syntax error", code("import fs from 'fs'\nlet x = ;"), exit_code=1, error="SyntaxError", message="Unexpected token ';'"),
    Row("a script with a syntax error and a word of modules", code("let x = ; // await"), exit_code=1, error="SyntaxError", message="Unexpected token ';'"),
    Row("an import of what is not there", code("import 'not-there'"), exit_code=1, error="Error"),
    # --- ends
    Row("process.exit(3)", code("console.log('x'); process.exit(3)"), stdout="x\n", exit_code=3),
    Row("process.exit() in a handler", handler("process.exit()")),
    Row("process.exitCode", code("process.exitCode = 4"), exit_code=4),
    Row("an abort", code("process.abort()"), exit_code=134),
    Row("a signal", code("process.kill(process.pid, 'SIGKILL'); setTimeout(() => {}, 9000)"), exit_code=137),
    Row("too much memory", code("const a = []; for (;;) a.push(new Array(1e4).fill(a.length))"), exit_code=134),
    Row("a buffer above the limit", code("Buffer.alloc(2 ** 30)"), exit_code=1, error="RangeError"),
    # --- errors
    Row("an error", code("console.log(1)\nfunction f() { throw new TypeError('no') }\nf()"), stdout="1\n", exit_code=1, error="TypeError", message="no", stack=["at f (/workspace/main.js:2:22)", "at Object.<anonymous> (/workspace/main.js:3:1)"]),
    Row("an error of a handler", handler("throw new RangeError('far')"), exit_code=1, error="RangeError", message="far", stack=["at exports.handler (/workspace/main.js:1:53)"]),
    Row("an error with a name", code("const e = new Error('no'); e.name = 'Mine'; throw e"), exit_code=1, error="Mine", message="no"),
    Row("a rejected handler", code("exports.handler = () => Promise.reject(new Error('no'))"), exit_code=1, error="Error", message="no"),
    Row("a syntax error", code("console.log(1)\nlet x = ;"), exit_code=1, error="SyntaxError", message="Unexpected token ';'", stack=[]),
    Row("a recursion", code("(function f() { f() })()"), exit_code=1, error="RangeError"),
    Row("a thrown text", code("throw 'text'"), exit_code=1, error="string", message="text", stack=[]),
    Row("a thrown object", handler("throw { a: 1 }"), exit_code=1, error="object", message="{ a: 1 }", stack=[]),
    Row("a thrown null", code("throw null"), exit_code=1, error="object", message="null", stack=[]),
    Row("a thrown undefined", code("throw undefined"), exit_code=1, error="undefined", message="undefined", stack=[]),
    Row("an error that cannot be shown", code("throw Object.defineProperty(new Error(), 'message', { get() { throw 1 } })"), exit_code=1, error="Error"),
    Row("an unhandled rejection", code("Promise.reject(new Error('no'))"), exit_code=1, error="Runtime.UnhandledPromiseRejection", message="no"),
    Row("an unhandled rejection of a text", handler("Promise.reject('no'); await new Promise((r) => setTimeout(r, 9000))"), exit_code=1, error="Runtime.UnhandledPromiseRejection", message="no"),
    Row("a rejection that the code handles itself", code("process.on('unhandledRejection', (e) => console.log('mine', e)); Promise.reject(5)"), stdout="mine 5\n"),
    Row("an error of a timer", code("setTimeout(() => { throw new Error('no') })"), exit_code=1, error="Error", message="no"),
    Row("an error that the code handles itself", code("process.on('uncaughtException', (e) => console.log(e.message)); setTimeout(() => { throw new Error('no') })"), stdout="no\n"),
    # --- values that JSON cannot carry
    Row("a BigInt", handler("return 10n"), exit_code=1, error="Runtime.MarshalError", message="Unable to marshal response: Do not know how to serialize a BigInt"),
    Row("a circle", handler("const a = {}; a.a = a; return a"), exit_code=1, error="Runtime.MarshalError"),
    Row("a function", handler("return () => 1"), exit_code=1, error="Runtime.MarshalError", message="Unable to marshal response: a function is not JSON serializable"),
    Row("half a character", handler("return '\\ud800'"), error="Runtime.InvalidValue"),
]  # fmt: skip


def assert_row(row: Row, execution: dict[str, Any]) -> None:
    """Compare an execution with its row."""
    ended = "error" if row.exit_code or row.error else "ok"
    assert (ended, row.exit_code) == (execution["outcome"], execution["exit_code"]), execution
    assert (row.stdout, row.value) == (execution["stdout"], execution["value"]), execution
    assert execution["language"] == "javascript"
    error = execution["error"] or {"type": None}
    assert row.error == error["type"], execution
    if row.message is not None:
        assert row.message == error["message"]
    if row.stack is not None:
        assert row.stack == error["stack_trace"]
    if row.exit_code != ABORT:  # of which V8 itself prints the stack
        assert "harness.js" not in execution["stderr"] + str(error)
    if row.exit_code == 0 and row.error is None:
        assert execution["stderr"] == ""
