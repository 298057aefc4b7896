"""The tiny Qwen3 and its tokenizer: made, fed with rows of samples, and sampled from."""

import re
from collections.abc import Sequence
from typing import cast

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_p2o.tiny.problems import FAMILIES, MODULUS, PHRASES

MAX_NEW_TOKENS = 36
"""The longest response has 32."""

TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Accepts `enable_thinking`, as every chat template does, and has no use for it."""


SPECIAL = ("<|pad|>", "<unk>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Control tokens of the tiny policies."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer: one token per number, word and sign; anything else is one `<unk>`."""
    signs = ["+", ":", ",", ".", "\\boxed{", "}"]
    numbers = [str(number) for number in range(MODULUS)]
    words = sorted({*FAMILIES, *re.findall("[a-z]+", " ".join(PHRASES))})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *signs, *numbers, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    token_pattern = Regex(r"\\boxed\{|[0-9]+|[a-z]+|[^\s0-9a-z]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(token_pattern, behavior="removed", invert=True)
    return with_chat(tokenizer)


def with_chat(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return the tokenizer, whose vocabulary begins with `SPECIAL`, with the tiny policies' chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|pad|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=TINY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=512,
    )


def new_policy(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return an untrained float32 Qwen3 of 194,944 parameters."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            initializer_range=0.07,
            pad_token_id=tokenizer.get_vocab()["<|pad|>"],
            bos_token_id=None,
            eos_token_id=tokenizer.get_vocab()["<|end|>"],
            dtype="float32",
        )
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each user message in the chat template."""
    conversations = [[{"role": "user", "content": message}] for message in messages]
    token_ids = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    return cast(list[list[int]], token_ids)


def supervised_rows(samples: Sequence[tuple[list[int], list[int]]], row_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lay samples end to end in rows: token ids, position ids and targets, int64 [rows, row_length].

    Positions restart at 0 with each sample, which tells transformers to keep attention inside it. Targets are the next
    token on responses and -100 elsewhere.
    """
    rows: list[list[tuple[list[int], list[int]]]] = []
    num_free: list[int] = []
    for prompt, response in sorted(samples, key=lambda sample: -len(sample[0]) - len(sample[1])):
        length = len(prompt) + len(response) - 1
        row = next((index for index, free in enumerate(num_free) if free >= length), len(rows))
        if row == len(rows):
            rows.append([])
            num_free.append(max(row_length, length))
        rows[row].append((prompt, response))
        num_free[row] -= length
    token_ids = torch.zeros(len(rows), row_length, dtype=torch.int64)
    position_ids = torch.zeros_like(token_ids)
    targets = torch.full_like(token_ids, -100)
    for row, row_samples in enumerate(rows):
        first = 0
        for prompt, response in row_samples:
            last = first + len(prompt) + len(response) - 1
            token_ids[row, first:last] = torch.tensor((prompt + response)[:-1])
            position_ids[row, first:last] = torch.arange(last - first)
            targets[row, first + len(prompt) - 1 : last] = torch.tensor(response)
            first = last
    return token_ids, position_ids, targets


@torch.no_grad()
def sample_texts(
    policy: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, messages: Sequence[str], temperature: float
) -> list[str]:
    """Return one response per user message; temperature 0 is greedy."""
    greedy = {"do_sample": False}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else greedy
    texts: list[str] = []
    for first in range(0, len(messages), 512):
        prompts = tokenizer.pad(
            {"input_ids": prompt_ids(tokenizer, messages[first : first + 512])}, return_tensors="pt"
        )
        token_ids = policy.eval().generate(  # pyright: ignore[reportAttributeAccessIssue]
            **prompts, **sampling, max_new_tokens=MAX_NEW_TOKENS
        )
        texts += tokenizer.batch_decode(token_ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
