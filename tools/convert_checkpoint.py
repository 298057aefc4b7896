"""Turn a checkpoint of a run into a Hugging Face directory, which transformers and SGLang load, or the reverse.

    python tools/convert_checkpoint.py to-hf runs/first/checkpoints/step-000030 --out models/first-30
    python tools/convert_checkpoint.py from-hf models/first-30 --config runs/first/config.yaml --out runs/warm/policy

`to-hf` takes the type of the weights, the configuration and the tokenizer from the run's config.yaml and its
`model.path`. `from-hf` writes weights, fresh optimizer state and schedule: what the policy of a run with these settings
loads. One process, on the CPU even where there is a GPU; the weights must fit into host memory (see
`megatron_p2o.policy.weights.conversion`).
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks

from megatron_p2o.config.read import load_config
from megatron_p2o.errors import expected_message
from megatron_p2o.policy.rank_channel import PolicyError
from megatron_p2o.policy.weights.conversion import checkpoint_to_hf, hf_to_checkpoint
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, undamaged
from megatron_p2o.run_folder.state import CheckpointError
from megatron_p2o.terminal import printable, say, set_up_logging


def main() -> None:
    set_up_logging()
    arguments = parse_arguments()
    source: Path = arguments.source
    try:
        if arguments.direction == "to-hf":
            policy_folder = source
            if (source / POLICY_FOLDER).is_dir():
                undamaged(source)
                policy_folder = source / POLICY_FOLDER
            checkpoint_to_hf(load_config(arguments.config or settings_above(source)), policy_folder, arguments.out)
        else:
            config = load_config(arguments.config)
            hf_to_checkpoint(replace(config, model=replace(config.model, path=str(source))), arguments.out)
    except (CheckpointError, PolicyError) as error:
        sys.exit(printable(f"{source} was not converted: {error}"))
    except (ValueError, OSError) as error:
        message = expected_message(error)
        if message is None:
            raise
        sys.exit(printable(f"{source} was not converted: {message}"))
    say(str(arguments.out))


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
    for direction in (to_hf, from_hf):
        direction.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    return parser.parse_args()


if __name__ == "__main__":
    main()
