"""Write a tiny Qwen3 policy with its own tokenizer: what tests and the smallest runs start from."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHATML_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen's ChatML without tools and thinking."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Padding, start of turn, end of turn (the end-of-sequence token), as ids 0, 1 and 2."""

MIN_VOCAB_SIZE = 128
"""Special tokens, printable ASCII and newline, rounded up."""


def write_tiny_qwen3(
    directory: Path,
    *,
    seed: int = 0,
    vocab_size: int = 256,
    hidden_size: int = 32,
    intermediate_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 2048,
    tie_embeddings: bool = False,
    weight_scale: float = 4.0,
    end_token_id: int = SPECIAL_TOKENS.index("<|im_end|>"),
) -> Path:
    """Write config.json, float32 safetensors and a tokenizer with a chat template; return `directory`.

    The tokenizer has one token per printable ASCII character, so every text of the tests is encodable and decoding is
    exact. Same arguments, same bytes: the weights depend on `seed` alone and torch's global random state is untouched.

    Args:
        vocab_size: rows of the embedding, at least `MIN_VOCAB_SIZE`; ids beyond the characters decode as `<extra_N>`.
        weight_scale: factor on every matrix; above 1 makes distributions peaked enough that errors in log-probs show.
        end_token_id: what ends a response; with `vocab_size` or more every one is as long as it may be.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size={vocab_size} must be at least {MIN_VOCAB_SIZE} to hold every ASCII character")
    directory.mkdir(parents=True, exist_ok=True)
    character_tokenizer(vocab_size).save_pretrained(directory)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tie_embeddings,
        eos_token_id=end_token_id,
        pad_token_id=SPECIAL_TOKENS.index("<|endoftext|>"),
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(weight_scale)
    model.save_pretrained(directory)
    return directory


def write_kernel_sized_qwen3(directory: Path) -> Path:
    """Write a tiny Qwen3 of 1,000 tokens with sizes that the kernels for a GPU take; return `directory`.

    Its weights keep the distributions within what bfloat16 resolves.
    """
    return write_tiny_qwen3(
        directory,
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        head_dim=64,
        weight_scale=2.0,
    )


def character_tokenizer(vocab_size: int = 256) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer whose words are single ASCII characters, with `CHATML_TEMPLATE`."""
    characters = [*SPECIAL_TOKENS, "\n", *(chr(code) for code in range(32, 127))]
    words = characters + [f"<extra_{index}>" for index in range(vocab_size - len(characters))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML_TEMPLATE
    return fast
