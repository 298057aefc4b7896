"""Reads the reply of a reflection model: which text in it is the new template, or why there is none."""

import re
from dataclasses import dataclass

from megatron_p2o.endpoints.reply import Reply
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused
from megatron_p2o.terminal import quoted

CUT = "cut off: raise evolution.reflection.max_tokens"
ONLY_REASONING = "reasoning used up evolution.reflection.max_tokens: raise it, or turn the model's reasoning down"
NO_ANSWER_AFTER_REASONING = "reasoning without an answer"
DECLINED = "the model declines"
SAME_AS_PARENT = "same as its parent"

THINKS_ALOUD = "thinks aloud and fences no instruction"
UNFENCED = "talks about its instruction and does not fence it"

FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([^`\n]*)$", re.MULTILINE)
"""A fence on a line of its own, with an optional language tag."""

INLINE_FENCE = re.compile(r"```([^`\n]+)```")

QUOTE_MARKS = "\"'`*\u201c\u201d\u2018\u2019\u00ab\u00bb"
"""Characters around a quoted text."""

DECLINING = re.compile(
    r"(?:(?:sure|okay|unfortunately|sorry|well)?[,.!]?\s*(?:but\s+)?)"
    r"(?:sorry[,.!:]|sorry (?:but|i|this|that)\b|i(?:['\u2019]m| am) (?:sorry|afraid|unable|not able|not comfortable)"
    r"|i apologi[sz]e|as an ai\b|i (?:do not|don['\u2019]t) feel"
    r"|i (?:can(?:not| not|['\u2019]t)|won['\u2019]t|will not|must decline)\b(?! (?:\w+ )?(?:\w+ )?enough\b))",
    re.IGNORECASE,
)
"""Begins what is no instruction but an apology to the person who asks, not "I cannot stress enough"."""

THINKING_ALOUD = re.compile(
    r"(?:okay|ok|hmm+|alright|all right)[,.]"
    r"|(?:the user|i|we|let me|let us|let['\u2019]s)\b[^.\n]*\b(?:instruction|prompt|template)\b",
    re.IGNORECASE,
)
"""Begins what speaks of the work on the instruction. "Let me think step by step." is an instruction."""

PREFACE = re.compile(
    r"(?:(?:sure|certainly|of course|okay|ok|absolutely)[,.!]*\s+)?"
    r"here(?:['\u2019]s| is)\b[^.:\n]*\b(?:instruction|prompt|template|version)\b[^.:\n]*(?P<end>[.:\n])[*\s]*"
    r"|[*#\s]*(?:(?:the|my|your)\s+)?(?:(?:new|better|improved|revised|updated|final)\s+)*(?:instruction|prompt)"
    r"[*\s]*:[*\s]*",
    re.IGNORECASE,
)
"""Announces an instruction: "Here is a better instruction:"."""

AFTERWORD = re.compile(
    r"(?:this|the)(?: new| better| improved| revised| updated)? (?:instruction|prompt)\b|i hope\b|hope (?:this|it)\b"
    r"|let me know\b|feel free\b|would you like\b",
    re.IGNORECASE,
)
"""Begins a last paragraph that speaks about the instruction."""


def template_in(reply: Reply, parent_text: str) -> str:
    """Return the new template that `reply` proposes. Raises `ReflectionRefused` when there is none in it."""
    _, has_thought, tail = reply.text.rpartition("</think>")
    is_thinking = not has_thought and "<think>" in reply.text
    visible = "" if is_thinking else tail
    has_reasoning = reply.has_reasoning or is_thinking or bool(has_thought)
    if reply.is_declined:
        raise ReflectionRefused(DECLINED, quoted(visible))
    if reply.is_cut or is_thinking:
        raise ReflectionRefused(CUT if visible.strip() else ONLY_REASONING)
    if not visible.strip():
        raise ReflectionRefused(NO_ANSWER_AFTER_REASONING if has_reasoning else "empty")
    template = instruction_in(visible, parent_text)
    if not unquoted(template):
        raise ReflectionRefused("empty")
    if unquoted(template) == unquoted(parent_text):
        raise ReflectionRefused(SAME_AS_PARENT)
    if DECLINING.match(template):
        raise ReflectionRefused(DECLINED, quoted(template))
    return template


def instruction_in(text: str, parent_text: str) -> str:
    """Return the new instruction: the last fenced block that does not quote the parent; without fences, all of
    `text` but the words that announce it.

    Raises `ReflectionRefused` when a fence is not closed, or it is not clear where the block ends.
    """
    whole = text.strip()
    inline = INLINE_FENCE.fullmatch(whole)
    if inline:
        return inline[1].strip()
    blocks = outermost_blocks(whole)
    if not blocks:
        if "```" in whole:
            raise ReflectionRefused("fence not closed")
        if THINKING_ALOUD.match(whole):
            raise ReflectionRefused(THINKS_ALOUD, quoted(whole))
        return _without_preface(whole)
    written = [block for block in blocks if block.text]
    new = [block for block in written if unquoted(block.text) != unquoted(parent_text)]
    if not new:
        return written[-1].text if written else ""
    if (
        len(new) > 1
        and whole.endswith(("```", "~~~"))
        and new[-1].is_bare
        and not ends_in_label(whole[: new[-1].start])
    ):
        # Either two instructions, or one that holds a fenced part of its own.
        raise ReflectionRefused("unclear where its fenced instruction ends")
    return new[-1].text


def _without_preface(text: str) -> str:
    """Return an instruction without the words that announce it. Raises `ReflectionRefused` when its end is unclear."""
    preface = PREFACE.match(text)
    if preface is None:
        return text
    instruction = text[preface.end() :].strip()
    if preface["end"] == "." or AFTERWORD.match(instruction.rpartition("\n\n")[2]):
        raise ReflectionRefused(UNFENCED, quoted(text))
    return instruction


def unquoted(text: str) -> str:
    """Return `text` without the marks of a quotation around it or in front of its lines."""
    lines = re.sub(r"^[ \t]*>[ \t]?", "", text.strip(), flags=re.MULTILINE)
    return lines.strip(QUOTE_MARKS + " \t\r\n")


def ends_in_label(text: str) -> bool:
    """Return whether what follows `text` is announced: by a colon, bold type or a heading."""
    last_line = text.rstrip().rpartition("\n")[2]
    return last_line.endswith((":", "**")) or last_line.lstrip().startswith("#")


@dataclass(frozen=True, kw_only=True, slots=True)
class FencedBlock:
    """A fenced block that lies in no other."""

    text: str
    start: int
    """Position of its opening fence in the whole text."""
    is_bare: bool
    """Whether the opening fence is three marks and nothing else, as any closing fence is."""


def outermost_blocks(text: str) -> list[FencedBlock]:
    """Return the outermost fenced blocks, in order.

    As in Markdown a fence is closed by one of its mark, of its length or longer, without a tag. Unlike there one with a
    tag opens an inner block: models put code into an instruction they fence.

    Raises `ReflectionRefused` when a fence is not closed.
    """
    blocks: list[FencedBlock] = []
    opened: list[re.Match[str]] = []
    for fence in FENCE.finditer(text):
        if opened and fence[1][0] != opened[-1][1][0]:
            continue
        is_tagged = bool(fence[2].strip())
        if not opened or (is_tagged and len(fence[1]) >= len(opened[-1][1])):
            opened.append(fence)
        elif len(fence[1]) >= len(opened[-1][1]):
            start = opened.pop()
            if not opened:
                inside = text[start.end() : fence.start()].strip()
                is_bare = len(start[1]) == 3 and not start[2].strip()
                blocks.append(FencedBlock(text=inside, start=start.start(), is_bare=is_bare))
    if opened:
        raise ReflectionRefused("fence not closed")
    return blocks
