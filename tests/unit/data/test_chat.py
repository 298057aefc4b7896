"""Prompts as tokens: the template is seen while sampling and never while training."""

import json
import logging
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_p2o.config.tree import Config, DataConfig, ModelConfig, RolloutConfig, RunConfig, TaskConfig, one_task
from megatron_p2o.data.chat import (
    ChatRenderer,
    chat_renderer,
    fitting_problems,
    prompt_limit,
    with_fitting_demonstrations,
)
from megatron_p2o.interfaces import PromptTooLongError
from megatron_p2o.testing.tiny_model import character_tokenizer
from megatron_p2o.types import PLAIN, Completion, Problem, Template

DATA = DataConfig(train=one_task("unused"), question_format="Q: {question} in \\boxed{{}}")
PROBLEM = Problem(id="p1", question="1+1", answer="2")
HINT = Template(id=3, text="\n count twice \n", parent=None)

THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}(no thoughts)\n{% endif %}{% endif %}"
)
"""Qwen3's switch: thoughts are on unless it is set to false."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    return ModelConfig(path=str(directory))


@pytest.fixture(scope="module")
def renderer(model: ModelConfig) -> ChatRenderer:
    return ChatRenderer(model, DATA)


def text_of(renderer: ChatRenderer, token_ids: np.ndarray) -> str:
    return str(renderer.tokenizer.decode(token_ids.tolist()))


def test_plain_prompt_is_one_user_message_then_the_assistant(renderer: ChatRenderer) -> None:
    prompt = renderer.render(PROBLEM, PLAIN)
    assert text_of(renderer, prompt.training_ids) == (
        "<|im_start|>user\nQ: 1+1 in \\boxed{}<|im_end|>\n<|im_start|>assistant\n(no thoughts)\n"
    )
    assert prompt.sampling_ids is prompt.training_ids
    assert not prompt.is_templated


def test_engine_sees_the_template_and_training_does_not(renderer: ChatRenderer) -> None:
    prompt = renderer.render(PROBLEM, HINT)
    assert text_of(renderer, prompt.sampling_ids) == (
        "<|im_start|>user\ncount twice\n\nQ: 1+1 in \\boxed{}<|im_end|>\n<|im_start|>assistant\n(no thoughts)\n"
    )
    np.testing.assert_array_equal(prompt.training_ids, renderer.render(PROBLEM, PLAIN).training_ids)
    assert prompt.problem is PROBLEM and prompt.template is HINT and prompt.is_templated


@pytest.mark.parametrize("enable_thinking", [False, True])
@pytest.mark.parametrize("template", [PLAIN, HINT])
def test_tokens_equal_those_of_transformers(model: ModelConfig, template: Template, enable_thinking: bool) -> None:
    from transformers import AutoTokenizer

    renderer = ChatRenderer(replace(model, enable_thinking=enable_thinking), DATA)
    content = ("count twice\n\n" if template is HINT else "") + "Q: 1+1 in \\boxed{}"
    expected = AutoTokenizer.from_pretrained(model.path).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, enable_thinking=enable_thinking
    )["input_ids"]
    rendered = renderer.render(PROBLEM, template).sampling_ids
    assert rendered.tolist() == list(expected)
    assert ("thoughts" in text_of(renderer, rendered)) is not enable_thinking


def test_token_ids_are_int32_and_cannot_be_edited_in_place(renderer: ChatRenderer) -> None:
    prompt = renderer.render(PROBLEM, HINT)
    assert prompt.sampling_ids.dtype == prompt.training_ids.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        prompt.training_ids[0] = 5


def test_template_of_blanks_is_the_plain_prompt(renderer: ChatRenderer) -> None:
    prompt = renderer.render(PROBLEM, Template(id=4, text=" \n", parent=None))
    np.testing.assert_array_equal(prompt.sampling_ids, prompt.training_ids)


def test_stored_plain_prompt_follows_the_question_not_the_id(renderer: ChatRenderer) -> None:
    renderer.render(PROBLEM, PLAIN)
    other = renderer.render(replace(PROBLEM, question="2+2"), PLAIN)
    assert "2+2" in text_of(renderer, other.training_ids)


def test_braces_in_question_and_template_are_kept(renderer: ChatRenderer) -> None:
    prompt = renderer.render(replace(PROBLEM, question="{x}"), Template(id=5, text="use {0} {y}", parent=None))
    assert "use {0} {y}\n\nQ: {x} in \\boxed{}" in text_of(renderer, prompt.sampling_ids)


def test_prompt_over_the_limit_is_an_error_and_never_cut(model: ModelConfig, renderer: ChatRenderer) -> None:
    num_plain = len(renderer.render(PROBLEM, PLAIN).training_ids)
    exact = ChatRenderer(model, replace(DATA, max_prompt_tokens=num_plain))
    assert len(exact.render(PROBLEM, PLAIN).training_ids) == num_plain
    with pytest.raises(ValueError, match=rf"problem p1 .* template 3 .* more than data.max_prompt_tokens={num_plain}"):
        exact.render(PROBLEM, HINT)
    with pytest.raises(PromptTooLongError, match=f"asked plainly takes {num_plain} tokens"):
        ChatRenderer(model, replace(DATA, max_prompt_tokens=num_plain - 1)).render(PROBLEM, PLAIN)


def test_problems_that_do_not_fit_are_an_error_or_left_out(
    model: ModelConfig, renderer: ChatRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    num_plain = len(renderer.render(PROBLEM, PLAIN).training_ids)
    limited = ChatRenderer(model, replace(DATA, max_prompt_tokens=num_plain))
    long = replace(PROBLEM, id="p2", question="1+1+1")
    with pytest.raises(ValueError, match="problem p2 asked plainly"):
        fitting_problems([PROBLEM, long], limited, skip_bad_rows=False)
    with caplog.at_level(logging.WARNING):
        assert fitting_problems([PROBLEM, long], limited, skip_bad_rows=True) == [PROBLEM]
    assert "1 problems are too long and left out, 1 stay" in caplog.text
    with pytest.raises(ValueError, match="problem p2"):
        fitting_problems([long], limited, skip_bad_rows=True)


def test_a_response_of_a_teacher_ends_as_the_policy_s_own(renderer: ChatRenderer) -> None:
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    written = renderer.response_ids("1 and 1")
    assert text_of(renderer, written) == "1 and 1<|im_end|>" and written[-1] == end and written.dtype == np.int32
    for cut_off in ("1 and 1<|im_end|>", "1 and 1<|im_end|>\n<|im_start|>user\nand 2?"):
        np.testing.assert_array_equal(renderer.response_ids(cut_off), written)


def test_demonstrations_that_are_too_long_are_left_out_and_counted(
    renderer: ChatRenderer, caplog: pytest.LogCaptureFixture
) -> None:
    problems = [replace(PROBLEM, demonstrations=("12", "1234")), replace(PROBLEM, id="p2", demonstrations=("123456",))]
    with caplog.at_level(logging.WARNING):
        fitting = with_fitting_demonstrations(problems, renderer, 5)
    assert [problem.demonstrations for problem in fitting] == [("12", "1234"), ()]
    said = "1 of 3 demonstrations are longer than rollout.max_new_tokens=5 tokens and left out"
    assert [record.message for record in caplog.records] == [said]
    assert with_fitting_demonstrations([PROBLEM], renderer, 5) == [PROBLEM] and len(caplog.records) == 1
    with pytest.raises(
        ValueError, match=r"all 3 demonstrations are longer than rollout\.max_new_tokens=2 tokens: raise"
    ):
        with_fitting_demonstrations(problems, renderer, 2)


def test_decoding_gives_the_text_without_special_tokens_and_with_every_blank(renderer: ChatRenderer) -> None:
    text = "a  b , c . \\boxed{2}\n"
    token_ids = [*renderer.tokenizer.encode(text, add_special_tokens=False), *renderer.eos_token_ids]
    completion = Completion(
        prompt=renderer.render(PROBLEM, PLAIN),
        token_ids=np.asarray(token_ids, dtype=np.int32),
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason="stop",
        weight_versions=(0,),
    )
    assert renderer.decode(completion) == text
    assert renderer.pieces(completion, len(token_ids)) == [*text, *("" for _ in renderer.eos_token_ids)]
    assert renderer.pieces(completion, 3) == ["a", " ", " "]


def test_the_last_token_of_a_character_brings_it(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=THINKING_TEMPLATE)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(tmp_path)
    renderer = ChatRenderer(ModelConfig(path=str(tmp_path)), DATA)
    token_ids = np.asarray(renderer.tokenizer.encode("aé😀 b"), dtype=np.int32)
    completion = Completion(
        prompt=renderer.render(PROBLEM, PLAIN),
        token_ids=token_ids,
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason="length",
        weight_versions=(0,),
    )
    assert renderer.pieces(completion, 100) == ["a", "", "é", "", "", "", "😀", " ", "b"]
    assert renderer.pieces(completion, 5) == ["a", "", "é", "", ""]


@pytest.mark.parametrize("question_format", ["{question} {level}", "{question} {0}", "{question} {", "{question"])
def test_question_format_that_cannot_be_filled_is_an_error(model: ModelConfig, question_format: str) -> None:
    with pytest.raises(ValueError, match=r"data\.question_format=.* double literal braces"):
        ChatRenderer(model, replace(DATA, question_format=question_format))


def test_directory_without_a_tokenizer_or_chat_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path=.*empty holds no tokenizer"):
        (tmp_path / "empty").mkdir()
        ChatRenderer(ModelConfig(path=str(tmp_path / "empty")), DATA)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="tokenizer without a chat template"):
        ChatRenderer(ModelConfig(path=str(tmp_path / "base")), DATA)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system message') }}", "fails on a user's message .no system message."),
        ("{{ messages[1].content }}", "fails on a user's message"),
        ("{% if %}", "fails on a user's message"),
        ("Hello!", "writes a user's message 0 times"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "writes a user's message 2 times"),
    ],
)
def test_a_chat_template_that_cannot_ask_is_an_error(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"model\.path=.* has a chat template that {message}"):
        ChatRenderer(ModelConfig(path=str(tmp_path)), DATA)


DATED_TEMPLATE = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}<|im_end|>"
"""As Llama 3.1's system message does it."""


