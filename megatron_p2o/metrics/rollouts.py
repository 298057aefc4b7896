"""Every rollout of a step as JSON lines, for reading and for the report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path

from megatron_p2o.files import write_whole
from megatron_p2o.interfaces import PromptRenderer
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.types import Completion, ContextShift, Demonstration, Group, Logprobs, Rollout, RolloutKey


class RolloutWriter:
    """Writes `step-000012.jsonl` files, one line per rollout, groups kept together."""

    def __init__(self, directory: Path, keep_through_step: int = -1) -> None:
        """Open `directory` for a run that resumes after `keep_through_step`; later steps move to `discarded/`."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for step, path in step_files(directory):
            if step > keep_through_step:
                (directory / "discarded").mkdir(exist_ok=True)
                path.replace(directory / "discarded" / path.name)

    def write(
        self,
        step: int,
        groups: Sequence[Group],
        renderer: PromptRenderer,
        shifts: Mapping[RolloutKey, ContextShift],
    ) -> Path:
        """Write the step's file, whole or not at all, and return its path. `renderer` gives the texts of responses."""
        lines = [
            json.dumps(
                {
                    **_line(group, rollout, advantage, renderer.decode(rollout.completion)),
                    **_shift_fields(shifts.get((group.problem.id, place))),
                    **_token_fields(rollout.completion, shifts.get((group.problem.id, place)), renderer),
                },
                ensure_ascii=False,
            )
            for group in groups
            for place, (rollout, advantage) in enumerate(zip(group.rollouts, group.advantages, strict=True))
        ]
        path = self._directory / f"step-{step:06d}.jsonl"
        write_whole(path, "".join(line + "\n" for line in lines))
        return path


def step_files(directory: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, file) of a `rollouts` folder in order of step; nothing when there is no such folder."""
    for path in sorted(directory.glob("step-*.jsonl")):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            yield int(number), path


def _line(group: Group, rollout: Rollout, advantage: float, response: str) -> JsonObject:
    completion, problem = rollout.completion, group.problem
    return {
        "problem_id": problem.id,
        "task": problem.task,
        "source": problem.source,
        "level": problem.level,
        "question": problem.question,
        "answer": problem.answer,
        # Ids are unique within a library version only, so the text says which template it was.
        "template_id": completion.prompt.template.id,
        "template": completion.prompt.template.text,
        "is_templated": completion.prompt.is_templated,
        "is_demonstration": isinstance(completion.prompt.template, Demonstration),
        # Of a rollout that was sampled plainly and taught by a template (`objective.context: distill`).
        "teacher_template": None if rollout.teaching is None else rollout.teaching.template.text,
        "gain_per_token": _mean_gain(rollout),
        "is_solved": rollout.is_solved,
        "reward": rollout.reward if rollout.is_decided else None,
        "reason": rollout.grade.reason,
        "feedback": rollout.grade.feedback,
        "advantage": advantage,
        "response": response,
        "num_prompt_tokens": len(completion.prompt.sampling_ids),
        "num_response_tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "weight_versions": list(completion.weight_versions),
    }


def _shift_fields(shift: ContextShift | None) -> JsonObject:
    """Return what the template adds to the response's log-probs, nats per token; null where it was not measured."""
    if shift is None:
        return {"shift_per_token": None, "shift_head_per_token": None, "shift_rest_per_token": None}
    return {
        "shift_per_token": shift.per_token,
        "shift_head_per_token": shift.head_sum / shift.head_tokens if shift.head_tokens else None,
        "shift_rest_per_token": shift.rest_sum / shift.rest_tokens if shift.rest_tokens else None,
    }


def _token_fields(completion: Completion, shift: ContextShift | None, renderer: PromptRenderer) -> JsonObject:
    """Return the first tokens one by one where their shifts were kept; else nothing.

    As columns, which take less room: the length of each token's text, in characters of the response; its log-prob under
    the prompt of sampling and its shift, nats; the share of its weight that the context ratio leaves it.
    """
    if shift is None or shift.tokens is None:
        return {}
    pieces = renderer.pieces(completion, len(shift.tokens.shifts))
    if not pieces:
        return {}
    return {
        "tokens": {
            "lengths": [len(piece) for piece in pieces],
            "sampling_logprobs": _numbers(completion.logprobs[: len(pieces)]),
            "shifts": _numbers(shift.tokens.shifts),
            "kept": _numbers(shift.tokens.kept),
        }
    }


def _numbers(values: Logprobs) -> list[float | None]:
    """Return the values to three decimals; None for what JSON has no number for."""
    return [round(value, 3) if isfinite(value) else None for value in values.tolist()]


def _mean_gain(rollout: Rollout) -> float | None:
    """Return the mean gain of the tokens, nats; None where no template taught it."""
    if rollout.teaching is None or rollout.teaching.gains is None:
        return None
    return float(rollout.teaching.gains.mean(dtype=float))
