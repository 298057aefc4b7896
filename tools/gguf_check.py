"""Compares a model that `fetch_smollm2.py` wrote with its GGUF file: weights, tokens, greedy text, log-probs.

Weights are compared with the file's blocks by the formulas of their formats, and with what transformers reads of it.
Text and log-probs are llama.cpp's, by `pip install xllamacpp`, where that is installed. llama.cpp rounds what it
multiplies quantised weights with to 8 bits. So it is asked twice: with the file as it is, and with the file's values
written in float32, where only the order of sums differs from ours.
"""

import json
import os
import secrets
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PROMPTS = (
    "How is 47 written?",
    "5 is written \\boxed{5}. How is 47 written?",
    "What is the capital of France?",
    "Write three short sentences about the sea.",
    "Count from 1 to 10.",
)

NUM_NEW_TOKENS = 32
NUM_LIKELIEST = 100
"""Tokens whose log-probs are compared at each position: llama.cpp's likeliest."""

TIMEOUT_S = 120.0


def formula(tensor: Any) -> np.ndarray[Any, Any]:
    """Return the values of a tensor of GGUF in float32, by the formula of its blocks of 32.

    Q4_1: scale, minimum, 16 bytes of two numbers each, the first halves first. Q8_0: scale, 32 numbers.
    """
    kind, data = tensor.tensor_type.name, np.asarray(tensor.data)
    if kind == "F32":
        return data
    if kind not in ("Q4_1", "Q8_0"):
        raise ValueError(f"{tensor.name} is {kind}: no formula for it here")
    blocks = data.reshape(-1, 20 if kind == "Q4_1" else 34)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        values = scale * blocks[:, 2:].view(np.int8).astype(np.float32)
    else:
        minimum = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
        numbers = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        values = scale * numbers.astype(np.float32) + minimum
    return values.reshape(data.shape[0], -1)


def check_weights(file: Path, model: Path, values_of: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield what was found equal. `values_of`: the file's weights under their Hugging Face names, by `formula`.

    Raises `SystemExit` naming the weights that differ.
    """
    disable_progress_bar()
    ours = load_file(model / "model.safetensors")
    compare_weights(ours, values_of, f"the values of {file.name} by the formulas of its blocks")
    yield f"{len(ours)} weights are, bit for bit, the values of {file.name} by the formulas of its blocks"
    if find_spec("accelerate") is None:
        yield "they were not compared with what transformers reads: pip install accelerate, and again"
        return
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    theirs = {name: weight for name, weight in read.items() if name in ours or name != "lm_head.weight"}
    compare_weights(ours, theirs, f"what transformers {version('transformers')} reads of {file.name}")
    yield f"and what transformers {version('transformers')} reads of it"


def compare_weights(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], whose: str) -> None:
    """Raise `SystemExit` naming the weights that differ, unless all are equal."""
    names = sorted(ours.keys() | theirs.keys())
    differing = [
        name for name in names if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]
    if differing:
        raise SystemExit(f"{len(differing)} weights are not {whose}: {', '.join(differing[:5])}")


def check_answers(file: Path, model: Path) -> Iterator[str]:
    """Yield how greedy text and log-probs of the prompts compare with llama.cpp's, or what is missing for that."""
    if find_spec("xllamacpp") is None:
        yield "greedy text and log-probs were not compared: pip install xllamacpp, which is llama.cpp, and again"
        return
    yield f"transformers {version('transformers')} against llama.cpp (xllamacpp {version('xllamacpp')}):"
    tokenizer = AutoTokenizer.from_pretrained(model)
    ours = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "float32.gguf"
        write_in_float32(file, exact)
        for path, what in ((exact, "the file's values in float32"), (file, "the file as it is")):
            with llama_server(path) as ask:
                yield f"  {what}: {compared_answers(ask, tokenizer, ours)}"


def compared_answers(ask: Any, tokenizer: Any, ours: Any) -> str:
    """Return how the answers to the prompts compare. Raises `SystemExit` where a prompt has other tokens."""
    num_equal, num_positions = 0, 0
    differences: list[float] = []
    gaps: list[float] = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids != (theirs := ask("/tokenize", {"content": text, "parse_special": True})["tokens"]):
            raise SystemExit(f"{prompt!r} is {ids} here and {theirs} in llama.cpp")
        answer = ask("/completion", {"prompt": ids, **GREEDY})
        tokens, steps = answer["tokens"], answer["completion_probabilities"]
        logprobs_RV = logprobs_of(ours, ids, tokens)
        num_equal += logprobs_RV.argmax(-1).tolist() == tokens
        gaps += [float(logprobs_V.max() - logprobs_V[token]) for logprobs_V, token in zip(logprobs_RV, tokens)]
        # llama.cpp gives no log-probs of a token that leaves a character unfinished.
        told = [t for t in range(len(tokens)) if not tokenizer.decode(tokens[: t + 1]).endswith("\ufffd")]
        if [tokens[t] for t in told] != [step["id"] for step in steps]:
            raise SystemExit(f"{prompt!r}: llama.cpp's log-probs are not of its tokens")
        num_positions += len(told)
        for t, step in zip(told, steps):
            differences += [each["logprob"] - float(logprobs_RV[t, each["id"]]) for each in step["top_logprobs"]]
    away = np.abs(differences)
    below = f", the others' tokens up to {max(gaps):.2g} nats below ours" if num_equal < len(PROMPTS) else ""
    return (
        f"{num_equal} of {len(PROMPTS)} greedy texts are the same{below}; {len(away)} log-probs at {num_positions} "
        f"positions differ by at most {away.max():.2g}, on average {away.mean():.2g}"
    )


GREEDY = {
    "n_predict": NUM_NEW_TOKENS,
    "n_probs": NUM_LIKELIEST,
    "temperature": 0.0,
    "cache_prompt": False,
    "return_tokens": True,
}


def logprobs_of(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Return the log-probs of all tokens at each place of the response, [R, V]."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        return model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def write_in_float32(file: Path, out: Path) -> None:
    """Write the same model with dequantised weights, in GGUF's own names and order."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        is_list = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if is_list else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.ascontiguousarray(formula(tensor)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def llama_server(file: Path) -> Iterator[Any]:
    """Serve a GGUF on the loopback by llama.cpp; gives a function that posts to it. Its cache is in float32."""
    import xllamacpp

    key = secrets.token_hex()
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 512
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.api_keys = [key]
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def ask(path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return json.load(reply)

    yield ask
