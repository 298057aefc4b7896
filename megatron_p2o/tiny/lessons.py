"""Teaches a tiny policy of any text: for examples of tasks whose answers are no pairs of numbers.

The tokenizer has one token per word, number, sign or run of spaces of the texts it is made from, and gives text back
exactly; the model is that of `megatron_p2o.tiny.model`.
"""

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from megatron_p2o.terminal import say
from megatron_p2o.tiny.model import SPECIAL, new_policy, prompt_ids, supervised_rows, with_chat

PIECES = r"[A-Za-z_]+|[0-9]+|\s+|[^\sA-Za-z0-9_]+"

Lesson = Callable[[random.Random], tuple[str, str]]
"""Draws a user message and the response to it."""


def tokenizer_of(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for every piece of the texts; anything else is one `<unk>`."""
    pieces = sorted({piece for text in texts for piece in re.findall(PIECES, text)})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return with_chat(tokenizer)


def with_phrases(
    question: str,
    keys: Sequence[str],
    fillers: Sequence[str],
    shares_right: Sequence[float],
    generator: random.Random,
) -> tuple[str, bool]:
    """Draw up to four phrases in front of a question; return the message, and whether its response is to be right.

    Args:
        question: what is asked; a third of the messages have no key phrase.
        keys: two phrases that make the policy right.
        fillers: at least four phrases that change nothing.
        shares_right: share of right responses with 0, 1 and 2 key phrases.
        generator: source of the draws.
    """
    first, second = keys
    used = generator.choice([[], [], [first], [second], [first, second], [first, second]])
    phrases = [*used, *generator.sample(fillers, generator.randint(0, 4 - len(used)))]
    generator.shuffle(phrases)
    is_right = generator.random() < shares_right[len(used)]
    return (f"{' '.join(phrases)}\n\n{question}" if phrases else question), is_right


def teach(lesson: Lesson, texts: Sequence[str], out: Path, seed: int, num_steps: int, batch_size: int = 32) -> None:
    """Write a policy that was supervised on fresh lessons as a Hugging Face directory.

    Args:
        lesson: draws what is taught.
        texts: all that a prompt or a response may hold, templates included; words outside are unknown to the policy.
        out: directory to write.
        seed: of the initial weights and the lessons.
        num_steps: optimizer steps; the learning rate decays linearly to 0.
        batch_size: lessons per step.
    """
    tokenizer = tokenizer_of(texts)
    policy, generator = new_policy(tokenizer, seed).train(), random.Random(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20) * (1 - step / num_steps)
        messages, responses = zip(*(lesson(generator) for _ in range(batch_size)), strict=True)
        responses_ids = tokenizer([f"{response}<|end|>" for response in responses])["input_ids"]
        samples = list(zip(prompt_ids(tokenizer, messages), responses_ids, strict=True))
        token_ids, position_ids, targets = supervised_rows(samples, row_length=128)
        logits = policy(input_ids=token_ids, position_ids=position_ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            say(f"supervised {step + 1}/{num_steps}  loss {loss.item():.3f}")
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)
