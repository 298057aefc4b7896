"""What the benchmark beside TRL reports of runs, and how it measures a program."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[3] / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def run(step_s: float, wall_s: float, refresh_s: float | None = None) -> dict[str, Any]:
    step = {
        "num_rollouts": 12,
        "rollout_s": step_s / 2,
        "update_s": step_s / 4,
        "response_tokens": 60,
        "step_s": step_s,
    }
    refreshed = {} if refresh_s is None else {"refresh_s": refresh_s}
    steps = [{**step, **refreshed}, {**step, **refreshed, "step_s": 9.0}, {**step, **refreshed}]
    of_run = {"start_s": 1.0, "wall_s": wall_s, "cpu_s": 5.0, "peak_bytes": 3 * 2**20}
    return {**of_run, "steps": steps, "accuracy": {"2": 0.5}}


def test_ratios_are_taken_within_a_turn_and_medians_over_the_turns() -> None:
    from trl_comparison import compared, table

    rows = compared({"trl": [run(2.0, 10), run(4.0, 40), run(8.0, 20)], "ours": [run(1.0, 20, 0.5) for _ in range(3)]})
    # Steps of 2 s sample 12 rollouts in 1 s; the slow step in the middle moves no median.
    assert rows["rollouts_per_s"] == {"trl": 6.0, "ours": 24.0, "ratio": 4.0, "ratio_low": 2.0, "ratio_high": 8.0}
    assert rows["update_tokens_per_s"]["trl"] == 60.0 and rows["peak_mib"]["ours"] == 3.0
    assert rows["wall_s"] == {"trl": 20, "ours": 20, "ratio": 1.0, "ratio_low": 0.5, "ratio_high": 2.0}
    assert rows["refresh_s"] == {"trl": 0.0, "ours": 0.5}, "no ratio to nothing"
    assert "| wall_s | 20 | 20 | 1.00 (0.50-2.00) |" in table(rows).splitlines()


def test_a_program_is_measured_with_what_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from process_tree import ProcessTree, run_measured

    # The child holds 64 MiB until a sample has seen them, and half a second of the parent.
    child = "held = bytearray(64 << 20); held[::4096] = b'x' * len(held[::4096]); input()"
    program = f"""if True:
        import subprocess, sys, time
        from pathlib import Path
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE)
        while time.process_time() < 1.5: pass
        while not Path("is_seen").exists(): time.sleep(0.05)
        child.communicate(b"\\n")
    """
    script = tmp_path / "parent.py"
    script.write_text(program)
    sample = ProcessTree._sample

    def noted_sample(tree: ProcessTree) -> None:
        sample(tree)
        has_worked = any(program == "parent.py" and cpu_s >= 0.5 for program, cpu_s in tree._cpu_s.values())
        if has_worked and tree._peak_bytes >= 64 << 20:
            (tmp_path / "is_seen").touch()

    monkeypatch.setattr(ProcessTree, "_sample", noted_sample)
    taken = run_measured([sys.executable, str(script)], os.environ, tmp_path / "log", tmp_path, 300)
    assert taken.peak_bytes >= 64 << 20
    assert 0.5 <= taken.cpu_s_by_program["parent.py"] <= taken.cpu_s < 60


def test_a_program_that_fails_ends_the_benchmark_with_its_last_words(tmp_path: Path) -> None:
    from process_tree import run_measured

    command = [sys.executable, "-c", "raise SystemExit('no such policy')"]
    with pytest.raises(SystemExit, match="no such policy"):
        run_measured(command, os.environ, tmp_path / "log", tmp_path, 120)


def test_a_line_of_our_metrics_is_read_under_the_peer_s_names() -> None:
    from bench_against_trl import our_step

    metrics = {"perf/rollout_s": 2.0, "perf/grade_s": 0.5, "perf/train_s": 1.0, "perf/refresh_s": 0.25}
    metrics |= {"perf/step_s": 4.0, "rollout/rollouts_count": 12.0, "rollout/response_tokens_mean": 2.5}
    step = our_step(metrics | {"rollout/dropped_rollouts_share": 0.5, "rollout/reward_mean": 0.1})
    assert (step["rollout_s"], step["update_s"], step["refresh_s"], step["step_s"]) == (2.5, 1.0, 0.25, 4.0)
    assert (step["num_rollouts"], step["response_tokens"]) == (12, 30)


def test_both_trainers_are_given_the_same_numbers(tmp_path: Path) -> None:
    import bench_against_trl as bench

    from megatron_p2o.config.read import load_config

    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text('{"question": "1", "answer": "1"}\n')
    setting = bench.Setting(
        folder=tmp_path,
        model=tmp_path,
        train=tmp_path / "train.jsonl",
        held_out=tmp_path / "held_out.jsonl",
        num_steps=4,
        threads=1,
    )
    (tmp_path / "settings.yaml").write_text(bench.our_settings(setting, tmp_path, seed=2))
    config = load_config(tmp_path / "settings.yaml")
    assert not config.evolution.enabled and config.objective.kl_coefficient == 0.0
    assert config.objective.normalization == "token_mean" and config.advantage.estimator == "grpo"
    assert config.optimizer.lr_decay == "constant" and config.optimizer.warmup_steps == 0
    theirs = bench.trl_settings(setting, tmp_path, seed=2)
    assert (theirs["lr"], theirs["temperature"]) == (config.optimizer.lr, config.rollout.temperature)
    assert theirs["group_size"] == config.rollout.group_size
    assert theirs["max_new_tokens"] == config.rollout.max_new_tokens
    assert theirs["problems_per_step"] == config.schedule.problems_per_step == config.schedule.problems_per_update
