"""Every model type against transformers, in one process."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.model.attention import pack_layout, sample_positions
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.policy.weights.hf_directory import write_hf_directory
from megatron_p2o.testing.policy_oracle import PolicyOracle, policy_config, random_samples
from megatron_p2o.testing.tiny_model_types import TINY_MODEL_TYPES, write_tiny_model

VOCAB_SIZE = 131


@pytest.fixture(scope="module", params=[name for name in TINY_MODEL_TYPES if name != "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), request.param, vocab_size=VOCAB_SIZE)


@pytest.fixture
def policy(directory: Path) -> Iterator[MegatronPolicy]:
    with closing(build_policy(policy_config(directory))) as policy:
        yield policy


def test_logits_equal_transformers_and_the_weights_come_back_bit_for_bit(
    policy: MegatronPolicy, directory: Path, tmp_path: Path
):
    lengths = torch.tensor([7, 1, 300])
    ids = torch.randint(1, VOCAB_SIZE, (308,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad(), cuda_stand_ins():
        logits = policy._shard.models[0](
            ids[None], sample_positions(cu_seqlens)[None], None, packed_seq_params=pack_layout(cu_seqlens)
        )
        expected = torch.cat([model(part[None]).logits[0] for part in ids.split(lengths.tolist())])
    assert expected.std() > 0.5
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)

    write_hf_directory(policy.weights(), directory, tmp_path / "exported")
    original = load_file(directory / "model.safetensors")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())


def test_counted_arithmetic_is_that_of_transformers_without_what_the_causal_mask_hides(directory: Path):
    architecture = read_architecture(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if architecture.experts is not None:
        model.set_experts_implementation("eager")  # the counter does not know the grouped product
    num_tokens = 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(num_tokens)[None] % VOCAB_SIZE)
    hidden_pairs = num_tokens**2 - num_tokens * (num_tokens + 1) // 2
    hidden = 4 * hidden_pairs * architecture.num_heads * architecture.head_dim * architecture.num_layers
    rotary = counter.get_total_flops() - hidden - architecture.forward_flops(num_tokens, num_tokens)
    # Each angle of the rotary embedding is a product of an outer product: 2 x tokens x half a head.
    assert rotary == 2 * num_tokens * architecture.head_dim // 2


def test_an_update_equals_transformers_with_torch_adamw(policy: MegatronPolicy, directory: Path):
    oracle = PolicyOracle(policy_config(directory))
    samples = random_samples((9, 3, 14), vocab_size=VOCAB_SIZE)
    report = policy.update(samples, None, 30)
    loss, grad_norm = oracle.update(samples, None, 30)
    assert report.loss == pytest.approx(loss, abs=1e-6)
    assert report.grad_norm == pytest.approx(grad_norm, rel=1e-4)
    architecture = read_architecture(directory)
    forward = [architecture.forward_flops(sample.num_tokens, len(sample.response_ids)) for sample in samples]
    assert report.flops_per_rank == 3 * sum(forward)
    for ours, theirs in zip(policy.logprobs(samples), oracle.logprobs(samples), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs), rtol=0, atol=1e-4)
