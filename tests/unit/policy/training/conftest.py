"""Tiny models that the tests of training share."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from megatron_p2o.testing.tested_policy import VOCAB_SIZE
from megatron_p2o.testing.tiny_model import write_tiny_qwen3


@pytest.fixture(scope="session", params=[False, True], ids=["untied", "tied"])
def any_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four query heads per key/value head, a head size that is not hidden size / heads, norms that are not 1."""
    directory = write_tiny_qwen3(
        tmp_path_factory.mktemp("tiny"),
        vocab_size=VOCAB_SIZE,
        num_heads=8,
        num_kv_heads=2,
        tie_embeddings=request.param,
    )
    model = Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen3(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)
