"""`p2o eval`: samples responses to sets of problems, keeps every response, and writes the results.

<output>/responses/<set>.jsonl   every response as it arrived; an evaluation that was interrupted goes on from here
<output>/results.json          what they amount to, see docs/evaluation.md
<output>/config.yaml, engines/ the resolved settings and the engines' logs
"""

import json
import shutil
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from urllib.parse import quote

import torch

from megatron_p2o.config.read import dump_config, with_template_date
from megatron_p2o.config.tree import Config
from megatron_p2o.data.chat import chat_renderer, fitting_problems
from megatron_p2o.data.tasks import set_problems
from megatron_p2o.evaluation.estimators import NUM_RESAMPLES
from megatron_p2o.evaluation.intervals import CONFIDENCE
from megatron_p2o.evaluation.outcome import (
    BOOTSTRAP_SEED,
    Evaluation,
    NothingDecided,
    evaluation_of,
    evaluation_record,
    graded_response,
    problems_digest,
    problems_record,
)
from megatron_p2o.evaluation.protocol import Protocol, all_asked, evaluation_sampling, protocol_of, sampled_responses
from megatron_p2o.evaluation.response_file import ResponseFile
from megatron_p2o.evaluation.tables import EvaluationProgress, print_results
from megatron_p2o.files import digests_of, json_digest, write_whole
from megatron_p2o.interfaces import PromptRenderer
from megatron_p2o.metrics.jsonl import JsonObject
from megatron_p2o.processes import exit_on_signal
from megatron_p2o.rewards.tasks import TaskGrader
from megatron_p2o.rl.sampling import SamplingParts, asked
from megatron_p2o.rollout.start import start_engines
from megatron_p2o.run_folder.checkpoints import POLICY_FOLDER, read_manifest
from megatron_p2o.terminal import say
from megatron_p2o.types import PLAIN, Problem, Template

FORMAT = 2
INTERVALS = "over problems: Clopper-Pearson where all are 0 or 1 or fewer than 6 vary, else percentile bootstrap"
RESPONSES_FOLDER = "responses"
RESULTS_FILE = "results.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Whose responses these are."""

    path: str
    """Checkpoint or model directory."""
    weights_sha256: str
    step: int | None
    """Training step; None for a model directory."""
    template: Template = PLAIN
    """What all problems are asked through."""


def discard_responses(output: Path) -> None:
    """Forget an earlier evaluation in `output`."""
    shutil.rmtree(output / RESPONSES_FOLDER, ignore_errors=True)
    (output / RESULTS_FILE).unlink(missing_ok=True)


def directory_subject(directory: Path, template: Template = PLAIN) -> Subject:
    """Return a Hugging Face directory as the subject of an evaluation; reads all its weights once.

    Raises:
        ValueError: it holds no safetensors.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no *.safetensors: give a Hugging Face model directory")
    return Subject(
        path=str(directory),
        weights_sha256=json_digest({name: digest.sha256 for name, digest in digests_of(files).items()}),
        step=None,
        template=template,
    )


def checkpoint_subject(checkpoint: Path, step: int, template: Template = PLAIN) -> Subject:
    """Return a whole checkpoint of a run as the subject of an evaluation, by the hashes in its manifest."""
    files = read_manifest(checkpoint).files
    weights = {name: digest.sha256 for name, digest in files.items() if name.startswith(f"{POLICY_FOLDER}/")}
    return Subject(path=str(checkpoint), weights_sha256=json_digest(weights), step=step, template=template)


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A set of problems, how they are asked, and the responses there are."""

    name: str
    problems: Sequence[Problem]
    protocol: Protocol
    file: ResponseFile
    template: Template = PLAIN
    num_asked_plainly: int = 0
    """Problems that are too long under the template, and are asked without it."""

    @property
    def wanted(self) -> list[tuple[Problem, int]]:
        return all_asked(self.problems, self.protocol)

    @property
    def missing(self) -> list[tuple[Problem, int]]:
        return [(problem, sample) for problem, sample in self.wanted if (problem.id, sample) not in self.file.responses]

    def outcome(self) -> Evaluation:
        """Return what the responses amount to; none may be missing. Raises `NothingDecided`, naming the set."""
        responses = [self.file.responses[problem.id, sample] for problem, sample in self.wanted]
        try:
            return evaluation_of(
                responses,
                self.problems,
                self.protocol.num_samples,
                self.protocol.temperature,
                self.num_asked_plainly,
            )
        except NothingDecided as error:
            raise NothingDecided(f"{self.name}: {error}: the same command asks them again") from error


def evaluate_directory(config: Config, output: Path, template: Template = PLAIN) -> None:
    """Evaluate the model in `model.path` on engines of this machine alone; no trainer is started.

    `template`: what all problems are asked through.

    Raises:
        ValueError: a problem file, the model directory or earlier responses in `output` are not usable.
    """
    signal.signal(signal.SIGTERM, exit_on_signal)
    config = replace(config, rollout=replace(config.rollout, num_engines=_engines_here(config)))
    config = with_template_date(config, output / "config.yaml")
    subject = directory_subject(Path(config.model.path), template)
    renderer = chat_renderer(config)
    write_whole(output / "config.yaml", dump_config(config))
    with ExitStack() as stack:
        benchmarks = open_benchmarks(subject, renderer, config, output, stack)
        if any(benchmark.missing for benchmark in benchmarks):
            grader = TaskGrader(config)
            stack.callback(grader.close)
            grader.check()
            engines = stack.enter_context(start_engines(config, output, renderer.eos_token_ids))
            parts = SamplingParts(engines=engines, grader=grader, renderer=renderer, solved_at=config.hard.solved_at)
            sample_missing(benchmarks, parts, config)
        write_results(benchmarks, subject, config, output)


