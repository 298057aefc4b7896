"""The report of runs that are whole, partial, in progress or hostile."""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_p2o.config.tree import LoggingConfig
from megatron_p2o.evolve.process.conduct import journal_path
from megatron_p2o.evolve.record.history import Accepted, Opened, Picked, Published, Reflected, Scored, event_to_json
from megatron_p2o.evolve.record.journal import Journal
from megatron_p2o.evolve.record.library import PublishedLibrary
from megatron_p2o.evolve.reflection.reflection import shorten
from megatron_p2o.evolve.search.publish import RoundStats, keep_round
from megatron_p2o.evolve.trial import Trial
from megatron_p2o.metrics.log import open_metrics_log
from megatron_p2o.metrics.rollouts import RolloutWriter
from megatron_p2o.metrics.step import step_metrics
from megatron_p2o.report.examples import MAX_SHOWN_CHARACTERS, find_examples, spread
from megatron_p2o.report.figures import by_epoch, over_compute, over_rollouts
from megatron_p2o.report.page import ASSETS, write_report
from megatron_p2o.report.runs import read_run
from megatron_p2o.report.spending import compute_table
from megatron_p2o.report.templates import WordSpan, word_changes
from megatron_p2o.rl.hard_samples import ledger_entry
from megatron_p2o.terminal import duration_text
from megatron_p2o.testing.fakes import FakeRenderer, fake_token_ids
from megatron_p2o.types import PLAIN, Completion, Grade, Group, Problem, Prompt, Rollout, Template

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'


def metric_line(step: int, epoch: int, **metrics: float | None) -> dict[str, Any]:
    named = {key.replace("__", "/"): number for key, number in metrics.items()}
    return {"step": step, "epoch": epoch, "time": f"2026-01-31T12:{step:02d}:00.000+00:00", "metrics": named}


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def rollout_line(problem_id: str, *, correct: bool, template: str = "", response: str = "answer") -> dict[str, Any]:
    return {
        "problem_id": problem_id,
        "level": "hard",
        "question": f"Question {problem_id}?",
        "answer": "42",
        "template_id": 3 if template else 0,
        "template": template,
        "is_templated": bool(template),
        "is_solved": correct,
        "reward": float(correct),
        "response": response,
        "num_response_tokens": 7,
    }


def ledger_line(step: int, epoch: int, problem_id: str, plain: tuple[int, int], templated: tuple[int, int]) -> dict:
    return {
        "epoch": epoch,
        "step": step,
        "problem_id": problem_id,
        "plain_solved": plain[0],
        "plain_tries": plain[1],
        "templated_solved": templated[0],
        "templated_tries": templated[1],
    }


def template(id: int, text: str, parent: int | None, score: float) -> dict[str, Any]:
    return {
        "id": id,
        "text": text,
        "parent": parent,
        "lineage_problem_ids": ["h9"],
        "score": score,
        "weight_version": 4,
    }


def new_run(root: Path, name: str) -> Path:
    (root / name).mkdir()
    (root / name / "config.yaml").write_text(f"run: {{name: {name}, directory: runs, seed: 1}}\n")
    return root / name


def grpo_run(root: Path) -> Path:
    directory = new_run(root, "grpo_n6-seed1")
    write_lines(
        directory / "metrics.jsonl",
        [
            metric_line(0, 0, eval__heldout_hard__avg=0.0),
            metric_line(1, 0, rollout__reward_mean=0.25, rollout__rollouts_count=12, perf__step_s=2.0),
            metric_line(2, 0, rollout__reward_mean=0.5, rollout__rollouts_count=12, perf__step_s=3.0),
            metric_line(2, 1, hard__set_size=7),
            metric_line(2, 1, eval__heldout_hard__avg=0.125),
        ],
    )
    return directory


