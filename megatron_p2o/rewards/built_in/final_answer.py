"""Where in a response its answer stands."""

import re
from typing import Literal, get_args

from megatron_p2o.rewards.extract import END_OF_THINKING, START_OF_THINKING, last_boxed
from megatron_p2o.types import FinishReason, Grade

Extract = Literal["response", "last_line", "boxed", "answer_tag", "code_block"]
"""`response`: all of it; `last_line`: its last line that is not blank, unless it was cut off; `boxed`: the content of
the last \\boxed{...}; `answer_tag`: that of the last <answer>...</answer>; `code_block`: the last closed fenced block.
What a model thinks between <think> and </think> never counts."""

ANSWER_TAG = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
FENCE = re.compile(r"[ \t]*(```+|~~~+)[ \t]*([^`\n]*)")


def checked_extract(extract: str, function: str) -> Extract:
    """Return `extract`. Raises `ValueError` when it is none of the known ways."""
    for known in get_args(Extract):
        if extract == known:
            return known
    raise ValueError(f"{function} extract={extract!r} must be one of {', '.join(get_args(Extract))}")


def final_answer(response: str, extract: Extract, finish_reason: FinishReason = "stop") -> str | None:
    """Return the answer of a response without space around it; None where it has none, or is still thinking.

    The last line of a response that was cut off may go on ("12" of "123"): it is no answer.
    """
    said = without_thinking(response)
    if said is None:
        return None
    if extract == "response":
        return said.strip()
    if extract == "boxed":
        return last_boxed(said)
    if extract == "answer_tag":
        start = said.rfind("<answer>")
        tag = ANSWER_TAG.match(said, start) if start >= 0 else None
        return tag[1].strip() if tag else None
    if extract == "code_block":
        blocks = fenced_blocks(said)
        return blocks[-1][1] if blocks else None
    if finish_reason != "stop":
        return None
    lines = said.strip().splitlines()
    return lines[-1].strip() if lines else None


def no_answer(extract: Extract) -> Grade:
    """Return the grade of a response in which `final_answer` finds nothing."""
    return Grade(reward=0.0, reason="no answer", feedback=f"The response has no answer ({extract}).")


def without_thinking(response: str) -> str | None:
    """Return what follows the last block of thinking, None where one is not closed."""
    said = response.rpartition(END_OF_THINKING)[2]
    return None if START_OF_THINKING in said else said


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Return (label in lower case, content) of each fenced block that is closed, in order. Time is linear."""
    blocks: list[tuple[str, str]] = []
    mark = label = ""
    content: list[str] = []
    for line in text.split("\n"):
        fence = FENCE.fullmatch(line.rstrip())
        if not mark:
            if fence:
                mark, label, content = fence[1], fence[2].strip().lower(), []
        elif fence and fence[1].startswith(mark) and not fence[2].strip():
            blocks.append((label, "\n".join(content)))
            mark = ""
        else:
            content.append(line)
    return blocks