def open_benchmarks(
    subject: Subject, renderer: PromptRenderer, config: Config, output: Path, stack: ExitStack
) -> list[Benchmark]:
    """Read every set of `data.evaluation` and the responses there already are; `stack` closes their files.

    Raises:
        ValueError: a problem file is bad, or `output` holds responses of other weights or settings.
    """
    benchmarks: list[Benchmark] = []
    for name in config.data.evaluation:
        problems = fitting_problems(set_problems(config.data, name), renderer, config.data.skip_bad_rows)
        protocol = protocol_of(name, len(problems), config)
        settings = response_settings(name, problems, protocol, subject, renderer, config)
        file = stack.enter_context(ResponseFile(output / RESPONSES_FOLDER / f"{quote(name, safe='')}.jsonl", settings))
        too_long = [each for each in problems if not _fits(each, subject.template, renderer)]
        benchmarks.append(
            Benchmark(
                name=name,
                problems=problems,
                protocol=protocol,
                file=file,
                template=subject.template,
                num_asked_plainly=len(too_long),
            )
        )
    return benchmarks


def _fits(problem: Problem, template: Template, renderer: PromptRenderer) -> bool:
    """Return whether a problem can be asked through the template."""
    return not template.text or asked(problem, template, renderer).is_templated


def sample_missing(benchmarks: Sequence[Benchmark], parts: SamplingParts, config: Config) -> None:
    """Sample and grade every response that is still missing, and keep each as it arrives."""
    for benchmark in benchmarks:
        missing = benchmark.missing
        counts = {"num_wanted": len(benchmark.wanted), "num_missing": len(missing)}
        sampling = evaluation_sampling(config, benchmark.protocol)
        with EvaluationProgress(benchmark.name, **asdict(benchmark.protocol), **counts) as progress:
            for sample, rollout in sampled_responses(missing, sampling, parts, benchmark.template):
                benchmark.file.append(graded_response(rollout, sample, parts.renderer.decode(rollout.completion)))
                progress.advance()


def write_results(benchmarks: Sequence[Benchmark], subject: Subject, config: Config, output: Path) -> None:
    """Write results.json of benchmarks that miss nothing, and print it as a table."""
    results = results_of(benchmarks, subject, config)
    write_whole(output / RESULTS_FILE, json.dumps(results, indent=1, allow_nan=False) + "\n")
    print_results(results)
    say(f"{output}: {RESULTS_FILE} and {RESPONSES_FOLDER}/ written")


def response_settings(
    name: str,
    problems: Sequence[Problem],
    protocol: Protocol,
    subject: Subject,
    renderer: PromptRenderer,
    config: Config,
) -> JsonObject:
    """Return what the responses to set `name` and their grades depend on; not their number, which may be raised."""
    grading = config.grading_of(config.data.task_of_set(name))
    prompts = {problem.id: asked(problem, subject.template, renderer).sampling_ids.tolist() for problem in problems}
    sampling = evaluation_sampling(config, protocol)
    return {
        "weights": subject.weights_sha256,
        "problems": problems_digest(problems),
        "prompts": json_digest(prompts),
        "model.dtype": config.model.dtype,
        "temperature": sampling.temperature,
        "rollout.max_new_tokens": sampling.max_new_tokens,
        "run.seed": config.run.seed,
        "hard.solved_at": config.hard.solved_at,
        **{f"grading.{each}": asdict(grading)[each] for each in ("function", "arguments", "functions")},
    }


def results_of(benchmarks: Sequence[Benchmark], subject: Subject, config: Config) -> JsonObject:
    """Return results.json; docs/evaluation.md explains its fields."""
    outcomes = {benchmark.name: benchmark.outcome() for benchmark in benchmarks}
    accuracies = [outcome.accuracy for outcome in outcomes.values()]
    return {
        "format": FORMAT,
        **{"model": subject.path, "weights_sha256": subject.weights_sha256, "step": subject.step},
        "template": subject.template.text,
        "seed": config.run.seed,
        "max_new_tokens": config.rollout.max_new_tokens,
        "intervals": {
            "method": INTERVALS,
            "confidence": CONFIDENCE,
            "num_resamples": NUM_RESAMPLES,
            "seed": BOOTSTRAP_SEED,
        },
        "average_accuracy": sum(accuracies) / len(accuracies),
        "sets": {
            benchmark.name: {
                **evaluation_record(outcomes[benchmark.name]),
                "num_problems": len(benchmark.problems),
                "problems_sha256": problems_digest(benchmark.problems),
                **problems_record(outcomes[benchmark.name]),
            }
            for benchmark in benchmarks
        },
    }


def _engines_here(config: Config) -> int:
    """Return how many of the run's engines this machine holds, each with GPUs of its own."""
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        return config.rollout.num_engines
    return max(1, min(config.rollout.num_engines, num_gpus // config.rollout.tensor_parallel))
