"""The task of `p2o eval`: model, problems, settings and output folder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_p2o.config.read import ConfigError, load_config, missing_paths
from megatron_p2o.config.tree import Config
from megatron_p2o.files import json_digest, limit_readers, read_json_object
from megatron_p2o.run.launch import check_engines, launch
from megatron_p2o.run.ranks.environment import prepare_environment
from megatron_p2o.run.ranks.signals import evaluation_notice, told_at_once
from megatron_p2o.run_folder.lock import hold_run
from megatron_p2o.run_folder.state import STATE_FILE, read_state

EVALUATIONS_FOLDER = "evaluations"
"""Folder in a run's folder for its evaluations, unless `--output` names another."""

BEST = "best"

TEMPLATE_SUFFIXES = (".txt", ".md")
"""End the name of a file that holds a template; anything else is the template's text."""

POINTERS = ("latest", "best")
"""Files under `checkpoints` that name one of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRequest:
    """One evaluation, ready to start."""

    config: Config
    """Settings with the chosen sets only; the run is the output folder."""
    checkpoint: Path | None
    """None: the model in `model.path`."""
    output: Path
    template: str = ""
    """Text of the template that all problems are asked through; "" asks plainly."""


def evaluation_request(
    target: Path,
    settings_file: Path | None,
    overrides: Sequence[str],
    benchmarks: Sequence[str],
    output: Path | None,
    template: str | None = None,
) -> EvaluationRequest:
    """Return the evaluation of a settings file's initial policy, a checkpoint or a Hugging Face directory.

    Args:
        target: any of the three, or `checkpoints/latest` or `checkpoints/best` of a run.
        settings_file: for a directory; a checkpoint has those of its run, a model the defaults.
        overrides: "name=value" settings, which win.
        benchmarks: "name=file" to add a set, "name" to choose one of `data.evaluation`; empty chooses all.
        template: text of a template, a file with one, or "best" for the best one of the checkpoint's run; None: plain.

    Raises:
        ValueError: the target is none of these, settings are wrong, or files are missing.
    """
    named = {name: file for name, _, file in (benchmark.partition("=") for benchmark in benchmarks)}
    files = [_override(f"data.evaluation.{name}", file) for name, file in named.items() if file]
    target = _pointed_at(target)
    checkpoint = None
    if target.is_file():
        config = load_config(target, [*files, *overrides])
        default = config.run.folder / EVALUATIONS_FOLDER / "initial"
    elif (target / STATE_FILE).is_file():
        checkpoint = target.resolve()
        run_dir = checkpoint.parent.parent
        config = load_config(settings_file or run_dir / "config.yaml", [*files, *overrides])
        default = run_dir / EVALUATIONS_FOLDER / checkpoint.name
    elif (target / "config.json").is_file():
        model = _override("model.path", str(target))
        own = [model] if settings_file else [model, "run.name=evaluation", 'data.train=""']
        config = load_config(settings_file, [*own, *files, *overrides])
        default = Path(config.run.directory) / EVALUATIONS_FOLDER / target.resolve().name
    else:
        if (target / "checkpoints").is_dir():
            raise ValueError(
                f"{target} is the folder of a run: name a checkpoint of it, {target}/checkpoints/latest or "
                f"{target}/checkpoints/best"
            )
        raise ValueError(
            f"{target} is no settings file, no checkpoint (it has no {STATE_FILE}) and no Hugging Face model directory "
            "(it has no config.json)"
        )
    config = _checked(_with_sets(config, list(named)))
    text = "" if template is None else template_text(template, checkpoint)
    # Responses under a template are others: they have a folder of their own.
    default = default.with_name(f"{default.name}-template-{json_digest(text)[:8]}") if text else default
    place = (output or default).absolute()
    return EvaluationRequest(config=own_run(config, place), checkpoint=checkpoint, output=place, template=text)


def template_text(given: str, checkpoint: Path | None) -> str:
    """Return the text of a template that is given as itself, as a file, or as "best".

    Raises:
        ValueError: there is none.
    """
    if given == BEST:
        best = read_state(checkpoint / STATE_FILE).best_template if checkpoint is not None else ""
        if not best:
            raise ValueError(
                "--template best needs a checkpoint of a run that has published templates: name a file or write a text"
            )
        return best
    is_path = given.endswith(TEMPLATE_SUFFIXES)
    try:
        text = Path(given).read_text(encoding="utf-8").strip() if is_path else given.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--template {given} must be a file of UTF-8 text") from error
    if not text:
        raise ValueError(f"--template {given} holds no text: leave it out to ask plainly")
    return text


def run_evaluation(request: EvaluationRequest, restart: bool) -> int:
    """Evaluate and return the exit status. A checkpoint needs the run's ranks, a model directory only engines.

    Args:
        restart: throw earlier responses in the output folder away.
    """
    if request.checkpoint is not None:
        flags = [*(["--restart"] if restart else []), f"--template={request.template}"]
        return launch(request.config, ["--evaluate", str(request.checkpoint), *flags])
    check_engines(request.config)
    prepare_environment(request.config)
    limit_readers(request.output, request.config.run.readable_by)
    # Imported here: transformers and the engine's client take seconds that a refused request does not need.
    from megatron_p2o.evaluation.benchmark import discard_responses, evaluate_directory
    from megatron_p2o.evaluation.protocol import template_with_text

    with hold_run(request.output), told_at_once(evaluation_notice):
        if restart:
            discard_responses(request.output)
        evaluate_directory(request.config, request.output, template_with_text(request.template))
    return 0


def own_run(config: Config, output: Path) -> Config:
    """Return the settings of a run that is `output`: nothing of an evaluation is written elsewhere, nothing evolves."""
    return replace(
        config,
        run=replace(config.run, directory=str(output.parent), name=output.name),
        evolution=replace(config.evolution, enabled=False),
    )


def _pointed_at(target: Path) -> Path:
    """Return the checkpoint that `checkpoints/latest` or `checkpoints/best` names; other targets unchanged."""
    if target.name not in POINTERS or target.parent.name != "checkpoints" or not target.is_file():
        return target
    text = target.read_bytes().strip()
    name = read_json_object(target).get("checkpoint") if text.startswith(b"{") else text.decode(errors="replace")
    if not isinstance(name, str) or not name.isprintable() or Path(name).name != name:
        raise ValueError(f"{target} names no checkpoint beside it: write its name into the file, such as step-000030")
    return target.parent / name


def _with_sets(config: Config, chosen: Sequence[str]) -> Config:
    """Return `config` with the chosen sets alone; all of them when none is chosen."""
    known = config.data.evaluation
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(
            f"--benchmark {unknown[0]} names no set of data.evaluation ({', '.join(known) or 'none'}): "
            f"write --benchmark {unknown[0]}=FILE"
        )
    names = list(chosen) or list(known)
    if not names:
        raise ValueError("there is nothing to evaluate: give --benchmark NAME=FILE, or set data.evaluation")
    chosen_sets = {name: known[name] for name in names}
    evaluation = replace(config.evaluation, best_set=None)
    return replace(config, data=replace(config.data, evaluation=chosen_sets), evaluation=evaluation)


def _checked(config: Config) -> Config:
    # Imported here: numpy and the readers of problems take a second that a refused target does not need.
    from megatron_p2o.run.inputs import missing_packages

    missing = [*missing_paths(config, for_training=False), *missing_packages(config, for_training=False)]
    if missing:
        raise ConfigError(missing)
    return config


def _override(name: str, text: str) -> str:
    # JSON is YAML: a path stays text whatever it looks like.
    return f"{name}={json.dumps(text)}"
