"""What ends a response is answered in one place; a directory without a usable tokenizer is refused."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from megatron_p2o.data.tokenizer import end_of_response_ids, load_tokenizer
from megatron_p2o.testing.tiny_model import SPECIAL_TOKENS, character_tokenizer, write_tiny_qwen3

END_OF_TEXT, _, END_OF_TURN = range(3)
NO_END = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def directory_with(
    tmp_path: Path, eos_token: str | None = "<|im_end|>", template: str | None = None, **files: object
) -> Path:
    """Write a tokenizer and, for each of `files` ("config", "generation_config"), the id that it calls eos."""
    tokenizer: PreTrainedTokenizerFast = character_tokenizer()
    tokenizer.eos_token = eos_token
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    for name, ids in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
    return tmp_path


def ends(directory: Path) -> tuple[int, ...]:
    return end_of_response_ids(load_tokenizer(str(directory)), directory)


@pytest.mark.parametrize(
    ("eos_token", "template", "files", "expected"),
    [
        (None, NO_END, {"config": 2}, (2,)),
        (None, NO_END, {"config": 2, "generation_config": [5, 6]}, (2, 5, 6)),
        (None, NO_END, {"config": 2, "generation_config": None}, (2,)),
        ("<|endoftext|>", NO_END, {"config": 7}, (END_OF_TEXT, 7)),
        # Tuned from a base whose token stays everywhere: only the chat template ends its turns with another.
        ("<|endoftext|>", None, {"config": 0, "generation_config": 0}, (END_OF_TEXT, END_OF_TURN)),
        # The base's in the model's files, the turn's in the tokenizer.
        ("<|im_end|>", NO_END, {"config": 0, "generation_config": [0]}, (END_OF_TEXT, END_OF_TURN)),
    ],
)
def test_a_response_ends_at_every_token_any_file_or_the_chat_template_names(
    eos_token: str | None, template: str | None, files: dict[str, object], expected: tuple[int, ...], tmp_path: Path
) -> None:
    assert SPECIAL_TOKENS[END_OF_TURN] == "<|im_end|>"
    assert ends(directory_with(tmp_path, eos_token, template, **files)) == expected


def test_a_template_of_single_questions_tells_nothing_of_turns(tmp_path: Path) -> None:
    single = "{% if messages|length > 1 %}{{ raise_exception('one message') }}{% endif %}{{ messages[0].content }}"
    assert ends(directory_with(tmp_path, None, single, config=9)) == (9,)


def test_a_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no end-of-sequence token"):
        ends(directory_with(tmp_path, None, NO_END))


@pytest.mark.parametrize("left", [("tokenizer_config.json",), ()])
def test_a_model_whose_tokenizer_is_gone_is_refused(left: tuple[str, ...], tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path)
    for name in {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} - set(left):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"model\.path=.* holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_that_knows_no_word_is_refused(tmp_path: Path) -> None:
    from tokenizers import models

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>")
    fast.chat_template = NO_END
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="knows a word"):
        load_tokenizer(str(tmp_path))
