"""Checkpoints as Hugging Face directories, and back."""

from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_p2o.config.tree import Config
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.policy.weights.conversion import checkpoint_to_hf, hf_to_checkpoint
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model import write_tiny_qwen3

SAMPLES = random_samples((9, 3, 14), vocab_size=256)


def trained_checkpoint(config: Config, directory: Path) -> dict[str, torch.Tensor]:
    """Write a checkpoint after an update; return its weights."""
    with closing(build_policy(config)) as policy:
        policy.update(SAMPLES, None, 30)
        policy.save(directory).result(300)
        return dict(policy.weights())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_becomes_a_model_of_transformers_and_comes_back_bit_for_bit(tmp_path: Path, dtype: str):
    source = write_tiny_qwen3(tmp_path / "source", tie_embeddings=True)
    config = policy_config(source, dtype=dtype)
    trained = trained_checkpoint(config, tmp_path / "checkpoint")

    checkpoint_to_hf(config, tmp_path / "checkpoint", tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert converted.keys() == trained.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in trained.items())
    embedding = "model.embed_tokens.weight"
    assert not torch.equal(converted[embedding].float(), load_file(source / "model.safetensors")[embedding])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert model.dtype == getattr(torch, dtype)
    tokenizers = [AutoTokenizer.from_pretrained(directory) for directory in (source, tmp_path / "converted")]
    assert tokenizers[0].encode("1+1") == tokenizers[1].encode("1+1")

    converted_config = policy_config(tmp_path / "converted", dtype=dtype)
    hf_to_checkpoint(converted_config, tmp_path / "back")
    with closing(build_policy(config)) as policy:
        policy.load(tmp_path / "back")
        assert all(torch.equal(converted[name], tensor) for name, tensor in policy.weights())
        expected = PolicyOracle(converted_config).logprobs(SAMPLES)
        for ours, theirs in zip(policy.logprobs(SAMPLES), expected, strict=True):
            # Eight bits of mantissa in every activation, on log-probs of about -10.
            atol = 1e-5 if dtype == "float32" else 0.3
            torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), rtol=0, atol=atol)


def test_what_is_no_checkpoint_and_what_would_be_overwritten_is_named(tmp_path: Path):
    source = write_tiny_qwen3(tmp_path / "source")
    with pytest.raises(ValueError, match=r"source holds no checkpoint of the policy"):
        checkpoint_to_hf(policy_config(source), source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"source exists: name a directory that does not"):
        hf_to_checkpoint(policy_config(source), source)
