"""The self-test's code: runs as a user's would, and reports what the sandbox lets it do."""

CANARY = """
import errno, os, resource, socket, sys

LIMITS = ("NPROC", "NOFILE", "FSIZE", "DATA")

def attempt(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error.errno))
    return "done"

def unshare():
    if hasattr(os, "unshare"):
        return os.unshare(0x10000000)
    import ctypes
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")

def connect():
    with socket.socket() as probe:
        probe.settimeout(1)
        probe.connect(("192.0.2.1", 9))

def facts(pid):
    if sys.platform == "darwin":
        return {}
    lines = [line.partition(":") for line in open(f"/proc/{pid}/status")]
    return {name: value.strip() for name, _, value in lines}

def canary(event):
    status, one = facts("self"), facts(1)
    return {
        "platform": sys.platform,
        "uid": os.getuid(),
        "capabilities": max(int(process.get(name, "-1"), 16) for process in (status, one) for name in ("CapEff", "CapBnd")),
        "no_new_privs": int(status.get("NoNewPrivs", 0)),
        "seccomp_filters": int(status.get("Seccomp_filters", 0)),
        "limits": {name: resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1] for name in LIMITS},
        "processes": sum(name.isdigit() for name in os.listdir("/proc")) if status else 0,
        "interfaces": [name for _, name in socket.if_nameindex()],
        "unshare": attempt(unshare),
        "connect": attempt(connect),
        "write_root": attempt(lambda: open("/canary", "w")),
        "write_usr": attempt(lambda: open("/usr/canary", "w")),
        "write_proc": attempt(lambda: open("/proc/self/oom_score_adj", "w")),
    }
"""
