"""Evaluations on a fake engine: what they count, and that an interrupted one goes on without repeating anything."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from megatron_p2o.config.tree import Config, EvaluationConfig, EvaluationSetConfig
from megatron_p2o.evaluation.benchmark import Subject, open_benchmarks, results_of, sample_missing
from megatron_p2o.evaluation.comparison import compare
from megatron_p2o.evaluation.outcome import NothingDecided, evaluation_metrics
from megatron_p2o.evaluation.protocol import Protocol, evaluate, protocol_of, template_with_text
from megatron_p2o.evaluation.tables import print_comparison, print_results
from megatron_p2o.metrics.values import numbers_of
from megatron_p2o.rl.sampling import SamplingParts
from megatron_p2o.testing.fakes import FakeEngines, FakeGrader, FakeRenderer, FakeReply, fake_config, fake_problem
from megatron_p2o.types import Prompt, Template

MODEL = Subject(path="model", weights_sha256="a" * 64, step=None)


class Killed(Exception):
    """Ends an evaluation in the middle."""


def parts_of(answers: Callable[[Prompt, int], FakeReply]) -> SamplingParts:
    """Return parts whose engine answers by (prompt, place among the problem's prompts)."""

    def reply(prompt: Prompt, index: int) -> FakeReply:
        places = engines.places[-1]
        assert places is not None
        return answers(prompt, places[index])

    engines = FakeEngines(reply=reply)
    return SamplingParts(engines=engines, grader=FakeGrader(), renderer=FakeRenderer(), solved_at=1.0)


def mixed(prompt: Prompt, place: int) -> FakeReply:
    """Solve problem n in the first n samples; the others fail in every way there is."""
    number = int(prompt.problem.id[-3:])
    if place < number:
        return FakeReply(text="yes")
    return [FakeReply(text="no"), FakeReply(text="no", finish_reason="length"), FakeReply(text="?")][place % 3]


def decidable(prompt: Prompt, place: int) -> FakeReply:
    """GradedResponse as `mixed` does, with a wrong answer where the grader could not decide."""
    reply = mixed(prompt, place)
    return FakeReply(text="no") if reply.text == "?" else reply


def sets_config(folder: Path, num_problems: int = 5, **settings: Any) -> Config:
    path = folder / "problems.jsonl"
    rows = [
        {"id": f"problem-{number:03d}", "question": f"question {number}", "answer": "yes", "level": f"L{number % 2}"}
        for number in range(num_problems)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dotted = {f"evaluation.{name}": value for name, value in settings.items()}
    return fake_config(
        {"data.evaluation": {"aime": EvaluationSetConfig(file=str(path))}, "evaluation.num_samples": 4, **dotted}
    )


def evaluated(config: Config, parts: SamplingParts, output: Path, subject: Subject = MODEL) -> dict[str, Any]:
    with ExitStack() as stack:
        benchmarks = open_benchmarks(subject, parts.renderer, config, output, stack)
        sample_missing(benchmarks, parts, config)
        return results_of(benchmarks, subject, config)


def asked_of(parts: SamplingParts) -> Counter[tuple[str, int]]:
    engines = parts.engines
    assert isinstance(engines, FakeEngines)
    places = [place for call in engines.places for place in call or ()]
    return Counter(zip((prompt.problem.id for prompt in engines.prompts), places, strict=True))


@pytest.mark.parametrize(
    ("own", "num_problems", "settings", "expected"),
    [
        ({}, 99, EvaluationConfig(), (16, 0.6)),
        ({}, 100, EvaluationConfig(), (1, 0.0)),
        ({}, 100, EvaluationConfig(num_samples=8), (8, 0.6)),
        ({}, 30, EvaluationConfig(num_samples=1), (1, 0.0)),
        ({"num_samples": 32}, 30, EvaluationConfig(num_samples=8), (32, 0.6)),
        ({"temperature": 0.0}, 30, EvaluationConfig(temperature=1.0), (16, 0.0)),
        ({"num_samples": 1}, 30, EvaluationConfig(temperature=1.0), (1, 1.0)),
    ],
)
def test_small_sets_are_sampled_and_large_ones_greedy_unless_set_otherwise(
    own: dict[str, Any], num_problems: int, settings: EvaluationConfig, expected: tuple[int, float]
) -> None:
    sets = {"a": EvaluationSetConfig(file="a", **own), "b": EvaluationSetConfig(file="b", num_samples=3, temperature=3)}
    config = replace(fake_config({"data.evaluation": sets}), evaluation=settings)
    assert protocol_of("a", num_problems, config) == Protocol(num_samples=expected[0], temperature=expected[1])


def test_an_evaluation_counts_what_was_answered_and_how() -> None:
    problems = [replace(fake_problem(number), level=f"L{number % 2}", source="s") for number in range(5)]
    outcome = evaluate("aime", problems, parts_of(mixed), fake_config({"evaluation.num_samples": 4}))
    assert dict(outcome.correct_by_problem) == {f"problem-{number:03d}": number for number in range(5)}
    # Wrong places: 0..3, 1..3, 2..3 and 3; truncated are 1, undecided 2: there are 3, 3, 3, 4 and 4 verdicts.
    assert dict(outcome.decided_by_problem) == dict(zip(outcome.correct_by_problem, [3, 3, 3, 4, 4], strict=True))
    assert (outcome.num_correct, outcome.num_decided, outcome.num_samples) == (10, 17, 20)
    assert outcome.accuracy == pytest.approx((0 + 1 / 3 + 2 / 3 + 3 / 4 + 1) / 5)
    assert outcome.pass_at == {
        "1": outcome.accuracy,
        "2": pytest.approx((0 + 2 / 3 + 1 + 1 + 1) / 5),
        "4": 1.0,  # of the two problems with four verdicts
    }
    assert outcome.pass_at_num_problems == {"1": 5, "2": 5, "4": 2}
    assert outcome.by_level == {"L0": pytest.approx((0 + 2 / 3 + 1) / 3), "L1": pytest.approx((1 / 3 + 3 / 4) / 2)}
    assert outcome.by_source == {"s": pytest.approx(outcome.accuracy)}
    assert (outcome.truncated_share, outcome.num_grading_errors, outcome.num_aborted) == (2 / 20, 3, 0)
    assert outcome.interval.low < outcome.accuracy < outcome.interval.high
    # "yes" and "no" and their end; "no" that was cut off and "?" are shorter.
    assert outcome.mean_tokens == (10 * 4 + 5 * 3 + 2 * 2 + 3 * 2) / 20


def test_a_problem_that_is_too_long_under_the_template_is_asked_plainly_and_counted() -> None:
    problems = [replace(fake_problem(number), question="q" * length) for number, length in enumerate((10, 30, 31, 40))]
    parts = replace(parts_of(mixed), renderer=FakeRenderer(max_prompt_tokens=40))
    hint = Template(id=3, text="Think ab", parent=None)
    config = fake_config({"evaluation.num_samples": 2})
    outcome = evaluate("aime", problems, parts, config, hint)
    assert outcome.num_asked_plainly == 2
    assert outcome.num_samples == 8
    asked = [(prompt.problem.id, prompt.is_templated) for prompt in parts.engines.prompts]
    assert asked == [(problem.id, number < 2) for number, problem in enumerate(problems) for _ in range(2)]
    metrics = numbers_of(evaluation_metrics({"aime": outcome}))
    assert metrics["eval/aime/asked_plainly_count"] == 2
    plain = evaluate("aime", problems, parts, config)
    assert plain.num_asked_plainly == 0
    assert "eval/aime/asked_plainly_count" not in numbers_of(evaluation_metrics({"aime": plain}))


def test_answers_without_a_verdict_change_no_rate() -> None:
    problems = [fake_problem(number) for number in range(3)]
    lost = {0: FakeReply(text="?"), 1: FakeReply(text="", finish_reason="abort")}

    def answers(prompt: Prompt, place: int) -> FakeReply:
        """Give the third problem no verdict at all, the others the same as if they were asked twice."""
        if prompt.problem == problems[2] or place >= 2:
            return lost[place % 2]
        return FakeReply(text="yes" if place < int(prompt.problem.id[-3:]) else "no")

    config = fake_config({"evaluation.num_samples": 4, "evaluation.temperature": 0.6})
    outcome = evaluate("aime", problems, parts_of(answers), config)
    alone = evaluate(
        "aime", problems[:2], parts_of(answers), replace(config, evaluation=EvaluationConfig(num_samples=2))
    )
    assert (outcome.accuracy, outcome.interval) == (alone.accuracy, alone.interval) == (0.25, alone.interval)
    assert outcome.pass_at == alone.pass_at == {"1": 0.25, "2": 0.5}, "nobody has four verdicts"
    assert (outcome.num_grading_errors, outcome.num_aborted, outcome.num_decided) == (4, 4, 4)
    assert outcome.mean_tokens == pytest.approx((4 + 3 + 3 + 3 + 4 * 2) / 8), "of the eight that were not aborted"


def test_a_table_says_how_many_answers_have_no_verdict(tmp_path: Path) -> None:
    printed = StringIO()
    print_results(evaluated(sets_config(tmp_path), parts_of(mixed), tmp_path), printed)
    heading, row = printed.getvalue().splitlines()[:2]
    assert heading.split()[-1] == "undecided" and row.split()[-1] == "3"
    assert "1.000 of 2" in row, "pass@4 is over the two problems with four verdicts"


def test_a_set_without_any_verdict_has_no_outcome(tmp_path: Path) -> None:
    def undecided(prompt: Prompt, place: int) -> FakeReply:
        return FakeReply(text="?")

    config = sets_config(tmp_path)
    with pytest.raises(NothingDecided, match="none of 20 responses has a verdict"):
        evaluate("aime", [fake_problem(number) for number in range(5)], parts_of(undecided), config)
    with pytest.raises(NothingDecided, match=r"aime: none of 20 .* the same command asks them again"):
        evaluated(config, parts_of(undecided), tmp_path)
    assert evaluated(config, parts_of(mixed), tmp_path)["sets"]["aime"]["num_decided"] == 17


@pytest.mark.parametrize("num_before", [0, 7, 19])
def test_an_interrupted_evaluation_goes_on_and_repeats_nothing(tmp_path: Path, num_before: int) -> None:
    config = sets_config(tmp_path)
    whole = evaluated(config, parts_of(decidable), tmp_path / "whole")
    num_answered = 0

    def killed_later(prompt: Prompt, place: int) -> FakeReply:
        nonlocal num_answered
        if num_answered == num_before:
            raise Killed
        num_answered += 1
        return decidable(prompt, place)

    with pytest.raises(Killed):
        evaluated(config, parts_of(killed_later), tmp_path / "killed")
    path = tmp_path / "killed" / "responses" / "aime.jsonl"
    kept = path.read_text()
    assert kept.count("\n") == 1 + num_before
    path.write_text(kept + '{"problem_id": "problem-0')
    second = parts_of(decidable)
    assert evaluated(config, second, tmp_path / "killed") == whole
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert Counter((line["problem_id"], line["sample"]) for line in lines) == asked_of(second) + Counter(
        (line["problem_id"], line["sample"]) for line in lines[:num_before]
    )
    assert len(lines) == 20 and sum(asked_of(second).values()) == 20 - num_before
    third = parts_of(decidable)
    assert evaluated(config, third, tmp_path / "killed") == whole
    assert not asked_of(third)


def test_answers_without_a_verdict_are_sampled_again(tmp_path: Path) -> None:
    config = sets_config(tmp_path)

    def lost(prompt: Prompt, place: int) -> FakeReply:
        return FakeReply(text="", finish_reason="abort") if place == 0 else mixed(prompt, place)

    first = evaluated(config, parts_of(lost), tmp_path)["sets"]["aime"]
    assert (first["num_aborted"], first["num_grading_errors"]) == (5, 3)
    second = parts_of(decidable)
    again = evaluated(config, second, tmp_path)["sets"]["aime"]
    assert (again["num_aborted"], again["num_grading_errors"], again["num_decided"]) == (0, 0, 20)
    given_up, undecided = [(f"problem-{n:03d}", 0) for n in range(5)], [(f"problem-{n:03d}", 2) for n in range(3)]
    assert asked_of(second) == Counter([*given_up, *undecided])


def test_more_samples_are_added_to_those_there_are(tmp_path: Path) -> None:
    evaluated(sets_config(tmp_path, num_samples=2, temperature=0.6), parts_of(mixed), tmp_path)
    parts = parts_of(mixed)
    outcome = evaluated(sets_config(tmp_path, temperature=0.6), parts, tmp_path)["sets"]["aime"]
    assert {place for _, place in asked_of(parts)} == {2, 3}
    assert outcome["num_correct"] == 10


@pytest.mark.parametrize(
    ("config_of", "subject", "named"),
    [
        (sets_config, replace(MODEL, weights_sha256="b" * 64), "weights was aaaaaaaaaaaa... and is bbbbbbbbbbbb..."),
        (lambda folder: sets_config(folder, temperature=0.3), MODEL, "temperature was 0.6 and is 0.3"),
        (lambda folder: sets_config(folder, num_problems=4), MODEL, "problems was"),
        (lambda folder: replace(sets_config(folder), run=replace(fake_config().run, seed=7)), MODEL, "run.seed was 1"),
    ],
)
def test_answers_of_another_evaluation_are_refused(
    tmp_path: Path, config_of: Callable[[Path], Config], subject: Subject, named: str
) -> None:
    evaluated(sets_config(tmp_path), parts_of(mixed), tmp_path)
    parts = parts_of(mixed)
    with pytest.raises(ValueError, match="give another --output, or --restart") as refusal:
        evaluated(config_of(tmp_path), parts, tmp_path, subject)
    assert named in str(refusal.value)
    assert not asked_of(parts)


def written(folder: Path, counts: Sequence[int], num_samples: int = 4, **changes: Any) -> Path:
    """Write results of a policy that answered problem n correctly `counts[n]` times."""

    def solves(prompt: Prompt, place: int) -> FakeReply:
        return FakeReply(text="yes" if place < counts[int(prompt.problem.id[-3:])] else "no")

    folder.mkdir()
    config = sets_config(folder, num_problems=len(counts), num_samples=num_samples)
    results = evaluated(config, parts_of(solves), folder)
    results["sets"] |= dict.fromkeys(changes.get("also", ()), results["sets"]["aime"])
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_comparison_pairs_problems(tmp_path: Path) -> None:
    first = written(tmp_path / "a", [0, 1, 2, 4], also=["math"])
    second = written(tmp_path / "b", [2, 3, 4, 4])
    comparison = compare(first, second)
    pair = comparison["sets"]["aime"]
    assert comparison["only_first"] == ["math"] and comparison["only_second"] == []
    assert pair["difference"] == pytest.approx(1.5 / 4) == pair["second_accuracy"] - pair["first_accuracy"]
    assert (pair["num_better"], pair["num_worse"], pair["test"]) == (3, 0, "sign permutation")
    assert pair["p_value"] == pytest.approx(2 / 8)
    assert -1 < pair["interval"]["low"] < 0 < pair["difference"] < pair["interval"]["high"] < 1, "as p > 0.05 says"
    opposite = compare(second, first)["sets"]["aime"]
    assert (opposite["difference"], opposite["p_value"]) == (-pair["difference"], pair["p_value"])


def test_comparison_of_single_answers_is_mcnemars(tmp_path: Path) -> None:
    first = written(tmp_path / "a", [1, 0, 0, 0, 0, 0, 0, 1], num_samples=1)
    second = written(tmp_path / "b", [0, 1, 1, 1, 1, 1, 1, 1], num_samples=1)
    pair = compare(first, second)["sets"]["aime"]
    # Six only the second solved, one only the first: 2 (1 + 7) / 2**7.
    assert (pair["test"], pair["p_value"]) == ("McNemar", 16 / 128)


def test_comparison_of_five_problems_does_not_exclude_zero_where_the_test_does_not(tmp_path: Path) -> None:
    first = written(tmp_path / "a", [0] * 5, num_samples=1)
    second = written(tmp_path / "b", [1] * 5, num_samples=1)
    pair = compare(first, second)["sets"]["aime"]
    assert (pair["difference"], pair["p_value"]) == (1.0, 2 / 32)
    assert pair["interval"] == {"low": 0.0, "high": 1.0}


def test_comparison_leaves_out_problems_without_a_verdict(tmp_path: Path) -> None:
    first = written(tmp_path / "a", [1, 0, 2, 3])
    second = written(tmp_path / "b", [2, 4, 4, 3])
    results = json.loads((second / "results.json").read_text())
    outcome = results["sets"]["aime"]
    # Of the second policy's answers those to one problem have no verdict, and two to another.
    outcome["decided_by_problem"] |= {"problem-001": 0, "problem-002": 2}
    outcome["correct_by_problem"] |= {"problem-001": 0, "problem-002": 2}
    (second / "results.json").write_text(json.dumps(results))
    pair = compare(first, second)["sets"]["aime"]
    assert (pair["num_problems"], pair["num_undecided_problems"]) == (3, 1)
    assert pair["first_accuracy"] == pytest.approx((1 + 2 + 3) / 12)
    assert pair["difference"] == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)
    printed = StringIO()
    print_comparison(compare(first, second), printed)
    assert "aime: 1 problems have no verdict in one of the two: left out" in printed.getvalue()
    outcome["decided_by_problem"] = dict.fromkeys(outcome["decided_by_problem"], 0)
    (second / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="no problem has a response with a verdict in both"):
        compare(first, second)
    del outcome["decided_by_problem"]
    (second / "results.json").write_text(json.dumps(results))
    with pytest.raises(
        ValueError, match="does not say how many responses to a problem have a verdict: run its `p2o eval`"
    ):
        compare(first, second)


def test_comparison_of_different_problems_is_refused(tmp_path: Path) -> None:
    first, second = written(tmp_path / "a", [1, 1, 1]), written(tmp_path / "b", [1, 1])
    with pytest.raises(ValueError, match="only the first has problem-002, only the second none"):
        compare(first, second)
    changed = json.loads((first / "results.json").read_text())
    changed["sets"]["aime"]["problems_sha256"] = "0"
    third = tmp_path / "c"
    third.mkdir()
    (third / "results.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="questions or gold answers differ"):
        compare(first, third)
    with pytest.raises(ValueError, match=r"holds no results\.json"):
        compare(first, tmp_path)


def test_all_problems_are_asked_through_a_template_and_its_responses_are_others(tmp_path: Path) -> None:
    config, plain = sets_config(tmp_path), parts_of(decidable)
    hint = template_with_text("Be brave.")
    results = evaluated(config, plain, tmp_path / "plain")
    assert results["template"] == "" and results["sets"]["aime"]["num_asked_plainly"] == 0
    hinted = parts_of(lambda prompt, place: FakeReply(text="yes" if prompt.is_templated else "no"))
    templated = evaluated(config, hinted, tmp_path / "templated", replace(MODEL, template=hint))
    assert templated["template"] == "Be brave." and templated["sets"]["aime"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match="prompts"):
        evaluated(config, hinted, tmp_path / "plain", replace(MODEL, template=hint))
    short = replace(hinted, renderer=FakeRenderer(max_prompt_tokens=len("question 0")))
    too_long = evaluated(config, short, tmp_path / "long", replace(MODEL, template=hint))["sets"]["aime"]
    assert (too_long["num_asked_plainly"], too_long["accuracy"]) == (5, 0.0), "asked plainly, and counted"
