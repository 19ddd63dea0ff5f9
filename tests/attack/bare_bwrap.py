"""A bubblewrap that isolates nothing: it runs the program as it is. The self-test must not be fooled by it."""

import json
import os
import sys

ARGS_FD, SECCOMP_FD, STATUS_FD = 5, 6, 7

for fd in (ARGS_FD, SECCOMP_FD):
    while os.read(fd, 65536):
        pass
program = [word.replace("/run/bootstrap", "/scratch/bootstrap") for word in sys.argv[sys.argv.index("--") + 1 :]]
init = os.fork()
if init == 0:
    os.closerange(ARGS_FD, 64)
    os.chdir("/workspace")
    if (child := os.fork()) == 0:
        os.execv(program[0], program)
    os.closerange(0, ARGS_FD)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
os.write(STATUS_FD, json.dumps({"child-pid": init}).encode() + b"\n")
status = os.waitpid(init, 0)[1]
os.write(STATUS_FD, json.dumps({"exit-code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
