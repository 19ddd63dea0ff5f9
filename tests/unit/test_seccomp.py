"""The seccomp filter, run by a simulator of classic BPF over every call number: no kernel needed."""

import itertools
import runpy
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "images" / "agent"
program: Callable[[str], bytes] = runpy.run_path(str(AGENT / "seccomp.py"))["program"]

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
EPERM = 0x00050000 | 1
ENOSYS = 0x00050000 | 38
EAFNOSUPPORT = 0x00050000 | 97

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = sorted(AUDIT_ARCH)
CODE = {machine: program(machine) for machine in MACHINES}
NEWEST_CALL = 470
EDGES = [0x3FFFFFFF, 2**30, 2**30 + 41, 2**31 - 1, 2**31, 2**31 + 41, 2**32 - 1]
EVERY_NUMBER = [*range(601), *EDGES]
HIGH = 1 << 32
CLONE_NEWTIME = 0x80
THREAD_FLAGS = 0x3D0F00
BIT_PATTERNS = [(0,) * 6, (2**64 - 1,) * 6, (1, 2, 3, 4, 5, 6), (4, 4, 4, 4, 4, 4), (0x10000000,) * 6]

# Name, number on x86_64, number on aarch64 ("-" where it lacks the call), as in the kernel's headers.
DENIED = """
unshare 272 97|setns 308 268|mount 165 40|umount2 166 39|pivot_root 155 41|chroot 161 51
open_tree 428 428|move_mount 429 429|fsopen 430 430|fsconfig 431 431|fsmount 432 432|fspick 433 433
mount_setattr 442 442|statmount 457 457|listmount 458 458|open_tree_attr 467 467|listns 470 470
sethostname 170 161|setdomainname 171 162|name_to_handle_at 303 264|open_by_handle_at 304 265
ptrace 101 117|process_vm_readv 310 270|process_vm_writev 311 271|process_madvise 440 440|kcmp 312 272
pidfd_getfd 438 438|add_key 248 217|request_key 249 218|keyctl 250 219
bpf 321 280|perf_event_open 298 241|userfaultfd 323 282|modify_ldt 154 -|remap_file_pages 216 234
io_uring_setup 425 425|io_uring_enter 426 426|io_uring_register 427 427|memfd_secret 447 447
fanotify_init 300 262|fanotify_mark 301 263
io_setup 206 0|io_destroy 207 1|io_submit 209 2|io_cancel 210 3|io_getevents 208 4|io_pgetevents 333 292
mq_open 240 180|mq_unlink 241 181|mq_timedsend 242 182|mq_timedreceive 243 183|mq_notify 244 184
mq_getsetattr 245 185|kexec_load 246 104|kexec_file_load 320 294|reboot 169 142|swapon 167 224|swapoff 168 225
init_module 175 105|finit_module 313 273|delete_module 176 106|create_module 174 -|get_kernel_syms 177 -
query_module 178 -|acct 163 89|quotactl 179 60|quotactl_fd 443 443|iopl 172 -|ioperm 173 -|syslog 103 116
settimeofday 164 170|clock_settime 227 112|adjtimex 159 171|clock_adjtime 305 266
mbind 237 235|set_mempolicy 238 237|get_mempolicy 239 236|migrate_pages 256 238|move_pages 279 239
set_mempolicy_home_node 450 450
"""
CHECKED = """
clone 56 220|ioctl 16 29|personality 135 92|setrlimit 160 164|prlimit64 302 261
socket 41 198|socketpair 53 199
"""
# Calls that ordinary programs make all the time, or that a sandbox inside the sandbox needs.
LEFT = """
read 0 63|write 1 64|openat 257 56|close 3 57|mmap 9 222|munmap 11 215|mprotect 10 226|brk 12 214|futex 202 98
execve 59 221|wait4 61 260|exit_group 231 94|clock_gettime 228 113|rt_sigaction 13 134|epoll_pwait 281 22
fork 57 -|vfork 58 -|connect 42 203|bind 49 200|sendmsg 46 211|recvmsg 47 212|getrandom 318 278|rseq 334 293
prctl 157 167|seccomp 317 277|memfd_create 319 279|pidfd_open 434 434|close_range 436 436|faccessat2 439 439
landlock_create_ruleset 444 444|landlock_add_rule 445 445|landlock_restrict_self 446 446|mseal 462 462
sched_setaffinity 203 122|sched_getaffinity 204 123|sched_setscheduler 144 119|sched_yield 24 124
sched_setattr 314 274|shmget 29 194|semget 64 190|msgget 68 186|getrlimit 97 163|times 100 153
"""


def numbers(table: str, machine: str) -> dict[str, int]:
    rows = [row.split() for row in table.replace("\n", "|").split("|") if row]
    column = {"x86_64": 1, "aarch64": 2}[machine]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


