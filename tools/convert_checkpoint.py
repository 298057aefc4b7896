"""Turn a checkpoint of a run into a Hugging Face directory, which transformers and SGLang load, or the reverse.

    python tools/convert_checkpoint.py to-hf runs/first/checkpoints/step-000030 --out models/first-30
    python tools/convert_checkpoint.py from-hf models/first-30 --config runs/first/config.yaml --out runs/warm/policy
    python tools/convert_checkpoint.py compare runs/first/checkpoints/step-000030 models/first-30

`to-hf` takes the type of the weights, the configuration and the tokenizer from the run's config.yaml and its
`model.path`. `from-hf` writes weights, fresh optimizer state and schedule: what the policy of a run with these settings
loads. `compare` says whether both hold the same weights, bit for bit, and how far transformers' log-probs of some
tokens are from Megatron's. One process, on the CPU even where there is a GPU; the weights must fit into host memory
(see `megatron_p2o.policy.weights.conversion`), for `compare` with optimizer state and a second time in float32.
"""

import argparse
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

import numpy as np
import torch
from torch import Tensor

from megatron_p2o.config.read import load_config
from megatron_p2o.config.tree import Config, ParallelConfig
from megatron_p2o.errors import expected_message
from megatron_p2o.policy.model.architecture import read_architecture
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.training.ranks import MegatronPolicy, build_policy
from megatron_p2o.policy.weights.conversion import checkpoint_to_hf, hf_to_checkpoint
from megatron_p2o.policy.weights.hf_directory import REDUNDANT_SUFFIXES, WeightFiles, first_of
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, undamaged
from megatron_p2o.run_folder.state import CheckpointError
from megatron_p2o.terminal import printable, say, set_up_logging

NUM_SAMPLES, NUM_RESPONSE_TOKENS = 16, 32
"""Random sequences, and tokens of each, whose log-probs are compared."""


def main() -> None:
    set_up_logging()
    arguments = parse_arguments()
    source: Path = arguments.source
    undone = "compared" if arguments.direction == "compare" else "converted"
    try:
        said = done(arguments)
    except (CheckpointError, PolicyError) as error:
        sys.exit(printable(f"{source} was not {undone}: {error}"))
    except (ValueError, OSError) as error:
        message = expected_message(error)
        if message is None:
            raise
        sys.exit(printable(f"{source} was not {undone}: {message}"))
    say(said)


def done(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for and return what to say of it."""
    source: Path = arguments.source
    if arguments.direction == "from-hf":
        config = load_config(arguments.config)
        hf_to_checkpoint(replace(config, model=replace(config.model, path=str(source))), arguments.out)
        return str(arguments.out)
    config = load_config(arguments.config or settings_above(source))
    if arguments.direction == "compare":
        return compared(config, policy_folder_of(source), arguments.directory)
    checkpoint_to_hf(config, policy_folder_of(source), arguments.out)
    return str(arguments.out)


def policy_folder_of(source: Path) -> Path:
    """Return the policy of a checkpoint of a run, which must be whole, or `source` itself."""
    if not (source / POLICY_FOLDER).is_dir():
        return source
    undamaged(source)
    return source / POLICY_FOLDER


def compared(config: Config, checkpoint: Path, directory: Path) -> str:
    """Return that both have the same weights, and how far transformers' log-probs are from Megatron's.

    Raises:
        ValueError: weights differ; it names them.
    """
    # Imported here: it loads transformers, which conversions do without.
    from megatron_p2o.testing.policy_oracle import PolicyOracle, random_samples

    samples = random_samples([NUM_RESPONSE_TOKENS] * NUM_SAMPLES, vocab_size=read_architecture(directory).vocab_size)
    # The policy begins with the run's initial weights: what a checkpoint lacks does not pass for the directory's.
    with closing(build_policy(replace(config, parallel=ParallelConfig()))) as policy:
        policy.load(checkpoint)
        num_weights = check_equal(policy, directory)
        ours = np.concatenate(policy.logprobs(samples))
    model = replace(config.model, path=str(directory))
    theirs = np.concatenate(PolicyOracle(replace(config, model=model)).logprobs(samples))
    return (
        f"{num_weights} weights are equal, bit for bit\n"
        f"log-probs of {len(ours)} random tokens, {theirs.min():.1f} to {theirs.max():.1f}: Megatron in "
        f"{config.model.dtype} and transformers in float32 differ by at most {np.abs(ours - theirs).max():.1e}"
    )


def check_equal(policy: MegatronPolicy, directory: Path) -> int:
    """Return how many weights a policy and a directory have. Raises `ValueError` unless all bits are the same."""
    with WeightFiles(directory) as files:
        theirs = set(files.names)
        ours = {name: name in theirs and bits_equal(weight, files.read(name)) for name, weight in policy.weights()}
    unknown = (name for name in theirs - ours.keys() if not name.endswith(REDUNDANT_SUFFIXES))
    differing = sorted([*(name for name, is_equal in ours.items() if not is_equal), *unknown])
    if differing:
        raise ValueError(f"{len(differing)} weights are not those of {directory}: {first_of(differing)}")
    return len(ours)


def bits_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def settings_above(checkpoint: Path) -> Path:
    """Return the config.yaml of the run that a checkpoint lies in."""
    for folder in checkpoint.absolute().parents:
        if (folder / "config.yaml").is_file():
            return folder / "config.yaml"
    raise ValueError("no folder above it has a config.yaml: name one with --config")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    to_hf = directions.add_parser("to-hf", help="checkpoint to Hugging Face directory")
    to_hf.add_argument("source", type=Path, help="checkpoints/step-NNNNNN of a run, or a policy folder")
    to_hf.add_argument("--config", type=Path, help="the run's settings; default: config.yaml of the run of `source`")
    from_hf = directions.add_parser("from-hf", help="Hugging Face directory to checkpoint")
    from_hf.add_argument("source", type=Path, help="Hugging Face directory")
    from_hf.add_argument("--config", type=Path, required=True, help="settings whose policy will load the checkpoint")
    compare = directions.add_parser("compare", help="compare a checkpoint with the Hugging Face directory made of it")
    compare.add_argument("source", type=Path, help="checkpoints/step-NNNNNN of a run, or a policy folder")
    compare.add_argument("directory", type=Path, help="Hugging Face directory")
    compare.add_argument("--config", type=Path, help="the run's settings; default: config.yaml of the run of `source`")
    for direction in (to_hf, from_hf):
        direction.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    return parser.parse_args()


if __name__ == "__main__":
    main()