def test_a_chat_template_sees_the_date_of_the_run_in_every_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = DATED_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    model = ModelConfig(path=str(tmp_path))
    dated = ChatRenderer(replace(model, template_date="2026-01-31"), DATA)
    assert text_of(dated, dated.render(PROBLEM, HINT).training_ids).startswith("31 Jan 2026 Q: 1+1")
    today = ChatRenderer(model, DATA)
    before = today.render(PROBLEM, PLAIN).training_ids
    import transformers.utils.chat_template_utils as rendering

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Tomorrow":
            return super().now(tz) + timedelta(days=1)

    monkeypatch.setattr(rendering, "datetime", Tomorrow)
    after = today.render(PROBLEM, HINT)
    assert text_of(today, after.sampling_ids)[:11] == text_of(today, after.training_ids)[:11]
    np.testing.assert_array_equal(after.training_ids, before)
    with pytest.raises(ValueError, match=r"model\.template_date=31\.1\.2026 must be a date"):
        ChatRenderer(replace(model, template_date="31.1.2026"), DATA)


def run_of(
    model: ModelConfig, max_positions: int | None, max_new_tokens: int, max_prompt_tokens: int = 200, **sglang: int
) -> Config:
    """Return settings of a model whose config.json names `max_positions`."""
    settings = {} if max_positions is None else {"max_position_embeddings": max_positions}
    (Path(model.path) / "config.json").write_text(json.dumps({"model_type": "qwen3", **settings}))
    return Config(
        run=RunConfig(name="test"),
        model=model,
        data=replace(DATA, max_prompt_tokens=max_prompt_tokens),
        rollout=RolloutConfig(max_new_tokens=max_new_tokens),
        sglang=sglang,
    )


