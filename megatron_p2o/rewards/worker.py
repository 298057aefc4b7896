"""One process that compares answers with math-verify. Run as a file, never imported by the parent.

    python worker.py PARENT_PID MEMORY_LIMIT_MIB

It writes "ready", then reads one JSON request per line, {"gold": ..., "answers": [...]}, and writes one line: "correct"
when every answer equals the gold one, "incorrect", or "out_of_memory"; and the bytes of memory it has used at most. Who
asks sets the deadline and kills: alarms inside a process do not interrupt arithmetic on long integers.
"""

import json
import logging
import os
import resource
import sys
import warnings
from functools import lru_cache
from typing import Any, TextIO

from megatron_p2o.processes import end_with_parent

RELATIVE_TOLERANCE = 1e-6
"""Two numbers that math-verify calls equal must agree within this, relative to the smaller of 1 and the gold one."""

MEMORY_ALARM = 0.75
"""Share of the memory limit in use above which "incorrect" is not believed: sympy turns a failed allocation into it."""


def main() -> None:
    parent, memory_limit_mib = int(sys.argv[1]), int(sys.argv[2])
    end_with_parent(parent)
    limit_bytes = memory_limit_mib << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # With gmpy2 an overflow aborts the process, and its long operations cannot be told apart from a hang.
    os.environ.update(SYMPY_GROUND_TYPES="python", MPMATH_NOGMPY="1", OMP_NUM_THREADS="1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    replies = private_stdout()
    is_match([r"\frac{1}{2}"], "0.5")
    answer_requests(replies, limit_bytes)


def private_stdout() -> TextIO:
    """Return a stream to the parent and point file descriptor 1 elsewhere: libraries print."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    return replies


def answer_requests(replies: TextIO, limit_bytes: int) -> None:
    print("ready", file=replies)
    # A parser that cannot read an answer says so on standard error, for every answer.
    os.dup2(1, 2)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = "correct" if is_match(request["answers"], request["gold"]) else "incorrect"
        except MemoryError:
            verdict = "out_of_memory"
        if verdict == "incorrect" and peak_bytes() > MEMORY_ALARM * limit_bytes:
            verdict = "out_of_memory"
        print(verdict, peak_bytes(), file=replies)


def is_match(answers: list[str], gold: str) -> bool:
    """Return whether math-verify calls every answer equal to `gold` and their numbers do not contradict it."""
    import math_verify  # in the worker alone: it takes a second and 60 MB

    gold_forms = parsed(gold)
    for answer in answers:
        try:
            forms = parsed(answer)
            is_equal = math_verify.verify(gold_forms, forms, timeout_seconds=0, raise_on_error=True)
            if not (is_equal and ("%" in gold or numbers_agree(gold_forms, forms))):
                return False
        except MemoryError:
            raise
        except Exception:  # sympy raises anything on odd input; an answer it cannot compare is not the gold one
            return False
    return True


@lru_cache(maxsize=4096)
def parsed(latex: str) -> list[Any]:
    """Return math-verify's readings of an answer: an expression when it has one, and the text."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are gone already: this normalisation takes single letters, such as the t of 2t, for units.
    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    extraction = LatexExtractionConfig(
        try_extract_without_anchor=False, boxed_match_priority=0, normalization_config=spelling
    )
    return parse(rf"\boxed{{{latex}}}", [extraction], parsing_timeout=0, raise_on_error=True)


def numbers_agree(gold_forms: list[Any], forms: list[Any]) -> bool:
    """Return whether two numbers agree in relative terms; True for anything but finite numbers.

    math-verify rounds to six decimals, so that it calls every tiny number equal to 0.
    """
    gold, answer = gold_forms[0], forms[0]
    if not all(getattr(form, "is_number", False) and form.is_finite for form in (gold, answer)):
        return True
    scale = abs(gold.evalf(30))
    return bool(abs((gold - answer).evalf(30)) <= RELATIVE_TOLERANCE * min(1, scale))


def peak_bytes() -> int:
    """Return the most address space this process has had."""
    with open("/proc/self/status") as status:
        peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmPeak:"))
    return peak_kib * 1024


if __name__ == "__main__":
    main()
