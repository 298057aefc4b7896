"""Measures `p2o view` on a large run in headless Chromium: time to the first chart, and to open a problem.

    python tools/bench_view.py [--rollouts 50000] [--characters 2000]

Prints one JSON object with medians of `--repeats`. Needs playwright and Chromium (tools/install_browser.sh).
"""

import argparse
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

GROUP_SIZE = 8
PROBLEMS_PER_STEP = 128
METRICS = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=50_000)
    parser.add_argument("--characters", type=int, default=2000, help="length of a response")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, options.rollouts, options.characters)
        print(
            json.dumps(
                {"rollouts": options.rollouts, "characters": options.characters, **measured(run, options.repeats)}
            )
        )


def write_run(run: Path, num_rollouts: int, num_characters: int) -> None:
    """Write a run folder with that many rollouts."""
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: run, seed: 1}\n")
    num_steps = math.ceil(num_rollouts / (GROUP_SIZE * PROBLEMS_PER_STEP))
    with (run / "metrics.jsonl").open("w") as metrics, (run / "hard_samples.jsonl").open("w") as ledger:
        for step in range(1, num_steps + 1):
            numbers = {f"area{key % 8}/metric_{key}": (step * (key + 1)) % 17 / 16 for key in range(METRICS)}
            metrics.write(
                json.dumps({"step": step, "epoch": 0, "time": "2026-01-01T00:00:00", "metrics": numbers}) + "\n"
            )
            lines: list[str] = []
            for place in range(PROBLEMS_PER_STEP):
                problem_id = f"problem-{(step * PROBLEMS_PER_STEP + place) % 2000}"
                counts = {
                    "plain_tries": 4,
                    "plain_solved": step % 5,
                    "templated_tries": 4,
                    "templated_solved": place % 5,
                }
                ledger.write(json.dumps({"epoch": 0, "step": step, "problem_id": problem_id, **counts}) + "\n")
                lines += [rollout(problem_id, number, num_characters) for number in range(GROUP_SIZE)]
            (run / "rollouts" / f"step-{step:06d}.jsonl").write_text("".join(lines))


def rollout(problem_id: str, number: int, num_characters: int) -> str:
    line: dict[str, Any] = {
        "problem_id": problem_id,
        "task": "",
        "source": "",
        "level": "hard",
        "question": "How many?",
    }
    line |= {"answer": "1", "template": "", "is_templated": number % 2 == 1, "is_solved": False, "reward": 0.0}
    line |= {"reason": "", "feedback": "", "advantage": 0.5, "response": "a word " * (num_characters // 7)}
    return json.dumps({**line, "num_response_tokens": 500, "finish_reason": "stop", "weight_versions": [1]}) + "\n"


def measured(run: Path, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of each, the server started anew each time."""
    found: dict[str, list[float]] = {}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for _ in range(repeats):
            for name, value in measured_once(browser, run).items():
                found.setdefault(name, []).append(value)
        browser.close()
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def measured_once(browser: Browser, run: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "megatron_p2o.cli", "view", str(run)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    page = browser.new_page()
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+/", server.stdout.readline())
        assert address is not None
        begun = time.perf_counter()
        page.goto(f"{address[0]}#curves/0")
        page.wait_for_selector("canvas")
        first_chart = time.perf_counter()
        page.goto(f"{address[0]}#problems/0")
        page.wait_for_selector(".cell")
        heat_map = time.perf_counter()
        opened: list[float] = []
        for number in range(5):
            start = time.perf_counter()
            page.click(f"tbody th button >> nth={number}")
            page.wait_for_selector("dialog[open] article")
            opened.append(time.perf_counter() - start)
            page.keyboard.press("Escape")
        return {
            "first_chart_ms": 1e3 * (first_chart - begun),
            "heat_map_ms": 1e3 * (heat_map - first_chart),
            "open_problem_ms": 1e3 * statistics.median(opened),
        }
    finally:
        page.close()
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
