"""A filter of system calls (seccomp) for the process that runs an answer. It holds with and without namespaces.

An answer is one process with threads. It starts no other, opens no network, signals nobody, raises none of its limits,
and keeps no memory that its limit does not count.
"""

import ctypes
import errno
import os
import signal
import struct
import sys
from itertools import chain

X86_64, AARCH64 = 0, 1
AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)
MACHINES = {"x86_64": X86_64, "aarch64": AARCH64}

FORBIDDEN: dict[str, tuple[int | None, int | None]] = {
    # processes and signals
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "timer_create": (222, 107),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    # network
    "socket": (41, 198),
    # memory that no limit of the process counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    # the machine, its file systems and what gets around this filter
    "setrlimit": (160, 164),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "personality": (135, 92),
}
"""System call to its number on x86_64 and aarch64; None where there is none."""

WRITING: dict[str, tuple[int | None, int | None]] = {
    "creat": (85, None),
    "truncate": (76, 45),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "link": (86, None),
    "linkat": (265, 37),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
}
"""Those that change files, for a process without a file system of its own."""

CLONE, CLONE3 = (56, 220), (435, 435)
PRLIMIT = (302, 261)
EXIT, EXIT_GROUP = (60, 93), (231, 94)
PRCTL = (157, 167)
OPEN, OPENAT, OPENAT2 = (2, None), (257, 56), (437, 437)

CLONE_THREAD = 0x10000
OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
X32 = 0x40000000
"""Numbers of x86_64's second set of system calls begin here."""

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2

STATUS_OF_KILLED = 137
"""Exit status of a process that was killed, which an answer must not take: to be killed says nothing about it."""

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN, MASK = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
"""Instructions of the kernel's packet filter."""

KILL, ALLOW, DENY, ABSENT = 0x80000000, 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS

Instruction = tuple[int, int, int, int]
"""Code, how many to skip when true, how many when false, operand."""


def filter_program(machine: str, may_write: bool) -> bytes:
    """Return the filter as the kernel reads it. Raises `ValueError` for a machine whose numbers are not known."""
    if machine not in MACHINES:
        raise ValueError(f"no filter of system calls for {machine}: only for {' and '.join(MACHINES)}")
    column = MACHINES[machine]
    denied = FORBIDDEN if may_write else {**FORBIDDEN, **WRITING}
    rules = [
        *(rule(numbers[column], [(RETURN, 0, 0, DENY)]) for numbers in denied.values()),
        rule(CLONE3[column], [(RETURN, 0, 0, ABSENT)]),  # its flags are behind a pointer; libc then takes clone
        rule(CLONE[column], [argument(0), (ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]),
        rule(PRLIMIT[column], only_null(2)),
        rule(PRCTL[column], other_than(PR_SET_PDEATHSIG, mask=0xFFFFFFFF)),
        *(rule(numbers[column], other_than(STATUS_OF_KILLED, mask=0xFF)) for numbers in (EXIT, EXIT_GROUP)),
    ]
    if not may_write:
        rules += [
            rule(OPENAT2[column], [(RETURN, 0, 0, ABSENT)]),
            rule(OPEN[column], read_only(1)),
            rule(OPENAT[column], read_only(2)),
        ]
    start = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, AUDIT_ARCHITECTURES[column]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]
    second_set = [(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, DENY)]
    program = [*start, *second_set, *chain.from_iterable(rules), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def rule(number: int | None, verdict: list[Instruction]) -> list[Instruction]:
    """Return what decides by `verdict` when the system call is `number`, and goes on otherwise."""
    return [] if number is None else [(EQUAL, 0, len(verdict), number), *verdict]


def argument(index: int, upper_half: bool = False) -> Instruction:
    return (LOAD, 0, 0, 16 + 8 * index + (4 if upper_half else 0))


def only_null(index: int) -> list[Instruction]:
    is_null = [argument(index), (EQUAL, 0, 3, 0), argument(index, upper_half=True), (EQUAL, 0, 1, 0)]
    return [*is_null, (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, DENY)]


def other_than(value: int, mask: int) -> list[Instruction]:
    """Return what forbids one value of the first argument."""
    is_it = [argument(0), (MASK, 0, 0, mask), (EQUAL, 0, 1, value)]
    return [*is_it, (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]


def read_only(flags_index: int) -> list[Instruction]:
    writes = (ANY_BIT, 0, 1, OPENS_TO_WRITE)
    return [argument(flags_index), writes, (RETURN, 0, 0, DENY), (RETURN, 0, 0, ALLOW)]


class _FilterProgram(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends. The filter keeps it so."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0 or os.getppid() != parent:
        sys.exit("the parent process is gone")


def restrict(may_write: bool) -> None:
    """Put this process, for good, under the filter. Raises `OSError` when the kernel does not."""
    program = filter_program(os.uname().machine, may_write)
    buffer = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    header = _FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_SECCOMP) failed: the kernel has no seccomp filters")