@dataclass(frozen=True)
class Run:
    """How one call ended: the filter's action, the instructions it took, the offsets it loaded."""

    action: int
    steps: int
    loaded: tuple[int, ...]


def simulate(code: bytes, *, arch: int, number: int, args: tuple[int, ...] = ()) -> Run:
    """Run a filter as the kernel would; an instruction that it should not contain raises."""
    padded = [*args, 0, 0, 0, 0, 0, 0][:6]
    data = struct.pack("<IIQ6Q", number, arch, 0x7F0000001000, *padded)
    instructions = list(struct.iter_unpack("<HBBI", code))
    accumulator, here, loaded = 0, 0, []
    for steps in itertools.count(1):
        operation, if_true, if_false, operand = instructions[here]
        here += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, operand)
                loaded.append(operand)
            case 0x15:
                here += if_true if accumulator == operand else if_false
            case 0x35:
                here += if_true if accumulator >= operand else if_false
            case 0x45:
                here += if_true if accumulator & operand else if_false
            case 0x06:
                return Run(action=operand, steps=steps, loaded=tuple(loaded))
            case _:
                raise AssertionError(f"instruction {here - 1} is {operation:#x}")
    raise AssertionError


def action(machine: str, number: int, *args: int) -> int:
    return simulate(CODE[machine], arch=AUDIT_ARCH[machine], number=number, args=args).action


def named(machine: str, name: str, *args: int) -> int:
    return action(machine, numbers(CHECKED, machine)[name], *args)


def expected_whatever_the_arguments(machine: str) -> Iterator[tuple[int, int]]:
    denied = set(numbers(DENIED, machine).values())
    checked = set(numbers(CHECKED, machine).values())
    for number in EVERY_NUMBER:
        if number in checked:
            continue
        if machine == "x86_64" and number & 0x40000000:
            yield number, KILL_PROCESS
        elif number in denied:
            yield number, EPERM
        elif number == 435 or number > NEWEST_CALL:
            yield number, ENOSYS
        else:
            yield number, ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_gets_its_verdict_whatever_the_arguments(machine: str) -> None:
    code = CODE[machine]
    expected = dict(expected_whatever_the_arguments(machine))

    for args in BIT_PATTERNS:
        actual = {
            number: simulate(code, arch=AUDIT_ARCH[machine], number=number, args=args).action for number in expected
        }
        assert expected == actual


@pytest.mark.parametrize("machine", MACHINES)
def test_a_verdict_that_needs_no_argument_reads_none(machine: str) -> None:
    """Only then can the kernel keep it in its bitmap and skip the filter."""
    code = CODE[machine]
    for number, _ in expected_whatever_the_arguments(machine):
        run = simulate(code, arch=AUDIT_ARCH[machine], number=number)
        assert run.loaded == (4, 0)


@pytest.mark.parametrize("machine", MACHINES)
def test_ordinary_calls_are_left_alone(machine: str) -> None:
    left = numbers(LEFT, machine)
    assert dict.fromkeys(left, ALLOW) == {name: action(machine, number) for name, number in left.items()}


@pytest.mark.parametrize("machine", MACHINES)
def test_no_call_takes_more_than_twenty_instructions(machine: str) -> None:
    code = CODE[machine]
    for number, args in itertools.product(EVERY_NUMBER, BIT_PATTERNS):
        assert simulate(code, arch=AUDIT_ARCH[machine], number=number, args=args).steps <= 20


@pytest.mark.parametrize("machine", MACHINES)
def test_a_foreign_architecture_kills_the_process_for_every_number(machine: str) -> None:
    i386, arm, riscv64 = 0x40000003, 0x40000028, 0xC00000F3
    code = CODE[machine]
    for arch in {i386, arm, riscv64, 0, 2**32 - 1, *AUDIT_ARCH.values()} - {AUDIT_ARCH[machine]}:
        assert {KILL_PROCESS} == {simulate(code, arch=arch, number=number).action for number in EVERY_NUMBER}


def test_the_x32_bit_kills_the_process_for_every_number() -> None:
    code = CODE["x86_64"]
    for number in range(601):
        x32 = simulate(code, arch=AUDIT_ARCH["x86_64"], number=number | 0x40000000)
        assert x32.action == KILL_PROCESS


NAMESPACE_FLAGS = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x7E020000]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flag", NAMESPACE_FLAGS)
def test_clone_into_a_new_namespace_is_refused(machine: str, flag: int) -> None:
    for flags in (flag, flag | 17, flag | THREAD_FLAGS, flag | HIGH):
        assert named(machine, "clone", flags) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("flags", [0, 17, THREAD_FLAGS, 0x1200011, 0x4111, 0x80000000, CLONE_NEWTIME, HIGH])
