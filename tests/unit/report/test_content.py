"""What is shown of runs that are whole, partial or in progress."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

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
from megatron_p2o.report.runs import Run
from megatron_p2o.report.spending import compute_table
from megatron_p2o.report.templates import WordSpan, word_changes
from megatron_p2o.rl.hard_samples import ledger_entry
from megatron_p2o.terminal import duration_text
from megatron_p2o.testing.fakes import FakeRenderer, fake_token_ids
from megatron_p2o.types import PLAIN, Completion, Grade, Group, Problem, Prompt, Rollout, Template
from megatron_p2o.view.panels import libraries_panel, report_panel
from megatron_p2o.view.runs import ViewedRun


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


def report_on(*runs: Path) -> dict[str, Any]:
    return report_panel([ViewedRun(run) for run in runs])


def read_run(run: Path) -> Run:
    return ViewedRun(run).reported()


def cells(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a table by heading."""
    return [dict(zip(table["header"], row, strict=True)) for row in table["rows"]]


def overview(*runs: Path) -> list[dict[str, Any]]:
    shown = report_on(*runs)["overview"]
    return cells({"header": shown["header"], "rows": [[row["name"], *row["cells"]] for row in shown["rows"]]})


def nodes(run: Path) -> list[dict[str, Any]]:
    """Return the templates of all libraries in the order in which they are shown."""

    def below(roots: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [node for root in roots for node in (root, *below(root["children"]))]

    return [node for library in libraries_panel(ViewedRun(run)) for node in below(library["roots"])]


def test_arms_stand_side_by_side_with_their_latest_numbers(tmp_path: Path) -> None:
    runs = grpo_run(tmp_path), p2o_run(tmp_path)
    assert [(row["Run"], row["heldout hard"]) for row in overview(*runs)] == [
        ("grpo_n6-seed1", "12.5 %"),
        ("p2o_n6-seed1", "87.5 %"),
    ]
    shown = report_on(*runs)
    assert shown["training"][0]["title"] == "Training reward" and shown["health"] == []
    assert shown["effectiveness"][0]["title"] == "Intractable problems"
    trained = shown["time"]["header"].index("train")
    assert [row["phases"][trained - 1] for row in shown["time"]["rows"]] == [
        {"text": "0", "share": 0.0},
        {"text": "61", "share": 1.0},
    ]


def test_a_run_without_templates_has_no_empty_sections_for_them(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    shown = report_on(run)
    assert (shown["examples"], shown["ledger"], shown["rounds"], nodes(run)) == ([], None, None, [])


def test_templates_are_shown_below_the_one_they_were_reflected_from(tmp_path: Path) -> None:
    plain, parent, child = nodes(p2o_run(tmp_path))
    assert (plain["id"], parent["id"], child["id"]) == (0, 3, 5)
    assert (plain["children"], parent["children"], child["children"]) == ([parent], [child], [])
    assert plain["text"] == []
    assert child["facts"] == ["score 75.0 % at weight version 4", "assigned to 1 problem", "has seen 1 problem"]
    assert child["text"] == [
        {"kind": "kept", "text": "Work step by step."},
        {"kind": "added", "text": " Slowly."},
    ]


def test_a_template_says_what_it_still_adds_in_the_steps_of_its_own_library(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    lines = [
        metric_line(step, 1, **{"template/library_version": version, "template/3/shift_per_token": shift})
        for step, version, shift in ((4, 1, 0.5), (5, 1, 0.25), (6, 1, 0.125), (7, 2, 9.0))
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    told = [fact for node in nodes(run) for fact in node["facts"] if "nats per token" in fact]
    assert told == ["added 0.5 nats per token to responses in step 4, 0.125 in step 6"]


def test_a_template_whose_parent_is_unknown_is_a_root_that_says_so(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    library = {"version": 2, "templates": [template(9, "Check twice.", 8, 0.5)], "assignments": {}}
    (run / "templates" / "library-2.json").write_text(json.dumps(library))
    newest, oldest = libraries_panel(ViewedRun(run))
    assert (newest["version"], oldest["version"]) == (2, 1)
    assert newest["roots"][0]["facts"][-1] == "reflected from template 8, with which the round began"


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
    assert [node["id"] for node in nodes(run)] == [1, 2, 4], "what nothing came of is not shown"


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
    shown = report_on(tmp_path / "run")
    (example,) = shown["examples"][0]["examples"]
    assert (example["question"], example["answers"][0]["text"]) == ("Six times seven?", "It is \\boxed{42}.")
    compared = next(chart for chart in shown["effectiveness"] if chart["title"] == "With and without template: run")
    assert [line["name"] for line in compared["lines"]] == ["template, pass@1", "plain, pass@1"]


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
    text = "One  <b>\n\n  two & 'three'."
    assert nodes(p2o_run(tmp_path, text=text))[1]["text"] == [{"kind": "kept", "text": text}]


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
    assert report_on(run)["examples"] == []


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
    first, second = cells(report_on(run)["rounds"])
    assert first["Ended because"] == "CUT OFF by evolution.round_timeout_s: depends on the machine's speed", (
        "of a round that was run twice the last counts"
    )
    assert first["Proposals by outcome"] == "17 refused: the endpoint refuses with status <400>, 3 accepted"
    assert (first["Rollouts"], first["Hard problems"]) == ("2456", "61 (30 scored on, 31 shown)")
    assert (second["Rollouts"], second["Ended because"]) == ("4000", "its budget was spent")


def test_a_run_in_progress_is_reported_up_to_its_last_whole_line(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    for name in ("metrics.jsonl", "hard_samples.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "epo')
    assert overview(run)[0]["State"] == "step 2 at 2026-01-31 12:02 UTC"


def test_a_run_before_its_first_step_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text("")
    assert overview(tmp_path / "new")[0]["State"] == "no step yet"
    assert [chart["lines"] for chart in report_on(tmp_path / "new")["training"]] == [[]]


def test_results_name_the_arm_and_mark_the_run_finished(tmp_path: Path) -> None:
    run = grpo_run(tmp_path)
    outcome = {"accuracy": 0.25, "num_samples": 64, "by_source": {"walk": 0.375, "affine": 0.125}}
    results = {"arm": "baseline", "seed": 9, "wall_s": 3725.0, "evaluation": {"heldout_hard": outcome}}
    (run / "results.json").write_text(json.dumps(results))
    read = read_run(run)
    assert (read.arm, read.seed) == ("baseline", 9)
    (row,) = overview(run)
    assert (row["State"], row["Wall time"]) == ("finished", "1 h 02 min")
    assert cells(report_on(run)["by_source"])[0]["By source"] == "affine 12.5 %, walk 37.5 %"


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
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert (row["minibatches"], row["Hours"], row["Done again"]) == ("70", "1", "12")
    assert row["GPU hours"] == "no GPU"
    shown = report_on(run)
    assert "Accuracy by tokens: hard" in {chart["title"] for chart in shown["training"]}
    assert cells(shown["compute"])[0]["minibatches"] == "70"


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
    assert len(texts) > 0 and overview(run)[0]["Templates published"] == str(len(texts))


def test_numbers_that_were_not_finite_are_counted(tmp_path: Path) -> None:
    run = p2o_run(tmp_path)
    assert cells(report_on(run)["failures"])[0]["Numbers not finite"] == 1


def test_durations_read_as_people_say_them() -> None:
    assert [duration_text(s) for s in (9.4, 61, 3725)] == ["9 s", "1 min 01 s", "1 h 02 min"]
