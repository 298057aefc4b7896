"""The prompt that asks for a better template, and the errors of reflection."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_p2o.evolve.trial import Trial
from megatron_p2o.types import Problem

MAX_PROMPT_CHARS = 90_000
"""Longest reflection prompt: about 30,000 tokens of mathematical English, which with the answer fits the context
of 32,768 that Qwen3 was trained on. The authors count tokens; this process holds no tokenizer."""

EXAMPLE_FRAME_CHARS = 160
"""Headings and cut marks around an example."""

MAX_FORMAT_FAILURE_CHARS = 800
"""Longest shown text of a response without a final answer. Its beginning and end show what went wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One problem the parent template was tried on."""

    problem: Problem
    trial: Trial


@dataclass(kw_only=True, slots=True)
class ReflectionUsage:
    """What passed between a reflector and its language model, and the tokens that it took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_unknown: int = 0
    """Replies whose endpoint did not say how many."""
    prompt: str = ""
    """The message that was sent."""
    reply: str = ""
    """The text that came back, reasoning in it included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionRequest:
    """What a reflector is given."""

    proposal: int
    """Number of the proposal within the round: keys all randomness."""
    parent_text: str
    examples: tuple[Example, ...]
    task_description: str | None = None
    """What the model is to do, and how answers are judged. None: it is to put one final answer into a box."""
    usage: ReflectionUsage = field(default_factory=ReflectionUsage, compare=False)
    """A reflector with a language model notes here what it sent, what came back, and what that took."""


class ReflectionRefused(Exception):
    """Reflection answered, but with nothing usable; the next proposal may do better."""

    def __init__(self, reason: str, detail: str = "") -> None:
        """`reason` is one of few, by which proposals are counted; `detail` quotes what came."""
        super().__init__(reason)
        self.detail = detail


class ReflectionUnavailable(Exception):
    """Nobody can reflect now; evolution stops proposing until the next round."""

    def __init__(self, reason: str, *, is_passing: bool = False) -> None:
        """`is_passing`: busy or slow, so that a later request may fare better."""
        super().__init__(reason)
        self.is_passing = is_passing


def reflection_prompt(request: ReflectionRequest, max_chars: int = MAX_PROMPT_CHARS) -> str:
    """Return the user message that asks for a new template, in the shape of GEPA's instruction proposal."""
    longest = max(map(len, re.findall("`+", request.parent_text)), default=0)
    shown = {"parent": request.parent_text, "fence": "`" * max(3, longest + 1)}
    shown["task_description"] = f"The task: {request.task_description.strip()}\n\n" if request.task_description else ""
    frame = PROMPT.format(**shown, examples="")
    share = max(0, max_chars - len(frame)) // max(1, len(request.examples))
    examples = "\n\n".join(
        _example_text(index + 1, item, share, request.task_description) for index, item in enumerate(request.examples)
    )
    return PROMPT.format(**shown, examples=examples)


PROMPT = """\
A language model answers questions. In front of each question it is given this instruction, which may be empty:

{fence}
{parent}
{fence}

Below are questions it was asked with that instruction, what it answered, and a judgement of each answer.

{task_description}{examples}

Write a better instruction for the model.

Work out from the questions what kind of task this is and what a good answer must look like. Study the judgements: \
where an answer is wrong, find the step at which the reasoning leaves the right path, and what the model would have \
had to know or to do there. Put into the instruction the facts of the field and the ways of working that help on \
questions of this kind, also those the model used with success. The instruction will be put in front of other \
questions than these, so do not repeat these questions or their answers in it.

Reply with the new instruction between a line of three backticks and another line of three backticks. If the \
instruction itself contains such lines, put it between lines of four.
"""


def _example_text(number: int, example: Example, max_chars: int, task_description: str | None) -> str:
    """Return one example in at most about `max_chars`; the response gives way first, then the question."""
    verdict = "\n".join(
        filter(None, [_verdict(example, task_description), shorten(example.trial.feedback, max_chars // 4)])
    )
    question = shorten(example.problem.question, max(200, max_chars // 2))
    room = max(200, max_chars - len(question) - len(verdict) - EXAMPLE_FRAME_CHARS)
    if task_description is None and _lacks_final_answer(example.trial):
        room = min(room, MAX_FORMAT_FAILURE_CHARS)
    response = shorten(example.trial.response_text, room)
    return f"# Example {number}\n## Question\n{question}\n## Answer of the model\n{response}\n## Judgement\n{verdict}"


def _verdict(example: Example, task_description: str | None) -> str:
    answer = example.problem.answer
    gold = "" if answer is None else f"The correct final answer is {answer}."
    if task_description is not None:
        return _plain_verdict(example, "" if answer is None else f"A correct answer: {answer}")
    if example.trial.is_solved:
        return f"Correct. {gold}"
    if example.trial.finish_reason == "length":
        return f"Wrong: the answer was cut off at the length limit before it was complete. {gold}"
    if _lacks_final_answer(example.trial):
        return f"Wrong: there is no final answer inside \\boxed{{}}. {gold}"
    return f"Wrong: the final answer does not match. {gold}"


def _plain_verdict(example: Example, gold: str) -> str:
    """Return the verdict on an answer to a task of whatever form."""
    trial = example.trial
    cut = " The answer was cut off at the length limit." if trial.finish_reason == "length" else ""
    solved = "Good" if trial.is_solved else "Not good enough"
    return f"{solved}: it earned {trial.reward:.3g} of 1.{cut} {gold}".strip()


def _lacks_final_answer(trial: Trial) -> bool:
    return not trial.is_solved and "\\boxed" not in trial.response_text


SPECIAL_TOKEN = re.compile(r"<\|[^\s|<>]{1,40}\|>")
"""Chat markup such as <|im_end|>: what holds it is no instruction but a reply that went on for too long."""


def with_markup_as_text(text: str, control_tokens: Iterable[str]) -> str:
    """Return `text` with a blank in every control token, as in `< |im_end|>`: a server reads it as text then.

    `control_tokens` are the texts that the tokenizer of the server's model takes for control tokens.
    """
    names = sorted((name for name in control_tokens if name), key=len, reverse=True)
    if not names:
        return text
    return re.sub("|".join(map(re.escape, names)), lambda found: f"{found[0][0]} {found[0][1:]}", text)


MAX_RESPONSE_CHARS = 16_000
"""Longest response that is sent to reflection. A longer one would not fit the prompt beside the other examples."""

HEAD_SHARE = 0.5
"""Share of the kept text that is its beginning; the rest is its end."""


def shorten(text: str, max_chars: int) -> str:
    """Return `text`, its middle replaced by a note of what is missing when it is longer than `max_chars`."""
    if len(text) <= max_chars:
        return text
    num_head = int(max_chars * HEAD_SHARE)
    num_tail = max_chars - num_head
    missing = len(text) - num_head - num_tail
    tail = text[len(text) - num_tail :]
    return f"{text[:num_head]}\n[... {missing} characters left out ...]\n{tail}"