def test_clone_of_threads_and_processes_is_allowed(machine: str, flags: int) -> None:
    assert named(machine, "clone", flags, 0x10000000, 0x10000000, 0x10000000, 0x10000000) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("high", [0, HIGH, 0xFFFFFFFF00000000])
def test_terminal_requests_are_refused_and_high_bits_do_not_hide_them(machine: str, high: int) -> None:
    for request in (0x5412, 0x541C, 0x541D, 0x5423):
        assert named(machine, "ioctl", 0, high | request) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_other_ioctls_are_allowed(machine: str) -> None:
    tcgets, tiocgwinsz, fionread, fionbio, ficlone = 0x5401, 0x5413, 0x541B, 0x5421, 0x40049409
    for request in (tcgets, tiocgwinsz, fionread, fionbio, ficlone, 0x5411, 0x541E, 0x5422, 0x5424, 0):
        assert named(machine, "ioctl", 0x5412, request, 0x5412) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_only_unix_inet_and_inet6_sockets_open_whatever_type_and_protocol(machine: str) -> None:
    for family in range(64):
        if family == 16:
            continue
        expected = ALLOW if family in (1, 2, 10) else EAFNOSUPPORT
        for kind, protocol, high in itertools.product((1, 2, 3, 5, 0x80801), (0, 6, 17), (0, HIGH)):
            assert expected == named(machine, "socket", high | family, kind, protocol)


@pytest.mark.parametrize("machine", MACHINES)
def test_netlink_opens_for_routes_only(machine: str) -> None:
    for kind, protocol, high in itertools.product((2, 3), range(32), (0, HIGH)):
        expected = ALLOW if protocol == 0 else EAFNOSUPPORT
        assert expected == named(machine, "socket", 16, kind, high | protocol)


@pytest.mark.parametrize("machine", MACHINES)
def test_only_unix_sockets_come_in_pairs(machine: str) -> None:
    for family, high in itertools.product(range(64), (0, HIGH)):
        expected = ALLOW if family == 1 else EAFNOSUPPORT
        assert expected == named(machine, "socketpair", high | family, 1, 0)


@pytest.mark.parametrize("machine", MACHINES)
def test_personality_may_be_asked_for_but_not_changed_to_a_weaker_one(machine: str) -> None:
    no_randomisation, read_implies_exec = 0x0040000, 0x0400000
    for persona in (0, 8, 0xFFFFFFFF, HIGH, 2**64 - 1):
        assert named(machine, "personality", persona) == ALLOW
    for persona in (1, 4, 9, no_randomisation, read_implies_exec, 0x20000, 0xFFFFFFFE, HIGH | 0x0040000):
        assert named(machine, "personality", persona) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_the_core_limit_cannot_be_set(machine: str) -> None:
    for high in (0, HIGH):
        assert named(machine, "setrlimit", high | 4, 0x7FFF0000) == EPERM
        for pointer in (1, 0x7FFF0000, HIGH, 0x7FFF00000000, 2**64 - 1):
            assert named(machine, "prlimit64", 0, high | 4, pointer, 0) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_the_core_limit_can_be_read_and_other_limits_set(machine: str) -> None:
    assert named(machine, "prlimit64", 0, 4, 0, 0x7FFF0000) == ALLOW
    for resource in (0, 1, 2, 3, 5, 6, 7, 9, 15):
        assert named(machine, "prlimit64", 4, resource, 0x7FFF0000, 4) == ALLOW
        assert named(machine, "setrlimit", resource, 4) == ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_the_program_is_one_that_the_kernel_accepts(machine: str) -> None:
    """Whole instructions, not too many, aligned loads, every jump inside and the end not fallen off."""
    code = CODE[machine]
    instructions = list(struct.iter_unpack("<HBBI", code))
    last = len(instructions) - 1

    assert len(code) % 8 == 0
    assert len(instructions) < 4096
    assert instructions[last][0] == 0x06
    for here, (operation, if_true, if_false, operand) in enumerate(instructions):
        assert operation in (0x20, 0x15, 0x35, 0x45, 0x06)
        if operation in (0x15, 0x35, 0x45):
            assert here + 1 + max(if_true, if_false) <= last
        else:
            assert (if_true, if_false) == (0, 0)
        if operation == 0x20:
            assert operand % 4 == 0
            assert operand < 64


def test_arm64_is_another_name_for_aarch64() -> None:
    assert program("aarch64") == program("arm64")


@pytest.mark.parametrize("machine", ["riscv64", "i686", "aarch64_be", "X86_64", ""])
def test_an_unknown_machine_is_refused_by_name(machine: str) -> None:
    with pytest.raises(ValueError, match=f"machine '{machine}'"):
        program(machine)
