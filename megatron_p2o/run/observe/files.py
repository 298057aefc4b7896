"""The files that a run appends to, opened at the start of a fresh run or at a checkpoint."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_p2o.config.tree import Config
from megatron_p2o.interfaces import Policy
from megatron_p2o.metrics.log import MetricsLog, open_metrics_log
from megatron_p2o.metrics.rollouts import RolloutWriter
from megatron_p2o.run.beginning import Beginning
from megatron_p2o.run.observe.warnings import kept_warnings
from megatron_p2o.run_folder.checkpoints import CheckpointSaver
from megatron_p2o.run_folder.state import LedgerFile


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """The files a run appends to."""

    run_dir: Path
    ledger: LedgerFile
    metrics: MetricsLog
    checkpoints: CheckpointSaver
    rollouts: RolloutWriter


def open_files(
    config: Config, run_dir: Path, policy: Policy, beginning: Beginning, num_steps: int, stack: ExitStack
) -> RunFiles:
    """Open the files of a run of `num_steps`, to be closed by `stack`. Lines after its start are set aside.

    Raises:
        CheckpointError: the ledger holds less than the checkpoint counts.
        ValueError: a sink of metrics that was asked for cannot be had.
    """
    resumed = beginning.resumed
    num_kept = resumed.num_metrics_lines if resumed else 0
    metrics = open_metrics_log(run_dir, config.run.name, config.logging, num_steps, num_kept, asdict(config))
    stack.enter_context(metrics)
    stack.enter_context(kept_warnings(run_dir / "warnings.jsonl"))
    ledger = LedgerFile(run_dir / "hard_samples.jsonl", resumed.num_ledger_entries if resumed else 0)
    stack.callback(ledger.close)
    num_to_keep = config.schedule.keep_checkpoints
    return RunFiles(
        run_dir=run_dir,
        ledger=ledger,
        metrics=metrics,
        checkpoints=CheckpointSaver(run_dir, policy, num_to_keep, beginning.checkpoint, beginning.made_with),
        rollouts=RolloutWriter(run_dir / "rollouts", resumed.step if resumed else -1),
    )