@pytest.mark.parametrize(
    ("max_positions", "max_new_tokens", "sglang", "expected"),
    [
        (None, 1000, {}, 200),
        (1000, 800, {}, 200),
        (1000, 801, {}, 199),
        (1000, 999, {}, 1),
        (1000, 100, {"context_length": 150}, 50),
        (1000, 100, {"context-length": 150}, 50),
    ],
)
def test_a_prompt_may_have_what_a_response_leaves_of_the_context(
    model: ModelConfig, max_positions: int | None, max_new_tokens: int, sglang: dict[str, int], expected: int
) -> None:
    assert prompt_limit(run_of(model, max_positions, max_new_tokens, **sglang)).num_tokens == expected


def test_a_response_that_leaves_no_room_for_a_prompt_is_an_error(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"rollout\.max_new_tokens=1000 leaves no room .* the 1000 positions"):
        prompt_limit(run_of(model, 1000, 1000))


def test_prompts_that_do_not_fit_the_context_are_refused_with_the_reason(
    model: ModelConfig, renderer: ChatRenderer
) -> None:
    num_plain = len(renderer.render(PROBLEM, PLAIN).training_ids)
    tight = chat_renderer(run_of(model, 500, 500 - num_plain))
    assert tight.limit.num_tokens == num_plain
    tight.render(PROBLEM, PLAIN)
    with pytest.raises(PromptTooLongError, match=r"problem p1 asked through template 3 takes .* more than the "):
        tight.render(PROBLEM, HINT)
    long = replace(PROBLEM, id="p2", question="1+1+1")
    expected = (
        f"problem p2 asked plainly takes {num_plain + 2} tokens, more than the {num_plain} that rollout.max_new_tokens="
        f"{500 - num_plain} leaves of the model's 500 positions: lower rollout.max_new_tokens, or leave"
    )
    with pytest.raises(ValueError) as refused:
        fitting_problems([PROBLEM, long], tight, skip_bad_rows=False)
    assert expected in str(refused.value)


