"""A user's text never becomes chat markup, whichever family's it holds; other texts keep their usual tokens."""
# ruff: noqa: RUF001 (the wide bars are how one family writes its control tokens)

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_p2o.config.tree import DataConfig, ModelConfig, one_task
from megatron_p2o.data.chat import ChatRenderer
from megatron_p2o.data.markup import control_tokens
from megatron_p2o.evolve.reflection.reflection import with_markup_as_text
from megatron_p2o.types import PLAIN, Problem, Template

CORPUS = [
    "the answer is 42 and so on",
    "<|im_end|> </s> [INST] </think> <｜end▁of▁sentence｜>",
    "x^2 + y^2 = z^2 \\frac{1}{2}",
] * 20

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = "{{ bos_token }}{% for message in messages %}[INST] {{ message.content }}[/INST]{% endfor %}"
DEEPSEEK = (
    "{{ bos_token }}{% for message in messages %}<｜User｜>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)

MARKUP = (
    *("</s>", "<s>", "<unk>", "[INST]", "[/INST]", "<think>", "</think>", "<|im_end|>", "<|im_start|>", "<|eot_id|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<tool_call>"),
)
"""Control tokens of several families, and what looks like some."""


def byte_level(special: list[str], apart: list[str], normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """Return a BPE over bytes; `apart` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in apart])
    return tokenizer


def qwen() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["<think>", "</think>"], normalizers.NFC())
    return with_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>"), CHATML)


def llama3() -> PreTrainedTokenizerFast:
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(names, []), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    return with_template(fast, LLAMA3)


def deepseek() -> PreTrainedTokenizerFast:
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(names, ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]),
        bos_token=names[0],
        eos_token=names[1],
    )
    return with_template(fast, DEEPSEEK)


def sentence_piece() -> PreTrainedTokenizerFast:
    """Return a BPE with spaces as pieces and bytes as a last resort, whose control tokens stand in its vocabulary."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
    model = json.loads(trained.to_str())["model"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [(first, second) for first, second in model["merges"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_template(fast, MISTRAL)


def unigram() -> PreTrainedTokenizerFast:
    """Return a model that finds control tokens by itself: they are pieces of its vocabulary."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pieces = [(name, 0.0) for name in special] + [(chr(code), -5.0) for code in range(32, 127)] + [("▁", -3.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return with_template(fast, MISTRAL)


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({chr(code): code for code in range(127)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return with_template(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>"), CHATML)


def with_template(fast: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    fast.chat_template = template
    return fast


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "qwen": qwen,
    "llama3": llama3,
    "deepseek": deepseek,
    "sentence_piece": sentence_piece,
    "unigram": unigram,
    "words": words,
}
EXACT = ("qwen", "llama3", "deepseek", "sentence_piece")
"""Families whose decoding gives back every text of the tests."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def renderer(family: str, tmp_path_factory: pytest.TempPathFactory) -> ChatRenderer:
    directory = tmp_path_factory.mktemp(family)
    FAMILIES[family]().save_pretrained(directory)
    return renderer_of(directory)


def renderer_of(directory: Path) -> ChatRenderer:
    return ChatRenderer(
        ModelConfig(path=str(directory)), DataConfig(train=one_task("unused"), question_format="{question}")
    )


def asked(renderer: ChatRenderer, question: str, template: str = "") -> list[int]:
    instruction = Template(id=1, text=template, parent=None) if template else PLAIN
    problem = Problem(id=question, question=question, answer="1")
    return renderer.render(problem, instruction).sampling_ids.tolist()


def controls(renderer: ChatRenderer, token_ids: list[int]) -> list[int]:
    known = set(control_tokens(renderer.tokenizer).values())
    return [token for token in token_ids if token in known]


def usual(renderer: ChatRenderer, content: str) -> list[int]:
    chat = [{"role": "user", "content": content}]
    return list(
        renderer.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, enable_thinking=False, return_dict=False
        )
    )


def harmless_texts() -> list[str]:
    generator = random.Random(7)
    alphabet = [*"abc 019\n\t{}\\$<>|/[]_-+=.,", "é", "→", "\u2028", "日本", " \n\n", "the answer is ", "\\frac{1}{2}"]
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(1, 60))) for _ in range(200)]
    return ["What is 6 x 7?", " leading and trailing \n", "<b>bold</b> a < b | c > d", *texts]


def test_text_without_markup_keeps_the_tokens_of_transformers(renderer: ChatRenderer) -> None:
    for text in harmless_texts():
        assert asked(renderer, text) == usual(renderer, text), text


@pytest.mark.parametrize("markup", MARKUP)
def test_markup_in_a_question_or_template_is_text(renderer: ChatRenderer, family: str, markup: str) -> None:
    expected = controls(renderer, asked(renderer, "1+1"))
    question = f"Solve{markup}x {markup} now{markup}"
    for token_ids, content in (
        (asked(renderer, question), question),
        (asked(renderer, "1+1", f"{markup}Think{markup} well"), f"{markup}Think{markup} well\n\n1+1"),
    ):
        assert controls(renderer, token_ids) == expected
        if family in EXACT:
            text = renderer.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            decoded = renderer.tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
            # A piece's blank is written with this character, so that it decodes as one.
            assert decoded == (text.replace("▁", " ") if family == "sentence_piece" else text)


def test_the_tests_markup_would_be_control_tokens_otherwise(renderer: ChatRenderer) -> None:
    expected = controls(renderer, asked(renderer, "1+1"))
    seen = [markup for markup in MARKUP if controls(renderer, usual(renderer, f"Solve{markup}x")) != expected]
    assert set(seen) == set(MARKUP) & set(control_tokens(renderer.tokenizer))
    assert len(seen) >= 3


def test_reflection_prompt_is_text_to_the_chat_endpoint_of_the_policys_server(renderer: ChatRenderer) -> None:
    # SGLang's endpoint tokenises the chat template's text as `usual` does.
    expected = controls(renderer, usual(renderer, "1+1"))
    names = renderer.control_tokens
    shown = "".join(f"Solve{markup}x {markup} now{markup}" for markup in (*MARKUP, *names))
    text = with_markup_as_text(shown, names)
    assert controls(renderer, usual(renderer, text)) == expected
    assert text.replace(" ", "") == shown.replace(" ", "")
    assert with_markup_as_text("a < b and [1, 2]", names) == "a < b and [1, 2]"


def test_text_beside_markup_is_split_as_usual(tmp_path: Path) -> None:
    qwen().save_pretrained(tmp_path)
    renderer = renderer_of(tmp_path)
    harmless = asked(renderer, "the answer is 42")
    marked = asked(renderer, "the answer is 42<|im_end|>")
    # The frame's beginning and the text before the markup have the tokens they have without it.
    place = (
        len(harmless)
        - len(asked(renderer, ""))
        + asked(renderer, "").index(renderer.tokenizer.convert_tokens_to_ids("<|im_end|>"))
    )
    assert marked[:place] == harmless[:place]
    assert renderer.tokenizer.decode(marked[place:]).startswith("<|im_end|>")
    assert marked[place] != renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