def p2o_run(root: Path, text: str = "Work step by step.") -> Path:
    directory = new_run(root, "p2o_n6-seed1")
    evolution = {"evolution/num_rollouts": 100, "evolution/best_score": 0.5, "evolution/coverage": 0.75}
    write_lines(
        directory / "metrics.jsonl",
        [
            metric_line(1, 0, rollout__reward_mean=0.25, rollout__rollouts_count=12, train__loss=None),
            {**metric_line(1, 1), "metrics": {"hard/set_size": 2, **evolution}},
            metric_line(2, 1, rollout__reward_mean=0.5, rollout__rollouts_count=12, perf__train_s=61.0),
            metric_line(3, 2, rollout__reward_mean=0.9, rollout__rollouts_count=12, eval__heldout_hard__avg=0.875),
        ],
    )
    write_lines(
        directory / "hard_samples.jsonl",
        [
            ledger_line(1, 0, "h1", (0, 6), (0, 0)),
            ledger_line(1, 0, "h2", (0, 6), (0, 0)),
            ledger_line(2, 1, "h1", (0, 2), (3, 4)),
            ledger_line(2, 1, "h2", (0, 2), (0, 4)),
            ledger_line(3, 2, "h1", (2, 2), (4, 4)),
        ],
    )
    write_lines(directory / "rollouts" / "step-000001.jsonl", [rollout_line("h1", correct=False, response="a guess")])
    write_lines(
        directory / "rollouts" / "step-000002.jsonl",
        [
            rollout_line("h1", correct=False, response="plainly wrong"),
            rollout_line("h1", correct=False, template=text, response="wrong all the same"),
            rollout_line("h1", correct=True, template=text, response="right with it"),
        ],
    )
    write_lines(
        directory / "rollouts" / "step-000003.jsonl", [rollout_line("h1", correct=True, response="right alone")]
    )
    library = {
        "version": 1,
        "templates": [template(0, "", None, 0.0), template(3, text, 0, 0.5), template(5, text + " Slowly.", 3, 0.75)],
        "assignments": {"h1": [0, 0, 3, 3, 5, 5], "h2": [0, 0, 3, 3, 3, 3]},
    }
    (directory / "templates").mkdir()
    (directory / "templates" / "library-1.json").write_text(json.dumps(library))
    return directory


