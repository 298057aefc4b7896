"""Measures `p2o view` on a large run in headless Chromium: time to the first chart, and to open a problem.

    python tools/bench_view.py [--rollouts 50000] [--characters 2000] [--tokens 512] [--json FILE]

Prints one JSON object. Times are medians of `--repeats`, each with a server of its own that has read nothing yet. A
problem is opened by a click within the page; its time ends when the frame with its rollouts has been painted, that of
`tokens` when the responses in sight are coloured. `driven` is the same with a mouse that Playwright moves: it waits for
frames before it clicks, and asks over a socket whether the rollouts are there, for which a person does not wait. Needs
playwright and Chromium (tools/install_browser.sh).
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

GROUP_SIZE = 8
PROBLEMS_PER_STEP = 128
PROBLEMS = 2000
METRICS = 80
OPENED = 9
"""Problems that are opened one after another."""

OPEN = """async (number) => {
  const dialog = document.querySelector("dialog");
  const shown = new Promise((resolve) => {
    new MutationObserver(() => { if (dialog.open) resolve(); }).observe(dialog, { attributes: true });
  });
  const begun = performance.now();
  document.querySelectorAll("tbody th button")[number].click();
  await shown;
  const isThere = performance.now();
  const frame = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
  await frame();
  const end = performance.now();
  while (dialog.querySelector("summary") && !dialog.querySelector(".tokens")) await frame();
  const tokens = performance.now();
  const asked = performance.getEntriesByType("resource").filter((entry) => entry.name.includes("/problem?")).at(-1);
  if (!dialog.querySelector("article")) throw new Error("the problem has no rollouts");
  const answer = asked.responseEnd - asked.startTime;
  return { painted: end - begun, tokens: tokens - begun, answer, layout_and_paint: end - isThere };
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=50_000)
    parser.add_argument("--characters", type=int, default=2000, help="length of a response")
    parser.add_argument("--tokens", type=int, default=512, help="of them with numbers, in templated rollouts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    sizes = {"rollouts": options.rollouts, "characters": options.characters, "tokens": options.tokens}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write_run(run, **sizes)
        times = measured(run, options.repeats)
    machine = {"cpus": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    content = json.dumps({**sizes, "repeats": options.repeats, **machine, **times}, indent=1) + "\n"
    print(content, end="")
    if options.json:
        options.json.write_text(content)


def write_run(run: Path, rollouts: int, characters: int, tokens: int) -> None:
    """Write a run folder with that many rollouts, half of them templated."""
    (run / "rollouts").mkdir(parents=True)
    (run / "config.yaml").write_text("run: {name: run, seed: 1}\n")
    num_steps = math.ceil(rollouts / (GROUP_SIZE * PROBLEMS_PER_STEP))
    lines = [rollout(number % 2 == 1, characters, tokens) for number in range(GROUP_SIZE)]
    with (run / "metrics.jsonl").open("w") as metrics, (run / "hard_samples.jsonl").open("w") as ledger:
        for step in range(1, num_steps + 1):
            asked = [(step - 1) * PROBLEMS_PER_STEP + place for place in range(PROBLEMS_PER_STEP)]
            numbers = {f"area{key % 8}/metric_{key}": (step * (key + 1)) % 17 / 16 for key in range(METRICS)}
            numbers |= {"rollout/reward_mean": step / num_steps, "perf/step_s": 60.0, "perf/rollout_s": 40.0}
            told = {
                "step": step,
                "epoch": asked[0] // PROBLEMS,
                "time": f"2026-01-01T{step // 60:02d}:{step % 60:02d}:00+00:00",
            }
            metrics.write(json.dumps({**told, "metrics": numbers}) + "\n")
            with (run / "rollouts" / f"step-{step:06d}.jsonl").open("w") as file:
                for number in asked:
                    id_ = f"problem-{number % PROBLEMS}"
                    counts = {
                        "plain_tries": 4,
                        "plain_solved": step % 5,
                        "templated_tries": 4,
                        "templated_solved": number % 5,
                    }
                    entry = {"epoch": number // PROBLEMS, "step": step, "problem_id": id_, **counts}
                    ledger.write(json.dumps(entry) + "\n")
                    file.writelines(line.replace("PROBLEM", id_) for line in lines)


def rollout(is_templated: bool, characters: int, tokens: int) -> str:
    """Return the line of a rollout of the problem PROBLEM."""
    line: dict[str, Any] = dict.fromkeys(("problem_id", "task", "source", "reason", "feedback"), "")
    line |= {"problem_id": "PROBLEM", "level": "hard", "question": "How many?", "answer": "1", "reward": 0.0}
    line |= {"is_templated": is_templated, "template": "Count." if is_templated else "", "is_solved": False}
    line |= {"advantage": 0.5, "response": "a word " * (characters // 7), "num_response_tokens": tokens}
    line |= {"finish_reason": "stop", "weight_versions": [1]}
    if is_templated and tokens:
        places = range(min(tokens, 1024))
        columns = {
            "sampling_logprobs": [-(place % 40) / 16 for place in places],
            "kept": [place % 9 and 1 for place in places],
        }
        shifts = [(place % 13 - 5) / 4 for place in places]
        line["tokens"] = {"lengths": [max(1, characters // tokens)] * len(places), "shifts": shifts, **columns}
    return json.dumps(line) + "\n"


def measured(run: Path, repeats: int) -> dict[str, Any]:
    """Return the median milliseconds of each, and what they were measured with."""
    found: dict[str, list[float]] = {}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        versions = {"chromium": browser.version, "python": platform.python_version()}
        for _ in range(repeats):
            for name, values in {**first_charts(browser, run), **opened_problems(browser, run)}.items():
                found.setdefault(name, []).extend(values)
        browser.close()
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    return {
        "versions": versions,
        "ms": medians,
        "worst_ms": {name: round(max(values), 1) for name, values in found.items()},
    }


@contextmanager
def served(browser: Browser, run: Path) -> Iterator[tuple[Page, str]]:
    """Yield an empty page and the address of a server that has just started."""
    command = [sys.executable, "-m", "megatron_p2o.cli", "view", str(run)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    page = browser.new_page()
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+/", server.stdout.readline())
        assert address is not None
        yield page, address[0]
    finally:
        page.close()
        server.terminate()
        server.wait()


def first_charts(browser: Browser, run: Path) -> dict[str, list[float]]:
    """Return the milliseconds to the first chart of the first view, and of that of the curves."""
    found: dict[str, list[float]] = {}
    for view in ("overview", "curves"):
        with served(browser, run) as (page, address):
            begun = time.perf_counter()
            page.goto(f"{address}#{view}/0")
            page.wait_for_selector("canvas")
            found[f"first_chart_{view}"] = [1e3 * (time.perf_counter() - begun)]
    return found


def opened_problems(browser: Browser, run: Path) -> dict[str, list[float]]:
    """Return the milliseconds to the heat map, and from it to some problems."""
    with served(browser, run) as (page, address):
        begun = time.perf_counter()
        page.goto(f"{address}#problems/0")
        page.wait_for_selector(".cell")
        found = {"heat_map": [1e3 * (time.perf_counter() - begun)]}
        for number in range(OPENED):
            for name, value in page.evaluate(OPEN, number).items():
                found.setdefault(f"open_problem_{name}", []).append(value)
            page.keyboard.press("Escape")
        for number in range(OPENED):
            start = time.perf_counter()
            page.click(f"tbody th button >> nth={number}")
            page.wait_for_selector("dialog[open] article")
            found.setdefault("open_problem_driven", []).append(1e3 * (time.perf_counter() - start))
            page.keyboard.press("Escape")
    return found


if __name__ == "__main__":
    main()
