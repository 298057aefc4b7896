"""What a run reads before it starts anything, and what can be said of it then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_p2o.config import Config
from megatron_p2o.data.chat import ChatRenderer, chat_renderer, fitting_problems
from megatron_p2o.data.problems import load_problems
from megatron_p2o.types import Problem


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """The problems of a run and how they become tokens."""

    renderer: ChatRenderer
    train: Sequence[Problem]
    evaluation: Mapping[str, Sequence[Problem]]


def load_inputs(config: Config) -> Inputs:
    """Read problems and tokenizer.

    Raises:
        ValueError: a file, a row or a prompt is bad, or prompt evolution could never begin; the message names it.
    """
    renderer = chat_renderer(config)

    def read(path: str) -> Sequence[Problem]:
        return fitting_problems(load_problems(path, config.data), renderer, config.data.skip_bad_rows)

    evaluation = {name: read(path) for name, path in config.data.evaluation.items()}
    inputs = Inputs(renderer=renderer, train=read(config.data.train), evaluation=evaluation)
    check_hard_set(config, len(inputs.train))
    return inputs


def check_hard_set(config: Config, num_problems: int) -> None:
    """Raise `ValueError` when an epoch over `num_problems` never has enough hard ones for a round of evolution."""
    size = config.schedule.problems_per_step
    num_asked = num_problems // size * size  # none: `epoch_batches` says so
    if config.evolution.enabled and 0 < num_asked < config.hard.min_problems:
        raise ValueError(
            f"hard.min_problems={config.hard.min_problems} must be at most the {num_asked} problems of data.train that "
            "an epoch asks, or prompts never evolve: lower it, or set evolution.enabled to false"
        )


def evolution_notice(config: Config, num_steps_per_epoch: int) -> str | None:
    """Return why no round of evolution can begin on the schedule; None when one can, or none is wanted."""
    schedule = config.schedule
    if not config.evolution.enabled:
        return None
    if schedule.epochs == 1:
        return "prompts do not evolve: rounds run between epochs, and schedule.epochs=1"
    if schedule.max_steps is not None and schedule.max_steps < num_steps_per_epoch:
        return (
            f"prompts do not evolve: rounds run between epochs, and schedule.max_steps={schedule.max_steps} ends the "
            f"run in the first, of {num_steps_per_epoch} steps"
        )
    return None
