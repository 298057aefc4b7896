"""The page as a file: the same answers as the server's, what is left out, and that nothing of a run can become code."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from megatron_p2o.evolve.record.history import Accepted, Ended, Picked, Published, Reflected, RoundHistory
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.testing.run_files import frozen_answers
from megatron_p2o.view import frozen
from megatron_p2o.view.frozen import ASSETS, NUM_LATEST_STEPS, thinned_metrics, write_report
from megatron_p2o.view.runs import ViewedRun
from megatron_p2o.view.server import make_app

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'é %/?#+"
PROBLEMS = (HOSTILE, *(f"problem-{number}" for number in range(19)))
NUM_STEPS = 8


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rollout(problem_id: str) -> dict[str, Any]:
    text = hashlib.sha256(problem_id.encode()).hexdigest()
    return {"problem_id": problem_id, "question": HOSTILE, "response": text, "reward": 0.0, "is_templated": False}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "p2o-seed1"
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {name: p2o-seed1, seed: 1}\noptimizer: {lr: 0.25}\n")
    steps = range(1, NUM_STEPS + 1)
    line = {"epoch": 0, "time": "2026-01-01T00:00:00+00:00", "metrics": {"rollout/reward_mean": 0.25}}
    write_lines(folder / "metrics.jsonl", [{"step": step, **line} for step in steps])
    entry = {"epoch": 0, "step": 1, "plain_tries": 1, "plain_solved": 0, "templated_tries": 0, "templated_solved": 0}
    write_lines(folder / "hard_samples.jsonl", [{**entry, "problem_id": id_} for id_ in PROBLEMS])
    for step in steps:
        write_lines(folder / "rollouts" / f"step-{step:06d}.jsonl", [rollout(id_) for id_ in PROBLEMS])
    with Journal(folder / "evolution" / "journal-0000.jsonl") as journal:
        history = RoundHistory([], journal.append, "fingerprint")
        for proposal in range(3):
            history.add(Picked(proposal=proposal, parent=0, minibatch=(HOSTILE,)))
            history.add(Reflected(proposal=proposal, text=f"{proposal} {HOSTILE}"))
        history.add(Ended(proposal=0, outcome="not better"))
        history.add(Accepted(proposal=2, candidate=1))
        history.add(Ended(proposal=2, outcome="accepted"))
        history.add(Published(version=1, ended_by="budget"))
    return folder


def report_of(*runs: Path) -> Path:
    output = runs[0].parent / "report.html"
    assert write_report(runs, output) == []
    return output


def test_the_file_answers_what_the_server_does(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "grpo-seed1"
    other.mkdir()
    (other / "metrics.jsonl").write_text("")
    answers = frozen_answers(report_of(run, other))
    served = TestClient(make_app([ViewedRun(run), ViewedRun(other)], "t"), base_url="http://127.0.0.1:8123")
    assert {"runs", "report", "settings", "run/0/metrics", "run/1/rounds", "run/0/libraries"} <= answers.keys()
    for address, answer in answers.items():
        latest = f"&steps={','.join(map(str, range(NUM_STEPS - 5, NUM_STEPS + 1)))}" if "/problem?" in address else ""
        of_server = served.get(f"/t/api/{address}{latest}").json()
        if address == "runs":
            answer = [{name: value for name, value in each.items() if name != "left_out"} for each in answer]
        assert answer == of_server, address


def test_every_problem_and_reflection_that_fits_is_in_the_file_and_the_rest_is_told(run: Path) -> None:
    answers = frozen_answers(report_of(run))
    problems = {f"run/0/problem?id={quote(id_, safe='!*' + chr(39) + '()')}" for id_ in PROBLEMS}
    assert {address for address in answers if "/problem?" in address} == problems
    reflections = {f"run/0/reflection?round=0&proposal={proposal}" for proposal in (0, 2)}
    assert {address for address in answers if "/reflection?" in address} == reflections
    (told,) = answers["runs"][0]["left_out"]
    assert told == f"This file holds only: the rollouts of a problem's latest 6 steps. `p2o view {run}` shows all."


def test_what_does_not_fit_is_left_out_and_counted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "MAX_DETAIL_BYTES", 1600)
    answers = frozen_answers(report_of(run))
    num_kept = sum("/problem?" in address for address in answers)
    assert 0 < num_kept < len(PROBLEMS)
    (told,) = answers["runs"][0]["left_out"]
    assert f"rollouts of {num_kept} of {len(PROBLEMS)} problems" in told and "reflections" not in told
    monkeypatch.setattr(frozen, "MAX_DETAIL_BYTES", 0)
    (told,) = frozen_answers(report_of(run))["runs"][0]["left_out"]
    assert "rollouts of 0 of 20 problems; 0 of 2 reflections" in told


def test_curves_of_long_runs_are_thinned_but_for_the_latest_steps_and_rare_numbers() -> None:
    size = 5000
    often = [float(step) for step in range(size)]
    rarely = [float(step) if step % 50 == 0 else None for step in range(size)]
    series = thinned_metrics({"steps": list(range(size)), "series": {"often": often, "rarely": rarely}})["series"]
    assert series["rarely"] == rarely
    kept = [value for value in series["often"] if value is not None]
    assert 900 < len(kept) <= 1000 and kept[-NUM_LATEST_STEPS:] == often[-NUM_LATEST_STEPS:]
    assert all(value is None or value == place for place, value in enumerate(series["often"]))
    gaps = {later - earlier for earlier, later in pairwise(kept)}
    assert max(gaps) <= 6, "evenly chosen"


def test_the_file_loads_nothing_and_runs_only_its_own_scripts(run: Path) -> None:
    page = report_of(run).read_text()
    head = page[: page.index("<body>")]
    assert not re.search(r'<(script|link|img)[^>]*(src|href)="(?!data:)', page)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', head)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert re.findall(r"'sha256-([^']*)'", policy) == digests and len(digests) > 5


def test_text_of_a_run_never_becomes_markup(run: Path) -> None:
    page = report_of(run.rename(run.with_name("p2o<i>&-seed1"))).read_text()
    assert "onerror" not in page and "p2o<i>" not in page


@pytest.mark.parametrize(
    "path", sorted(ASSETS.rglob("*.js")) + sorted(ASSETS.rglob("*.css")), ids=lambda path: path.name
)
def test_own_scripts_and_styles_do_not_end_their_elements_early(path: Path) -> None:
    source = path.read_text().lower()
    assert not {end for end in ("</script", "</style", "<!--", "<script") if end in source}


def test_what_is_not_a_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of config\.yaml, metrics\.jsonl, results\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_report_and_view_start_without_torch() -> None:
    modules = "megatron_p2o.cli, megatron_p2o.report.summary, megatron_p2o.view.frozen, megatron_p2o.view.server"
    told = "sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'megatron', 'sglang'})"
    command = [sys.executable, "-c", f"import sys, {modules}; print({told})"]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout == "[]\n"
