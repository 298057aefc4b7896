"""The server: what it answers, to whom, and that it only ever reads."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from megatron_p2o.evolve.record.history import Picked, Reflected, RoundHistory, Scored, template_digest
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.view import panels
from megatron_p2o.view.runs import ViewedRun
from megatron_p2o.view.server import make_app, serve_runs

TOKEN = "secret"
ALL_PANELS = (*panels.OF_ALL, *(f"run/0/{name}" for name in panels.OF_RUN))
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[2J"


def add_step(run: Path, step: int, **metrics: float | None) -> None:
    line = {"step": step, "epoch": 0, "time": "2026-01-01T00:00:00+00:00", "metrics": metrics}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "p2o-seed1"
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: p2o-seed1, seed: 1}\noptimizer: {lr: 0.25}\n")
    add_step(folder, 1, **{"rollout/reward_mean": 0.25, "perf/step_s": 2.0, "train/loss": None})
    add_step(folder, 1, **{"eval/held_out/avg": 0.5})
    entry = {"epoch": 0, "step": 1, "problem_id": HOSTILE, "plain_tries": 4, "plain_solved": 1}
    entry |= {"templated_tries": 2, "templated_solved": 2}
    (folder / "hard_samples.jsonl").write_text(json.dumps(entry) + "\n")
    line = {"problem_id": HOSTILE, "question": HOSTILE, "response": HOSTILE, "level": "hard", "reward": float("nan")}
    (folder / "rollouts" / "step-000001.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "warnings.jsonl").write_text('{"time": "now", "level": "WARNING", "logger": "x", "message": "careful"}\n')
    return folder


def client(*runs: Path) -> TestClient:
    app = make_app([ViewedRun(run) for run in runs], TOKEN)
    return TestClient(app, base_url="http://127.0.0.1:8123")


def answer(of: TestClient, path: str) -> Any:
    response = of.get(f"/{TOKEN}/api/{path}")
    assert response.status_code == 200, response.text
    return response.json()


def test_the_overview_says_how_far_a_run_is(run: Path) -> None:
    (shown,) = answer(client(run), "runs")
    assert (shown["name"], shown["arm"], shown["seed"]) == ("p2o-seed1", "p2o", 1)
    assert (shown["step"], shown["epoch"], shown["step_s"]) == (1, 0, 2.0)
    assert (shown["is_finished"], shown["num_warnings"], shown["damages"]) == (False, 1, [])


def test_the_report_follows_the_runs(run: Path) -> None:
    asked = client(run)

    def results() -> dict[str, str]:
        overview = answer(asked, "report")["overview"]
        return dict(zip(overview["header"][1:], overview["rows"][0]["cells"], strict=True))

    assert (results()["held out"], results()["Train reward"]) == ("50.0 %", "25.0 %")
    add_step(run, 2, **{"rollout/reward_mean": 0.75})
    assert results()["Train reward"] == "75.0 %"
    (run / "results.json").write_text('{"arm": "p2o", "seed": 1, "wall_s": 61}')
    assert (results()["State"], results()["Wall time"]) == ("finished", "1 min 01 s")
    assert results()["Templates published"] == ""
    (run / "templates").mkdir()
    template = {"id": 1, "text": "Count.", "parent": 0, "score": 0.5, "weight_version": 0, "lineage_problem_ids": []}
    (run / "templates" / "library-1.json").write_text(json.dumps({"version": 1, "templates": [template]}))
    assert results()["Templates published"] == "1"
    (library,) = answer(asked, "run/0/libraries")
    assert [node["text"] for node in library["roots"]] == [[{"kind": "kept", "text": "Count."}]]


def test_the_report_is_not_made_again_while_the_files_stay_as_they_are(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = client(run)
    first = answer(asked, "report")
    monkeypatch.setattr(ViewedRun, "reported", lambda run: pytest.fail("made again"))
    assert answer(asked, "report") == first


def test_metrics_are_columns_that_grow_with_the_run(run: Path) -> None:
    asked = client(run)
    first = answer(asked, "run/0/metrics")
    assert first["steps"] == [1] and first["series"]["eval/held_out/avg"] == [0.5] and first["num_not_finite"] == 1
    add_step(run, 2, **{"rollout/reward_mean": 0.75})
    second = answer(asked, "run/0/metrics")
    assert second["steps"] == [1, 2]
    assert second["series"]["rollout/reward_mean"] == [0.25, 0.75]
    assert second["series"]["perf/step_s"] == [2.0, None]


def test_what_the_page_has_is_not_sent_again(run: Path) -> None:
    asked = client(run)
    first = asked.get(f"/{TOKEN}/api/run/0/metrics")
    again = asked.get(f"/{TOKEN}/api/run/0/metrics", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    add_step(run, 2, **{"rollout/reward_mean": 0.75})
    changed = asked.get(f"/{TOKEN}/api/run/0/metrics", headers={"If-None-Match": first.headers["ETag"]})
    assert changed.status_code == 200


def test_the_problems_are_the_ledger(run: Path) -> None:
    (problem,) = answer(client(run), "run/0/problems")["problems"]
    assert problem["tries"] == [[1, 0, 1, 4, 2, 2]]
    assert (problem["level"], problem["is_internalised"]) == ("hard", False)


def test_a_problem_has_its_rollouts_and_nan_is_null(run: Path) -> None:
    asked = client(run)
    unknown = asked.get(f"/{TOKEN}/api/run/0/problem", params={"id": "unknown"}).json()
    assert unknown == {"id": "unknown", "steps": [], "rollouts": []}
    shown = asked.get(f"/{TOKEN}/api/run/0/problem", params={"id": HOSTILE}).json()
    assert shown["rollouts"] == [
        {
            "step": 1,
            "problem_id": HOSTILE,
            "question": HOSTILE,
            "response": HOSTILE,
            "level": "hard",
            "reward": None,
        }
    ]


def test_the_rollouts_of_the_latest_step_are_sent_or_of_those_that_are_asked_for(run: Path) -> None:
    for step in (2, 4):
        line = {"problem_id": "a", "question": "", "response": f"of step {step}", "reward": 0.0}
        (run / "rollouts" / f"step-{step:06d}.jsonl").write_text(json.dumps(line) + "\n")
    asked = client(run)

    def responses(query: str) -> list[str]:
        shown = answer(asked, f"run/0/problem?id=a{query}")
        assert shown["steps"] == [2, 4]
        return [line["response"] for line in shown["rollouts"]]

    assert responses("") == responses("&steps=") == ["of step 4"]
    assert responses("&steps=2,3,4") == ["of step 2", "of step 4"]
    assert asked.get(f"/{TOKEN}/api/run/0/problem?id=a&steps=x").status_code == 404


def test_half_a_surrogate_is_shown_as_a_question_mark(run: Path) -> None:
    line = {"problem_id": "a", "question": "\udc80", "response": "", "reward": 0.0}
    (run / "rollouts" / "step-000002.jsonl").write_text(json.dumps(line) + "\n")
    shown = client(run).get(f"/{TOKEN}/api/run/0/problem", params={"id": "a"}).json()
    assert shown["rollouts"][0]["question"] == "?"


def test_the_engines_and_what_reflection_saw_are_shown(run: Path) -> None:
    add_step(run, 1, **{"engine/restarts_count": 2.0, "memory/engine_0_host_bytes": 5.0})
    (run / "engines").mkdir()
    batch = "Decode batch, #running-req: 7, token usage: 0.50, gen throughput (token/s): 9.5, #queue-req: 2"
    (run / "engines" / "engine-0.log").write_text(f"[2026-01-01 00:00:00] {batch}\n")
    trial = Trial(reward=0.5, response_text=HOSTILE, finish_reason="stop", num_tokens=3, weight_version=1)
    with Journal(run / "evolution" / "journal-0001-code.jsonl") as journal:
        history = RoundHistory([], journal.append, "fingerprint")
        history.add(Picked(proposal=4, parent=0, minibatch=(HOSTILE,)))
        history.add(Scored(template=template_digest(""), problem_id=HOSTILE, occasion="", trial=trial))
        reply: dict[str, Any] = {"refusal": "duplicate", "prompt_tokens": 9, "completion_tokens": 2}
        history.add(Reflected(proposal=4, text="Count.", **reply, prompt=HOSTILE, reply="Well."))
    asked = client(run)
    shown = answer(asked, "run/0/engines")
    assert (shown["version"], shown["restarts"]) == (1, 2.0)
    assert shown["engines"] == [
        {
            "name": "engine-0",
            "time": "2026-01-01 00:00:00",
            **{"running": 7, "waiting": 2, "kv_share": 0.5, "tokens_per_s": 9.5, "host_bytes": 5.0},
        }
    ]
    reflection = answer(asked, "run/0/reflection?round=1 code&proposal=4")
    assert (reflection["parent"], reflection["parent_text"], reflection["text"]) == (0, "", "Count.")
    assert (reflection["refusal"], reflection["prompt_tokens"]) == ("duplicate", 9)
    assert (reflection["prompt"], reflection["reply"], reflection["backend"]) == (HOSTILE, "Well.", None)
    (example,) = reflection["examples"]
    assert (example["problem_id"], example["question"], example["response"]) == (HOSTILE,) * 3
    assert (example["reward"], example["finish_reason"], example["feedback"]) == (0.5, "stop", "")
    assert answer(asked, "run/0/reflection?round=1 code&proposal=5") is None
    assert asked.get(f"/{TOKEN}/api/run/0/reflection?round=1&proposal=x").status_code == 404


def test_a_round_tells_its_budget_its_lineages_and_its_price(run: Path) -> None:
    (run / "config.yaml").write_text("evolution: {num_lineages: 4}\n")
    (run / "metrics.jsonl").unlink()

    def add(second: int, step: int, epoch: int, **metrics: float) -> None:
        line = {"step": step, "epoch": epoch, "time": f"2026-01-01T00:00:{second:02d}+00:00", "metrics": metrics}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    with Journal(run / "evolution" / "journal-0000.jsonl") as journal:
        history = RoundHistory([], journal.append, "fingerprint", max_rollouts=160)
        history.add(Picked(proposal=0, parent=0, minibatch=("a",)))
        trial = Trial(reward=0.0, response_text="", finish_reason="stop", num_tokens=3, weight_version=1)
        history.add(Scored(template=template_digest(""), problem_id="b", occasion="", trial=trial))
    add(10, 1, 0, **{"perf/step_s": 4.0, "engine/evolution_price": 0.9})
    add(11, 1, 1, **{"hard/set_size": 3.0, "perf/evolution_s": 0.001})
    add(20, 2, 1, **{"perf/step_s": 8.0, "engine/evolution_slowdown": 0.25})
    asked = client(run)
    (shown,) = answer(asked, "run/0/rounds")
    assert (shown["num_rollouts"], shown["max_rollouts"], shown["num_lineages"]) == (1, 160, 4)
    assert shown["lineages"] == [{"proposal": 0, "parent": 0, "stage": "the parent is tried", "candidate": None}]
    assert shown["price"] == {"waited_s": None, "steps": [2], "prices": [None], "slowdowns": [0.25]}
    add(30, 3, 1, **{"perf/step_s": 8.0, "engine/evolution_price": 0.5, "library/version": 1.0})
    add(30, 3, 1, **{"library/version": 1.0, "evolution/round_s": 12.0})
    add(40, 4, 1, **{"perf/step_s": 8.0, "engine/evolution_price": 0.7})
    (shown,) = answer(asked, "run/0/rounds")
    assert shown["price"] == {"waited_s": None, "steps": [2, 3], "prices": [None, 0.5], "slowdowns": [0.25, None]}
    (time,) = answer(asked, "run/0/timeline")["rounds"]
    assert time["end_s"] - time["begin_s"] == pytest.approx(12.0)


def test_settings_and_warnings_are_shown(run: Path) -> None:
    asked = client(run)
    rows = {row["name"]: row["values"] for row in answer(asked, "settings")["rows"]}
    assert rows["optimizer.lr"] == ["0.25"]
    assert answer(asked, "run/0/warnings") == [{"time": "now", "level": "WARNING", "logger": "x", "message": "careful"}]


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/secre/", "/other/api/runs", f"/{TOKEN}/api/run/7/metrics", f"/{TOKEN}/api/run/0/everything"),
        *(f"/{TOKEN}/api/everything", f"/{TOKEN}/assets/../server.py", f"/{TOKEN}/assets/%2e%2e/server.py"),
        *(f"/{TOKEN}/assets/vendor", f"/{TOKEN}/assets//etc/passwd"),
    ],
)
def test_nothing_else_is_given_out(run: Path, path: str) -> None:
    assert client(run).get(path).status_code == 404


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8123", "127.0.0.1.evil.example:8123", ""])
def test_a_foreign_name_that_points_here_gets_nothing(run: Path, host: str) -> None:
    for path in ("", "api/runs", "assets/view.js"):
        assert client(run).get(f"/{TOKEN}/{path}", headers={"Host": host}).status_code == 404


@pytest.mark.parametrize("host", ["localhost:9", "127.0.0.1", "[::1]:9", "[::1]"])
def test_a_tunnel_may_use_another_port(run: Path, host: str) -> None:
    response = client(run).get(f"/{TOKEN}/", headers={"Host": host})
    assert response.status_code == 200 and "<title>p2o view</title>" in response.text


def test_only_own_scripts_may_run(run: Path) -> None:
    policy = client(run).get(f"/{TOKEN}/").headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy and "unsafe-eval" not in policy


def test_nothing_is_written_into_the_run(run: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    asked = client(run)
    for panel in ALL_PANELS:
        answer(asked, panel)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before


def test_a_run_that_disappears_is_said_and_what_was_read_stays_answered(run: Path) -> None:
    asked = client(run)
    answer(asked, "run/0/metrics")
    run.rename(run.with_name("moved"))
    (shown,) = answer(asked, "runs")
    assert shown["damages"] == [f"{run} is gone"]
    for panel in ALL_PANELS:
        answer(asked, panel)


def test_damaged_files_are_named(run: Path) -> None:
    (run / "config.yaml").write_text("a: [")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n[]\n{"step": 2, "ep')
    asked = client(run)
    answer(asked, "run/0/metrics")
    (shown,) = answer(asked, "runs")
    assert [sentence.rpartition("/")[2][:28] for sentence in shown["damages"][:-1]] == ["config.yaml cannot be read ("]
    assert shown["damages"][-1] == "2 damaged lines of metrics, ledger or warnings are left out"
    assert answer(asked, "run/0/metrics")["steps"] == [1]


@pytest.mark.parametrize(
    "line", ['{"epoch": "x"}', '{"outcomes": [1]}', "[]", '{"epoch": 1', '{"outcomes": {"a": "b"}}']
)
def test_a_damaged_record_of_a_round_costs_its_own_row(run: Path, line: str) -> None:
    (run / "evolution").mkdir()
    (run / "evolution" / "rounds.jsonl").write_text(f'{line}\n{{"epoch": 3, "ended_by": "budget"}}\n')
    (row,) = answer(client(run), "report")["rounds"]["rows"]
    assert row[1:3] == ["3", "its budget was spent"]


@pytest.mark.parametrize("damage", [{"is_templated": "x"}, {"reward": [], "response": None}, {"level": 3}])
def test_a_damaged_rollout_costs_no_more_than_its_example(run: Path, damage: dict[str, Any]) -> None:
    path = run / "rollouts" / "step-000001.jsonl"
    path.write_text(json.dumps({"problem_id": HOSTILE, "is_templated": True, "is_solved": True, **damage}) + "\n")
    assert answer(client(run), "report")["overview"]["rows"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name the directory of a run"):
        serve_runs([tmp_path], 0)


def test_a_port_in_use_is_refused(run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match="choose another with --port"):
            serve_runs([run], taken.getsockname()[1])
