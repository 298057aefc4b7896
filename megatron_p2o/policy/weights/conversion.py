"""Converts the policy's checkpoints to Hugging Face directories and back, in one process, without engine or run."""

from dataclasses import replace
from pathlib import Path

from megatron_p2o.config.tree import Config, ParallelConfig
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.model.cpu_compat import cuda_stand_ins
from megatron_p2o.policy.model.model import build_models, transformer_config
from megatron_p2o.policy.model.parallel import end_parallel, initialize_parallel
from megatron_p2o.policy.training.checkpoint import check_checkpoint, load_weights
from megatron_p2o.policy.training.ranks import build_policy
from megatron_p2o.policy.weights.hf_directory import write_hf_directory
from megatron_p2o.policy.weights.hf_weights import export_hf_weights


def checkpoint_to_hf(config: Config, checkpoint: Path, directory: Path) -> None:
    """Write the weights of a checkpoint, saved under any layout, as a Hugging Face directory in `model.dtype`.

    Holds the weights once, without optimizer state, and one file of the directory. Configuration and tokenizer are
    those of `model.path`.

    Raises:
        ValueError: `checkpoint` is none of the policy, `directory` is not empty, or `model.path` is not supported.
    """
    check_checkpoint(checkpoint)
    source = Path(config.model.path)
    architecture = read_architecture(source)
    settings = transformer_config(architecture, ParallelConfig(), config.model.dtype, {})
    ranks = initialize_parallel(ParallelConfig(), config.run.seed)
    try:
        with cuda_stand_ins():
            models = build_models(architecture, settings, config.rollout.temperature, "local")
            load_weights(models, checkpoint)
            write_hf_directory(export_hf_weights(models, architecture), source, directory)
    finally:
        end_parallel(ranks)


def hf_to_checkpoint(config: Config, directory: Path) -> None:
    """Write the weights of `model.path` as a checkpoint before the first step, loadable under any layout.

    Holds weights, gradients and optimizer state: 18 bytes per parameter in bfloat16.

    Raises:
        ValueError: `directory` is not empty, or `model.path` is not supported.
    """
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} exists: name a directory that does not, or remove it")
    policy = build_policy(replace(config, parallel=ParallelConfig()))
    try:
        policy.save(directory).result(config.parallel.timeout_s)
    finally:
        policy.close()