class Page(HTMLParser):
    """Checks that elements nest, and collects them with their text."""

    VOID = frozenset({"meta", "path", "line"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.source = page
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.visible: list[str] = []
        self.inert: list[Any] = []
        """Values of the blocks of JSON."""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.visible.append(data)
        elif self.open and self.elements[-1] == ("script", {"type": "application/json"}):
            self.inert.append(json.loads(data))

    @property
    def text(self) -> str:
        return " ".join(self.visible)


def report_of(tmp_path: Path, *runs: Path) -> Page:
    write_report(runs, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text())


def test_arms_stand_side_by_side_with_their_latest_numbers(tmp_path: Path) -> None:
    page = report_of(tmp_path, grpo_run(tmp_path), p2o_run(tmp_path))
    assert "P2O: grpo_n6, p2o_n6" in page.text
    for text in ("12.5 %", "87.5 %", "Training reward", "Intractable problems", "Internalised", "Time", "61"):
        assert text in page.text


def test_a_run_without_templates_has_no_empty_sections_for_them(tmp_path: Path) -> None:
    page = report_of(tmp_path, grpo_run(tmp_path))
    for heading in ("Templates", "Examples", "Hard-sample ledger"):
        assert f" {heading} " not in page.text.replace(
            "Rollouts: training evolution Templates published Wall time State", ""
        )


def test_the_page_loads_nothing_and_runs_only_its_own_script(tmp_path: Path) -> None:
    page = report_of(tmp_path, grpo_run(tmp_path), p2o_run(tmp_path))
    assert not any({"src", "href", "action"} & attributes.keys() for _, attributes in page.elements)
    scripts = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert scripts.count(None) == 1 and set(scripts) == {None, "application/json"}
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy


def test_text_of_a_run_never_becomes_markup(tmp_path: Path) -> None:
    run = p2o_run(tmp_path, text=HOSTILE)
    path = run / "rollouts" / "step-000002.jsonl"
    hostile = [rollout_line("h1", correct=True, template=HOSTILE, response=HOSTILE), rollout_line("h1", correct=False)]
    write_lines(path, [{**line, "question": HOSTILE, "answer": HOSTILE, "level": HOSTILE} for line in hostile])
    write_lines(
        run / "metrics.jsonl",
        [{**metric_line(1, 0), "metrics": {f"eval/{HOSTILE}/avg": 0.5, "rollout/reward_mean": 1.0}}],
    )
    page = report_of(tmp_path, run.rename(tmp_path / "p2o<i>-seed1"))
    assert not {"img", "i"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert sum(tag == "script" and "type" not in attributes for tag, attributes in page.elements) == 1
    assert page.text.count("<img src=x onerror=alert(1)>") >= 4


def test_a_name_cannot_end_the_block_of_json_it_stands_in(tmp_path: Path) -> None:
    name = "<!--<script><img>&'\""  # a folder's name; in a script element it hides the element's end from browsers
    page = report_of(tmp_path, grpo_run(tmp_path).rename(tmp_path / name))
    assert {line["name"] for chart in page.inert for line in chart["lines"]} == {name}
    blocks = re.findall(r'application/json">(.*?)</script>', page.source)
    assert len(blocks) == len(page.inert) > 0
    assert not any("<" in block for block in blocks)


def test_own_script_and_style_do_not_end_their_elements_early() -> None:
    assert "</script" not in (ASSETS / "report.js").read_text().lower()
    assert "</style" not in (ASSETS / "report.css").read_text().lower()


def test_the_policy_lets_the_script_run_that_the_page_holds(tmp_path: Path) -> None:
    page = report_of(tmp_path, grpo_run(tmp_path))
    (script,) = re.findall(r"<script>(.*?)</script>", page.source, flags=re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in page.source


def test_a_table_names_its_columns_and_rows(tmp_path: Path) -> None:
    run = grpo_run(tmp_path).rename(tmp_path / "a<b")
    page = report_of(tmp_path, run)
    assert '<th scope="col">Train reward</th>' in page.source
    assert '<tr><th scope="row">a&lt;b</th><td>0</td>' in page.source
    assert 'aria-label="What failed, over the whole run"' in page.source


def test_a_chart_without_points_says_so(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    page = report_of(tmp_path, tmp_path / "new")
    assert "Nothing was recorded." in page.text and page.inert == []


def test_templates_are_shown_below_the_one_they_were_reflected_from(tmp_path: Path) -> None:
    page = report_of(tmp_path, p2o_run(tmp_path))
    assert page.text.index("Template 0") < page.text.index("Template 3") < page.text.index("Template 5")
    assert "score 75.0 % at weight version 4 · assigned to 1 problem · has seen 1 problem" in page.text
    assert [tag for tag, _ in page.elements].count("ins") == 1


def test_a_template_says_what_it_still_adds_in_the_steps_of_its_own_library(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    lines = [
        metric_line(step, 1, **{"template/library_version": version, "template/3/shift_per_token": shift})
        for step, version, shift in ((4, 1, 0.5), (5, 1, 0.25), (6, 1, 0.125), (7, 2, 9.0))
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    page = report_of(tmp_path, run)
    assert "added 0.5 nats per token to responses in step 4, 0.125 in step 6" in page.text
    assert page.text.count("nats per token to responses in step") == 1


def test_a_template_whose_parent_is_unknown_is_a_root_that_says_so(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    library = {"version": 2, "templates": [template(9, "Check twice.", 8, 0.5)], "assignments": {}}
    (run / "templates" / "library-2.json").write_text(json.dumps(library))
    page = report_of(tmp_path, run)
    assert "reflected from template 8, with which the round began" in page.text
    assert page.text.index("Library version 2") < page.text.index("Library version 1")


def test_library_and_journal_of_evolution_give_the_lineage_with_its_unpublished_ancestors(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    winner = Template(id=4, text="Count twice, slowly.", parent=2, lineage_problem_ids=frozenset("abc"), score=0.75)
    library = PublishedLibrary(version=1, templates=(winner,), assignments={"h1": (winner, winner, PLAIN)})
    library.save(run)
    with Journal(journal_path(run, 0)) as journal:
        for event in (
            Opened(fingerprint="f"),
            Picked(proposal=0, parent=0, minibatch=("a", "b", "c")),
            Reflected(proposal=0, text="Count."),
            Accepted(proposal=0, candidate=1),
            Picked(proposal=1, parent=1, minibatch=("a",)),
            Reflected(proposal=1, text="Count twice."),
            Scored(
                template="d",
                problem_id="a",
                occasion="",
                trial=Trial(reward=1.0, response_text="r", finish_reason="stop", num_tokens=1, weight_version=1),
            ),
            Accepted(proposal=1, candidate=2),
            Picked(proposal=2, parent=0, minibatch=("a",)),
            Reflected(proposal=2, text="A dead end."),
            Accepted(proposal=2, candidate=3),
            Picked(proposal=3, parent=2, minibatch=("c",)),
            Reflected(proposal=3, text=winner.text),
            Accepted(proposal=3, candidate=4),
            Published(version=1, ended_by="budget"),
        ):
            journal.append(event_to_json(event))
    (read,) = read_run(run).libraries
    assert read.num_problems == {0: 1, 4: 1}
    assert [(older.id, older.text, older.parent) for older in read.ancestors] == [
        (2, "Count twice.", 1),
        (1, "Count.", 0),
    ]
    page = report_of(tmp_path, run)
    assert page.text.index("Template 1") < page.text.index("Template 2") < page.text.index("Template 4")
    assert "A dead end." not in page.text


def test_what_training_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    problem = Problem(id="h1", question="Six times seven?", answer="42", level="hard")
    hint = Template(id=1, text="Add six sevens.", parent=0)

    def rollout(template: Template, reward: float) -> Rollout:
        ids = fake_token_ids("It is \\boxed{42}.")
        prompt = Prompt(problem=problem, template=template, sampling_ids=ids, training_ids=ids)
        logprobs = np.zeros(len(ids), dtype=np.float32)
        completion = Completion(
            prompt=prompt, token_ids=ids, logprobs=logprobs, finish_reason="stop", weight_versions=(0,)
        )
        return Rollout(completion=completion, grade=Grade(reward=reward))

    group = Group(problem=problem, rollouts=(rollout(PLAIN, 0.0), rollout(hint, 1.0)), advantages=(-0.7, 0.7))
    with open_metrics_log(tmp_path / "run", "run", LoggingConfig(console=False), num_steps=1) as log:
        log.write(1, 0, step_metrics([group], [], {"step": 2.0}))
    RolloutWriter(tmp_path / "run" / "rollouts").write(1, [group], FakeRenderer(), {})
    write_lines(tmp_path / "run" / "hard_samples.jsonl", [asdict(ledger_entry(group, epoch=0, step=1))])

    run = read_run(tmp_path / "run")
    assert run.points("rollout/reward_templated") == [(1, 1.0)]
    assert [answer.template for answer in find_examples(run)[0].answers] == ["", "Add six sevens."]
    page = report_of(tmp_path, tmp_path / "run")
    for text in ("Six times seven?", "It is \\boxed{42}.", "Add six sevens.", "template, pass@1"):
        assert text in page.text


def test_word_changes_mark_exactly_what_changed() -> None:
    changes = [(words.kind, words.text) for words in word_changes("Work step by step.", "Work one step by <b>.")]
    assert changes == [
        ("kept", "Work"),
        ("added", " one"),
        ("kept", " step by "),
        ("dropped", "step."),
        ("added", "<b>."),
    ]
    assert word_changes("Same.", "Same.") == [WordSpan(kind="kept", text="Same.")]
    assert word_changes("", "") == []


def test_a_templates_text_is_shown_to_the_letter(tmp_path: Path) -> None:
    page = report_of(tmp_path, p2o_run(tmp_path, text="One  <b>\n\n  two & 'three'."))
    assert "<pre>One  &lt;b&gt;\n\n  two &amp; &#39;three&#39;.</pre>" in page.source


def test_examples_tell_how_a_problem_was_internalised(tmp_path: Path) -> None:
    (example,) = find_examples(read_run(p2o_run(tmp_path)))
    assert (example.problem_id, example.gold, example.is_internalised) == ("h1", "42", True)
    assert [(answer.label, answer.text, answer.is_correct, answer.template) for answer in example.answers] == [
        ("Step 1, asked plainly", "a guess", False, ""),
        ("Step 2, through the template", "right with it", True, "Work step by step."),
        ("Step 3, later, asked plainly", "right alone", True, ""),
    ]


def test_examples_of_steps_that_were_not_written_are_passed_over(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    for path in (run / "rollouts").iterdir():
        path.unlink()
    assert find_examples(read_run(run)) == []
    report_of(tmp_path, run)


def test_long_answers_keep_their_beginning_and_their_end() -> None:
    text = "a" * 5000 + "\\boxed{1}"
    kept = shorten(text, MAX_SHOWN_CHARACTERS)
    assert kept.startswith("a" * 1100) and kept.endswith("\\boxed{1}")
    assert f"[... {5009 - 2200} characters left out ...]" in kept
    assert shorten("short", MAX_SHOWN_CHARACTERS) == "short"


def test_spread_picks_distinct_items_evenly() -> None:
    assert spread(["a", "a", "b", "c", "d", "d", "e", "f"], 3) == ["a", "c", "e"]
    assert spread(["a"], 3) == ["a"]


def test_every_round_tells_why_it_ended_and_how_its_proposals_did(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    stats = RoundStats(
        epoch=0,
        library_version=1,
        ended_by="deadline",
        num_hard=61,
        num_dev=30,
        num_feedback=31,
        num_rollouts=2456,
        outcomes={"accepted": 3, "refused: the endpoint refuses with status <400>": 17},
    )
    keep_round(run, replace(stats, ended_by="service_lost", num_rollouts=1))
    keep_round(run, stats)
    keep_round(run, replace(stats, epoch=1, ended_by="budget", num_rollouts=4000, outcomes={"not better": 2}))
    text = report_of(tmp_path, run).text
    assert "CUT OFF by evolution.round_timeout_s: depends on the machine's speed" in text
    assert "17 refused: the endpoint refuses with status <400>, 3 accepted" in text
    assert "2456" in text and "4000" in text and "its budget was spent" in text
    assert "61 (30 scored on, 31 shown)" in text
    assert "its process was lost" not in text, "of a round that was run twice the last counts"


def test_a_run_in_progress_is_reported_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    for name in ("metrics.jsonl", "hard_samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "epo')
    page = report_of(tmp_path, run)
    assert "step 2 at 2026-01-31 12:02 UTC" in page.text


def test_a_run_before_its_first_step_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    assert "no step yet" in report_of(tmp_path, tmp_path / "new").text


def test_results_name_the_arm_and_mark_the_run_finished(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    outcome = {"accuracy": 0.25, "num_samples": 64, "by_source": {"walk": 0.375, "affine": 0.125}}
    results = {"arm": "baseline", "seed": 9, "wall_s": 3725.0, "evaluation": {"heldout_hard": outcome}}
    (run / "results.json").write_text(json.dumps(results))
    read = read_run(run)
    assert (read.arm, read.seed) == ("baseline", 9)
    page = report_of(tmp_path, run)
    assert "finished" in page.text and "1 h 02 min" in page.text
    assert "affine 12.5 %, walk 37.5 %" in page.text


def test_lines_of_one_step_are_merged_and_belong_to_the_epoch_of_the_step(tmp_path: Path) -> None:
    run = read_run(grpo_run(tmp_path))
    assert [line.step for line in run.lines] == [0, 1, 2]
    assert run.points("eval/heldout_hard/avg") == [(0, 0.0), (2, 0.125)]
    assert by_epoch(run, "hard/set_size") == [(0, 7)]


def test_numbers_written_as_null_are_gaps(tmp_path: Path) -> None:
    assert read_run(p2o_run(tmp_path)).points("train/loss") == []


def test_rollouts_spent_count_training_and_evolution(tmp_path: Path) -> None:
    run = read_run(p2o_run(tmp_path))
    assert over_rollouts(run, "eval/heldout_hard/avg") == [(12 + 100 + 12 + 12, 0.875)]


def test_accuracy_stands_over_what_had_been_spent_when_it_was_measured(tmp_path: Path) -> None:
    run = new_run(tmp_path, "spending")
    evaluation = metric_line(2, 0, **{"eval/hard/avg": 0.5, "compute/learning_tokens": 900, "compute/wall_s": 1800.0})
    round_ = metric_line(2, 1, **{"library/version": 1, "compute/learning_tokens": 5000, "compute/wall_s": 3600.0})
    spent = metric_line(3, 1, **{"compute/learning_tokens": 5100, "compute/sampled_minibatch_tokens": 70})
    write_lines(run / "metrics.jsonl", [evaluation, round_, spent])
    (run / "results.json").write_text('{"compute_redone": {"sampled_training_tokens": 12, "engine_s": 3.5}}')
    read = read_run(run)
    assert over_compute(read, "eval/hard/avg", "learning_tokens", 1) == [(900, 0.5)], (
        "before the round of the same step"
    )
    assert over_compute(read, "eval/hard/avg", "wall_s", 3600) == [(0.5, 0.5)]
    table = compute_table([read, read_run(grpo_run(tmp_path))])
    assert table is not None and len(table.rows) == 1, "only one of them counts"
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert (cells["minibatches"], cells["Hours"], cells["Done again"]) == ("70", "1", "12")
    assert cells["GPU hours"] == "no GPU"
    page = report_of(tmp_path, run)
    assert "Accuracy by tokens: hard" in page.text and "Compute" in page.text


def test_an_unfinished_run_has_the_arm_its_results_will_name(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    assert (read_run(run).arm, read_run(run).seed) == ("grpo_n6", 1)
    (run / "config.yaml").write_text("run: {name: grpo_seed2, seed: 2}\n")
    assert (read_run(run).arm, read_run(run).seed) == ("grpo", 2)
    (run / "config.yaml").write_text("run: {name: grpo_seed2, seed: 3}\n")
    assert (read_run(run).arm, read_run(run).seed) == ("grpo_seed2", 3)
    (run / "config.yaml").unlink()
    assert (read_run(run).arm, read_run(run).seed) == ("grpo_n6-seed1", None), "nothing is read from a folder's name"


def test_templates_that_a_later_library_no_longer_holds_have_been_published(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    (run / "templates" / "library-9.json").write_text(json.dumps({"version": 9, "templates": [], "assignments": {}}))
    texts = {each.text for library in read_run(run).libraries for each in library.templates}
    assert len(texts) > 0 and f" {len(texts)} 0 s in steps " in report_of(tmp_path, run).text


def test_numbers_that_were_not_finite_are_counted(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    assert sum(line.num_not_finite for line in read_run(run).lines) == 1


def test_durations_read_as_people_say_them() -> None:
    assert [duration_text(s) for s in (9.4, 61, 3725)] == ["9 s", "1 min 01 s", "1 h 02 min"]


def test_what_is_not_a_run_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither metrics\.jsonl nor results\.json"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
