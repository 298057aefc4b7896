"""How the reply of a reflection model is read: what is the new template in it, and what is none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_p2o.endpoints.reply import EndpointRefused, read_reply
from megatron_p2o.evolve.reflection.reflection import ReflectionRefused
from megatron_p2o.evolve.reflection.reply import (
    CUT,
    DECLINED,
    NO_ANSWER_AFTER_REASONING,
    ONLY_REASONING,
    SAME_AS_PARENT,
    THINKS_ALOUD,
    UNFENCED,
    template_in,
)
from megatron_p2o.terminal import quoted

PARENT = "Ask."


def body(content: Any, finish_reason: str | None = "stop", **message: Any) -> bytes:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


def template(content: Any, finish_reason: str | None = "stop", parent: str = PARENT, **message: Any) -> str:
    return template_in(read_reply(body(content, finish_reason, **message)), parent)


def refusal(content: Any, finish_reason: str | None = "stop", parent: str = PARENT, **message: Any) -> str:
    with pytest.raises(ReflectionRefused) as refused:
        template(content, finish_reason, parent, **message)
    return str(refused.value)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```\nDraw it.\n```", "Draw it."),
        ("```\r\nDraw it.\r\n```\r\n", "Draw it."),
        ("```Draw it.```", "Draw it."),
        ("Sure!\n```markdown\nDraw it.\n\nTwice.\n```\nGood luck.", "Draw it.\n\nTwice."),
        ("  ```\n  indented fence\n  ```", "indented fence"),
        ("```\nUse `x` and ``y``.\n```", "Use `x` and ``y``."),
        ("  Draw it.\n", "Draw it."),
        ("Never say that you can't help.", "Never say that you can't help."),
        ("I cannot stress enough: check units.", "I cannot stress enough: check units."),
        ("I can't emphasize this enough: check units.", "I can't emphasize this enough: check units."),
        ("Let me think step by step.", "Let me think step by step."),
        ("I want you to tell me the steps.", "I want you to tell me the steps."),
        ("We list what the problem gives us.", "We list what the problem gives us."),
        ("The user gives a problem. Solve it.", "The user gives a problem. Solve it."),
        ("Okay, so it lacks a plan.\n```\nOkay, the user asks me. Plan.\n```", "Okay, the user asks me. Plan."),
        ("~~~\nDraw it.\n~~~", "Draw it."),
        ("~~~text\nUse\n```\nx\n```\n~~~", "Use\n```\nx\n```"),
        ("```\nUse\n~~~\nx\n~~~\n```", "Use\n~~~\nx\n~~~"),
    ],
)
def test_template_is_what_is_fenced_else_the_whole_reply(answer: str, expected: str) -> None:
    assert template(answer) == expected
    assert template(answer, None) == expected, "a finish reason is not always given"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>maybe\n```\nnot this\n```\n</think>\n```\nthis\n```", "this"),
        ("thoughts without opening tag\n```\n</think>\n```\nthis\n```", "this"),
        ("<think>hm</think>\n\nDraw it.", "Draw it."),
    ],
)
def test_reasoning_is_no_part_of_the_template(answer: str, expected: str) -> None:
    assert template(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```text\nold\n```\nbetter:\n```\nnew\n```", "new"),
        ("```\nFirst draft\n```\nImproved:\n```\nSecond draft\n```\nHope this helps", "Second draft"),
        ("A draft:\n```\nold\n```\n\n## Final instruction\n\n```\nnew\n```", "new"),
        ("The present instruction is\n```\nAsk.\n```\nIt lacks a plan. So\n```\nPlan.\n```", "Plan."),
        ("```\nPlan.\n```\ninstead of\n```\nAsk.\n```", "Plan."),
    ],
)
def test_of_several_blocks_the_last_that_is_new_is_taken(answer: str, expected: str) -> None:
    assert template(answer) == expected


TAGGED = "Use this form:\n```python\nx = 1\n```\nthen box it."
BARE = "Use this form:\n```\nx = 1\n```\nthen box it."
UNCLOSED = "Use this form:\n```python\nx = 1\nthen box it."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (f"```\n{TAGGED}\n```", TAGGED),
        (f"Here it is.\n```markdown\n{TAGGED}\n```\nGood luck.", TAGGED),
        (f"````\n{TAGGED}\n````", TAGGED),
        (f"````markdown\n{BARE}\n````", BARE),
        (f"Here it is:\n`````\n{BARE}\n`````", BARE),
        (f"````\n{UNCLOSED}\n````", UNCLOSED),
    ],
)
def test_a_fence_inside_a_fence_belongs_to_the_template(answer: str, expected: str) -> None:
    assert template(answer) == expected


@pytest.mark.parametrize("lead", ["", "Here it is:\n"])
def test_reply_whose_fences_can_be_read_in_two_ways_is_refused(lead: str) -> None:
    assert refusal(f"{lead}```\n{BARE}\n```") == "unclear where its fenced instruction ends"


@pytest.mark.parametrize("reason", ["length", "max_tokens", "LENGTH"])
@pytest.mark.parametrize(
    "answer",
    [
        "Let me look at the examples first. In Example 1 the model was asked for 12 x 13, so the instruction should",
        "Analysis.\n```\nThink step by ",
        "```\nDraw it.\n```\nThis helps because",
        "The present instruction is\n```\nAsk.\n```\nIt lacks the following: the model must",
    ],
)
def test_a_reply_cut_at_its_limit_is_no_template_and_names_the_setting(answer: str, reason: str) -> None:
    assert refusal(answer, reason) == CUT
    assert "evolution.reflection.max_tokens" in CUT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", {"reasoning_content": "hmm " * 500}),
        (None, {"reasoning_content": "hmm"}),
        (None, {"reasoning": "hmm"}),
        ("<think>and then I", {}),
        ("<think>all of it</think>\n", {}),
    ],
)
def test_reasoning_that_leaves_no_room_for_an_answer_is_called_that(answer: Any, message: dict[str, str]) -> None:
    assert refusal(answer, "length", **message) == ONLY_REASONING
    is_unfinished = answer == "<think>and then I"
    assert refusal(answer, "stop", **message) == (ONLY_REASONING if is_unfinished else NO_ANSWER_AFTER_REASONING)


@pytest.mark.parametrize(
    ("answer", "reason", "message"),
    [
        ("I'm sorry, but I can't help with that.", "stop", {}),
        ("I\u2019m unable to assist.", "stop", {}),
        ("Sorry, I cannot do this.", "stop", {}),
        ("Unfortunately, I won't write instructions.", "stop", {}),
        ("```\nI am sorry, I can not help.\n```", "stop", {}),
        ("As an AI language model, I do not", "stop", {}),
        ("Sorry, this request violates policy.", "stop", {}),
        ("Sure, but I'm sorry, I can't help with that.", "stop", {}),
        ("I don't feel comfortable writing that.", "stop", {}),
        ("", "content_filter", {}),
        (None, "stop", {"refusal": "I'm sorry."}),
    ],
)
def test_a_model_that_declines_gives_no_template(answer: Any, reason: str, message: dict[str, str]) -> None:
    assert refusal(answer, reason, **message) == DECLINED


@pytest.mark.parametrize(
    "answer",
    [
        "Okay, the user wants a better instruction. Let me look at the examples.",
        "Hmm. The examples are about areas.",
        "I need to write a better instruction for this model.",
        "Let me study the judgements to find what the instruction lacks.",
        "We are asked to improve the prompt.",
    ],
)
def test_reasoning_without_tags_or_fences_is_no_template(answer: str) -> None:
    assert refusal(answer) == THINKS_ALOUD


@pytest.mark.parametrize(
    "answer",
    [
        "Here is a better instruction: Draw it.",
        "Here's the improved instruction:\n\nDraw it.",
        "Sure! Here is a better instruction for the model:\nDraw it.",
        "**New instruction:** Draw it.",
        "# Instruction:\nDraw it.",
        "Improved prompt: Draw it.",
    ],
)
def test_words_that_announce_an_unfenced_instruction_are_no_part_of_it(answer: str) -> None:
    assert template(answer) == "Draw it."


@pytest.mark.parametrize(
    "answer",
    [
        "Here is a better instruction. Draw it.",
        "Here is a better instruction:\nDraw it.\n\nThis instruction tells the model to draw.",
        "Here is a better instruction: Draw it.\n\nI hope this helps!",
    ],
)
def test_unfenced_instruction_whose_beginning_or_end_is_unclear_is_refused(answer: str) -> None:
    assert refusal(answer) == UNFENCED


def test_instruction_that_speaks_of_instructions_is_kept_whole() -> None:
    for answer in ("Here is what to do. Draw it.", "Follow the instruction: draw it.", "This instruction is short."):
        assert template(answer) == answer


@pytest.mark.parametrize("quote", ["> Ask.", '"Ask."', "\u201cAsk.\u201d", "**Ask.**", "```\n> Ask.\n```"])
def test_the_parent_in_quotes_is_the_parent(quote: str) -> None:
    assert refusal(quote) == SAME_AS_PARENT
    assert refusal("> Ask.\n> Tell.", parent="Ask.\nTell.") == SAME_AS_PARENT
    assert refusal('"Ask."', parent='"Ask."') == SAME_AS_PARENT


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("The present instruction is\n```\nAsk.\n```\nI would keep it.", SAME_AS_PARENT),
        ("```\nDraw it, and", "fence not closed"),
        ("```\nold\n```\nbetter:\n```\nnew, cut off", "fence not closed"),
        ("Use ```inline``` fences", "fence not closed"),
        ("```\n\n```", "empty"),
        ('""', "empty"),
        ("~~~\nDraw it, and", "fence not closed"),
        ("  \n", "empty"),
        (None, "empty"),
    ],
)
def test_a_reply_without_a_new_whole_template_is_refused(answer: Any, reason: str) -> None:
    assert refusal(answer) == reason


def test_text_that_comes_in_parts_is_joined() -> None:
    parts = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "```\nDraw"},
        {"type": "text", "text": " it.\n```"},
    ]
    assert template(parts) == "Draw it."


def test_quotes_of_others_are_short_and_hold_no_control_characters() -> None:
    assert quoted("a\nb\tc") == "a b c"
    assert quoted("\x1b[2J\u202eabc\ud800é") == "\\x1b[2J\\u202eabc\\ud800é"
    assert quoted(b"\xff" * 10_000) == "�" * 200


PIECES = st.sampled_from(
    [
        "```",
        "````",
        "```python",
        "~~~",
        '"',
        "> ",
        "\n",
        " ",
        "word",
        "Ask.",
        ":",
        "# x",
        "<think>",
        "</think>",
        "I'm sorry",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["text", "length"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "text", "type"]) | st.text(), inner, max_size=3
        )
    ),
    max_leaves=12,
)


@given(st.lists(PIECES, max_size=14).map("".join), st.sampled_from([None, "stop", "length"]))
def test_any_text_gives_a_part_of_it_or_a_refusal(text: str, finish_reason: str | None) -> None:
    try:
        read = template(text, finish_reason)
    except ReflectionRefused:
        return
    assert read and read == read.strip() and read in text and read != PARENT


@given(VALUES | st.builds(lambda message: {"choices": [{"message": message}]}, VALUES))
def test_any_json_is_a_reply_or_a_refusal(value: Any) -> None:
    try:
        template_in(read_reply(json.dumps(value).encode()), PARENT)
    except (ReflectionRefused, EndpointRefused):
        return
