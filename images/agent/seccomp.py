"""The seccomp filter of one execution: a deny-list on top of the container's allow-list.

Classic BPF as `bwrap --seccomp FD` reads it. A call's number is found by binary search over ranges. The way
to "allow" uses only instructions that the kernel's seccomp cache can follow: a call that is allowed whatever
its arguments costs a bitmap lookup and never runs the program.
"""

import struct
from collections.abc import Sequence

# A line is a label, or an instruction: code, operand, label if true, label if false ("" is the next one).
Line = str | tuple[int, int, str, str]

_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

# Offsets in `struct seccomp_data`. The kernel drops the upper half of every argument checked here but the
# pointer of prlimit64: to compare that half too would open a way around the check.
_NUMBER = 0
_ARCH = 4
_LOW = (16, 24, 32)
_HIGH = (20, 28, 36)

_ERRNO = 0x00050000
_VERDICTS = {
    "allow": 0x7FFF0000,
    "eperm": _ERRNO | 1,
    "enosys": _ERRNO | 38,
    "eafnosupport": _ERRNO | 97,
    "kill": 0x80000000,  # the process, not the thread
}

_X32_BIT = 0x40000000
_CLONE_NEW = 0x7E020000  # every CLONE_NEW* but NEWTIME, whose bit is part of the exit signal here
_TERMINAL_REQUESTS = (0x5412, 0x541C, 0x541D, 0x5423)  # TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD
_PERSONALITIES = (0, 8, 0xFFFFFFFF)  # PER_LINUX, PER_LINUX32, "tell me"
_RLIMIT_CORE = 4
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_NETLINK_ROUTE = 0

# The newest call that was looked at (listns). What a later kernel adds is ENOSYS: libraries fall back.
_NEWEST = 470

# fmt: off
# From 424 on every architecture has the same numbers.
_COMMON = {
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "mount_setattr": 442, "statmount": 457, "listmount": 458, "open_tree_attr": 467, "listns": 470,
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "pidfd_getfd": 438, "process_madvise": 440,
    "quotactl_fd": 443, "memfd_secret": 447, "set_mempolicy_home_node": 450,
}
_DENIED_X86_64 = _COMMON | {
    # namespaces and mounts
    "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161,
    "sethostname": 170, "setdomainname": 171, "name_to_handle_at": 303, "open_by_handle_at": 304,
    # other processes
    "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    # kernel code with a long history of holes
    "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "modify_ldt": 154, "remap_file_pages": 216,
    "fanotify_init": 300, "fanotify_mark": 301, "add_key": 248, "request_key": 249, "keyctl": 250,
    # what all containers of a host share one quota of
    "io_setup": 206, "io_destroy": 207, "io_getevents": 208, "io_submit": 209, "io_cancel": 210,
    "io_pgetevents": 333, "mq_open": 240, "mq_unlink": 241, "mq_timedsend": 242, "mq_timedreceive": 243,
    "mq_notify": 244, "mq_getsetattr": 245,
    # memory placement
    "mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "migrate_pages": 256, "move_pages": 279,
    # the machine itself
    "kexec_load": 246, "kexec_file_load": 320, "create_module": 174, "init_module": 175, "delete_module": 176,
    "get_kernel_syms": 177, "query_module": 178, "finit_module": 313, "reboot": 169, "swapon": 167,
    "swapoff": 168, "acct": 163, "quotactl": 179, "iopl": 172, "ioperm": 173, "syslog": 103,
    "settimeofday": 164, "adjtimex": 159, "clock_settime": 227, "clock_adjtime": 305,
}
_DENIED_AARCH64 = _COMMON | {
    # namespaces and mounts
    "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "pivot_root": 41, "chroot": 51,
    "sethostname": 161, "setdomainname": 162, "name_to_handle_at": 264, "open_by_handle_at": 265,
    # other processes
    "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272,
    # kernel code with a long history of holes
    "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "remap_file_pages": 234,
    "fanotify_init": 262, "fanotify_mark": 263, "add_key": 217, "request_key": 218, "keyctl": 219,
    # what all containers of a host share one quota of
    "io_setup": 0, "io_destroy": 1, "io_submit": 2, "io_cancel": 3, "io_getevents": 4,
    "io_pgetevents": 292, "mq_open": 180, "mq_unlink": 181, "mq_timedsend": 182, "mq_timedreceive": 183,
    "mq_notify": 184, "mq_getsetattr": 185,
    # memory placement
    "mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "migrate_pages": 238, "move_pages": 239,
    # the machine itself
    "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "delete_module": 106, "finit_module": 273,
    "reboot": 142, "swapon": 224, "swapoff": 225, "acct": 89, "quotactl": 60, "syslog": 116,
    "settimeofday": 170, "adjtimex": 171, "clock_settime": 112, "clock_adjtime": 266,
}
_CHECKED_X86_64 = {
    "clone": 56, "ioctl": 16, "personality": 135, "prlimit64": 302, "setrlimit": 160, "socket": 41,
    "socketpair": 53,
}
_CHECKED_AARCH64 = {
    "clone": 220, "ioctl": 29, "personality": 92, "prlimit64": 261, "setrlimit": 164, "socket": 198,
    "socketpair": 199,
}
# fmt: on
_CLONE3 = 435  # its flags are behind a pointer, out of a filter's sight; libc falls back to clone

