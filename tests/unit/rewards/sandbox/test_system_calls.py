"""The numbers of the filter of system calls, against the kernel's headers."""

import re
from pathlib import Path

import pytest

from megatron_p2o.rewards.sandbox.inside import system_calls
from megatron_p2o.rewards.sandbox.inside.system_calls import AARCH64, FORBIDDEN, WRITING, X86_64, filter_program

HEADERS = {
    X86_64: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    AARCH64: Path("/usr/include/asm-generic/unistd.h"),
}

SINGLE = ("clone", "clone3", "prlimit64", "exit", "exit_group", "prctl", "open", "openat", "openat2")
CONSTANTS = ("CLONE", "CLONE3", "PRLIMIT", "EXIT", "EXIT_GROUP", "PRCTL", "OPEN", "OPENAT", "OPENAT2")


def numbers_in(header: Path) -> dict[str, int]:
    text = header.read_text()
    found = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.MULTILINE)
    return {name: int(number) for name, number in found}


@pytest.mark.parametrize("column", [X86_64, AARCH64])
def test_numbers_are_those_of_the_kernels_headers(column: int) -> None:
    if not HEADERS[column].exists():
        pytest.skip(f"{HEADERS[column]} is not installed (linux-libc-dev)")
    ours = {**FORBIDDEN, **WRITING, **{n: getattr(system_calls, c) for n, c in zip(SINGLE, CONSTANTS, strict=True)}}
    kernel = numbers_in(HEADERS[column])
    aliases = {"umount2": "umount2", "truncate": "truncate"}
    newer = {"fchmodat2"}  # than the headers of some distributions
    wrong = {
        name: (numbers[column], kernel.get(aliases.get(name, name)))
        for name, numbers in ours.items()
        if numbers[column] != kernel.get(aliases.get(name, name)) and not (name in newer and name not in kernel)
    }
    if column == AARCH64:
        # The generic header lists `setrlimit` and 64-bit names under macros; what aarch64 lacks, it lacks too.
        wrong = {name: pair for name, pair in wrong.items() if pair[1] is not None}
    assert wrong == {}


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="riscv64: only for x86_64 and aarch64"):
        filter_program("riscv64", may_write=True)