def test_a_system_message_comes_before_the_question_and_templates_do_not_touch_it(renderer: ChatRenderer) -> None:
    problem = replace(PROBLEM, system_prompt="Be brief.")
    prompt = renderer.render(problem, HINT)
    assert text_of(renderer, prompt.training_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 1+1 in \\boxed{}<|im_end|>\n"
        "<|im_start|>assistant\n(no thoughts)\n"
    )
    assert text_of(renderer, prompt.sampling_ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ncount twice\n\nQ: 1+1"
    )
    assert text_of(renderer, renderer.render(PROBLEM, PLAIN).training_ids).startswith("<|im_start|>user"), (
        "by the problem"
    )


def test_a_system_message_with_control_tokens_is_refused(renderer: ChatRenderer) -> None:
    with pytest.raises(ValueError, match=r"the system message .* holds the control token <\|im_end\|>: take it out"):
        renderer.render(replace(PROBLEM, system_prompt="Be <|im_end|> brief."), PLAIN)


def test_a_chat_template_that_leaves_the_system_message_out_is_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE.replace("in messages %}", "in messages if message.role == 'user' %}")
    tokenizer.save_pretrained(tmp_path)
    renderer = ChatRenderer(ModelConfig(path=str(tmp_path)), DATA)
    assert renderer.render(PROBLEM, PLAIN).problem is PROBLEM
    with pytest.raises(ValueError, match=r"has a chat template that leaves out the system message 'Be brief\.'"):
        renderer.render(replace(PROBLEM, system_prompt="Be brief."), PLAIN)


def test_a_task_has_a_question_format_of_its_own(model: ModelConfig) -> None:
    tasks = {"math": TaskConfig(file="m"), "code": TaskConfig(file="c", question_format="Write {question}.")}
    renderer = ChatRenderer(model, replace(DATA, train=tasks))
    asked = {task: renderer.user_message(replace(PROBLEM, task=task), PLAIN) for task in ("", "math", "code")}
    assert asked == {"": "Q: 1+1 in \\boxed{}", "math": "Q: 1+1 in \\boxed{}", "code": "Write 1+1."}
    shared = [renderer.render(replace(PROBLEM, task=task), PLAIN).training_ids.tolist() for task in ("math", "code")]
    assert shared[0] != shared[1], "the same question of another task is another prompt"
    bad = {"code": TaskConfig(file="c", question_format="{question} {answer}")}
    with pytest.raises(ValueError, match=r"data\.train\.code\.question_format=.* no other field"):
        ChatRenderer(model, replace(DATA, train=bad))


@pytest.mark.parametrize(("opening", "opened"), [("<think>\n", "<think>"), ("<think>\n\n</think>\n\n", ""), ("", "")])
def test_a_response_begins_with_the_thinking_that_its_prompt_opens(tmp_path: Path, opening: str, opened: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE.replace("(no thoughts)\n", opening)
    tokenizer.save_pretrained(tmp_path)
    renderer = ChatRenderer(ModelConfig(path=str(tmp_path)), DATA)
    prompt = renderer.render(PROBLEM, PLAIN)
    token_ids = np.asarray(renderer.tokenizer.encode("so 2", add_special_tokens=False), dtype=np.int32)
    completion = Completion(
        prompt=prompt,
        token_ids=token_ids,
        logprobs=np.zeros(len(token_ids), dtype=np.float32),
        finish_reason="length",
        weight_versions=(0,),
    )
    assert renderer.decode(completion) == f"{opened}so 2"
    assert renderer.pieces(completion, 2) == [f"{opened}s", "o"]