_AUDIT_X86_64 = 0xC000003E
_AUDIT_AARCH64 = 0xC00000B7


def program(machine: str) -> bytes:
    """Assemble the `struct sock_filter[]` for a machine as `os.uname()` names it, or raise ValueError."""
    if machine == "x86_64":
        foreign_abi: list[Line] = [(_ANY_BIT, _X32_BIT, "kill", "")]
        return _assemble(_AUDIT_X86_64, foreign_abi, _DENIED_X86_64, _CHECKED_X86_64)
    if machine in ("aarch64", "arm64"):
        return _assemble(_AUDIT_AARCH64, [], _DENIED_AARCH64, _CHECKED_AARCH64)
    raise ValueError(f"no seccomp filter for machine {machine!r}")


def _assemble(arch: int, foreign_abi: list[Line], denied: dict[str, int], checked: dict[str, int]) -> bytes:
    labels = dict.fromkeys(denied.values(), "eperm")
    labels |= {number: name for name, number in checked.items()}
    labels[_CLONE3] = "enosys"

    lines: list[Line] = [(_LOAD, _ARCH, "", ""), (_EQUAL, arch, "", "kill"), (_LOAD, _NUMBER, "", "")]
    lines += foreign_abi
    lines += _search(_ranges(labels))
    for name, check in _checks().items():
        lines += [name, *check]
    for name, value in _VERDICTS.items():
        lines += [name, (_RETURN, value, "", "")]
    return _resolve(lines)


def _checks() -> dict[str, list[Line]]:
    return {
        "clone": [(_LOAD, _LOW[0], "", ""), (_ANY_BIT, _CLONE_NEW, "eperm", "allow")],
        "ioctl": _compare(_LOW[1], _TERMINAL_REQUESTS, "eperm", "allow"),
        "personality": _compare(_LOW[0], _PERSONALITIES, "allow", "eperm"),
        "prlimit64": [  # without a new limit it only reads
            *_compare(_LOW[1], [_RLIMIT_CORE], "", "allow"),
            *_compare(_LOW[2], [0], "", "eperm"),
            *_compare(_HIGH[2], [0], "allow", "eperm"),
        ],
        "setrlimit": _compare(_LOW[0], [_RLIMIT_CORE], "eperm", "allow"),
        "socket": [
            *_compare(_LOW[0], [_UNIX, _INET, _INET6], "allow", ""),
            (_EQUAL, _NETLINK, "", "eafnosupport"),
            *_compare(_LOW[2], [_NETLINK_ROUTE], "allow", "eafnosupport"),
        ],
        "socketpair": _compare(_LOW[0], [_UNIX], "allow", "eafnosupport"),
    }


def _compare(offset: int, values: Sequence[int], found: str, otherwise: str) -> list[Line]:
    lines: list[Line] = [(_LOAD, offset, "", "")]
    lines += [(_EQUAL, value, found, "") for value in values[:-1]]
    lines += [(_EQUAL, values[-1], found, otherwise)]
    return lines


def _ranges(labels: dict[int, str]) -> list[tuple[int, str]]:
    # Neighbours that share a label become one range, named by its first number. The last has no end.
    ranges: list[tuple[int, str]] = []
    for number in range(_NEWEST + 2):
        label = labels.get(number, "allow") if number <= _NEWEST else "enosys"
        if not ranges or ranges[-1][1] != label:
            ranges.append((number, label))
    return ranges


def _search(ranges: list[tuple[int, str]]) -> list[Line]:
    # A single range needs no code: whoever leads here jumps to its label at once.
    if len(ranges) == 1:
        return []
    low, high = ranges[: len(ranges) // 2], ranges[len(ranges) // 2 :]
    decide = (_AT_LEAST, high[0][0], _entry(high), _entry(low))
    return [_entry(ranges), decide, *_search(low), *_search(high)]


def _entry(ranges: list[tuple[int, str]]) -> str:
    return ranges[0][1] if len(ranges) == 1 else f"{ranges[0][0]}..{ranges[-1][0]}"


def _resolve(lines: list[Line]) -> bytes:
    # Jumps are relative, forward, and one byte wide: `pack` refuses any other.
    code: list[tuple[int, int, str, str]] = []
    positions: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            positions[line] = len(code)
        else:
            code.append(line)

    def distance(here: int, label: str) -> int:
        return positions[label] - here - 1 if label else 0

    return b"".join(
        struct.pack("<HBBI", operation, distance(here, true), distance(here, false), operand)
        for here, (operation, operand, true, false) in enumerate(code)
    )
