"""The compute account of a run: what rank 0 counts, and what the journals of its rounds say."""

from dataclasses import replace
from pathlib import Path

from megatron_p2o.algorithm import TrainState
from megatron_p2o.evolve.process.spending import RoundSpending
from megatron_p2o.metrics.compute import ComputeAccount, ComputeMeter, account_in, since
from megatron_p2o.metrics.jsonl import read_lines
from megatron_p2o.run.beginning import Beginning


class RunCompute:
    """What a run has spent on what its checkpoints keep. Steps that a resume does again count once."""

    def __init__(self, meter: ComputeMeter, run_dir: Path) -> None:
        self.meter = meter
        self._rounds = RoundSpending(run_dir)

    def account(self, state: TrainState) -> ComputeAccount:
        """Return what has been spent up to `state`, with the round that runs beside training."""
        tokens = self._rounds.tokens(state.epoch)
        return replace(
            self.meter.account(),
            sampled_minibatch_tokens=tokens.minibatch,
            sampled_development_tokens=tokens.development,
            sampled_control_tokens=tokens.control,
            reflection_prompt_tokens=tokens.reflection_prompt,
            reflection_completion_tokens=tokens.reflection_completion,
            reflections_without_usage_count=tokens.num_unknown,
        )


def spent_before(beginning: Beginning) -> ComputeAccount:
    """Return what the checkpoint counts that a run goes on from."""
    resumed = beginning.resumed
    return ComputeAccount() if resumed is None else replace(resumed.compute, wall_s=resumed.wall_s)


def spent_since_checkpoint(run_dir: Path, beginning: Beginning) -> ComputeAccount:
    """Return what the run had spent after the checkpoint that it goes on from, by its metrics; it is spent again.

    What was in flight when it was killed had not been written down, and is not known.
    """
    if beginning.resumed is None:
        return ComputeAccount()
    lines = [account_in(line.get("metrics", {})) for line in read_lines(run_dir / "metrics.jsonl")]
    kept = _last(lines[: beginning.resumed.num_metrics_lines])
    return since(_last(lines), kept)


def _last(accounts: list[ComputeAccount | None]) -> ComputeAccount:
    return next((account for account in reversed(accounts) if account is not None), ComputeAccount())
