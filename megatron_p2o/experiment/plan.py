"""Reads an experiment: arms, seeds and a budget in one file, and the settings of each of its runs.

base: ../examples/tiny_cpu/base.yaml     # optional: settings of all arms
settings: {evolution: {enabled: false}}  # optional: more of them
seeds: [1, 2, 3]
budget: {max_tokens: 2000000}            # or {max_hours: 2}
arms:
  grpo: {}
  grpo_2g: {rollout: {group_size: 12}}
  p2o: {base: ../examples/tiny_cpu/p2o.yaml}
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_p2o.config.read import config_of
from megatron_p2o.config.source import (
    ConfigError,
    ConfigProblem,
    Setting,
    Settings,
    over,
    read_document,
    settings_below,
    with_bases,
)
from megatron_p2o.config.suggestions import did_you_mean
from megatron_p2o.config.tree import Config
from megatron_p2o.config.yaml_reader import SettingsLoader, construct

SECTIONS = ("name", "directory", "base", "settings", "seeds", "budget", "arms")

BUDGETS = ("max_tokens", "max_hours")

ENDLESS = 1_000_000
"""Epochs of a run that its budget ends."""

ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,47}")

SEED_MARK = re.compile(r"[-_]seed[-_]?\d+$")
"""What marks a seed at the end of a run's name (`RunConfig.arm`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedRun:
    """One arm with one seed."""

    arm: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run.folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Experiment:
    """Arms that are compared at one budget."""

    folder: Path
    """Holds the runs and their comparison."""
    budget: str
    """As "schedule.max_tokens=2000000"; "" where each arm ends by its own schedule."""
    runs: Sequence[PlannedRun]
    """By arm, then by seed, in the order of the file."""

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(run.arm for run in self.runs))


def read_experiment(path: Path, chosen: Sequence[str] = ()) -> Experiment:
    """Return the experiment in a file; `chosen` names the arms that are wanted, none for all.

    Raises:
        ConfigError: with everything that is wrong with it and the settings of its arms.
    """
    problems: list[ConfigProblem] = []
    loader, root = read_document(path)
    sections = _sections(root, path, problems)
    name = str(_value(loader, sections, "name", path.stem))
    folder = Path(str(_value(loader, sections, "directory", "runs"))) / name
    seeds = _seeds(_value(loader, sections, "seeds", [1]), _where(sections, "seeds", path), problems)
    budget = _budget(loader, sections, path, problems)
    arms = _arms(loader, sections, path, problems)
    unknown = [arm for arm in chosen if arm not in arms]
    problems += [
        _problem(str(path), f"--arm {arm} names no arm ({', '.join(arms)}){did_you_mean(arm, list(arms))}")
        for arm in unknown
    ]
    if problems:
        raise ConfigError(problems)
    runs: list[PlannedRun] = []
    for arm, settings in arms.items():
        for seed in seeds if not chosen or arm in chosen else ():
            given = {("run", "name"): f"{arm}-seed{seed}", ("run", "directory"): str(folder), ("run", "seed"): seed}
            own = over(over(settings, budget), {key: _setting(value, path) for key, value in given.items()})
            runs.append(PlannedRun(arm=arm, seed=seed, config=config_of(own, [], f"{path}, arm {arm}")))
    return Experiment(folder=folder, budget=_shown(runs[0].config) if budget else "", runs=runs)


def _shown(config: Config) -> str:
    """Return the budget as results.json names the limit that ended a run."""
    tokens, hours = config.schedule.max_tokens, config.schedule.max_hours
    return f"schedule.max_hours={hours}" if tokens is None else f"schedule.max_tokens={tokens}"


def _sections(
    root: yaml.MappingNode | None, path: Path, problems: list[ConfigProblem]
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, node in root.value if root is not None else ():
        name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if name not in SECTIONS:
            hint = did_you_mean(name, SECTIONS) or f": write one of {', '.join(SECTIONS)}"
            problems.append(_problem(where, f"{name} is no part of an experiment{hint}"))
        if name in found:
            problems.append(_problem(where, f"{name} is set twice: keep one"))
        found[name] = (key, node)
    if "arms" not in found:
        problems.append(_problem(str(path), "arms is missing: write `arms:` and below it a line for each"))
    return found


def _arms(
    loader: SettingsLoader,
    sections: Mapping[str, tuple[yaml.Node, yaml.Node]],
    path: Path,
    problems: list[ConfigProblem],
) -> dict[str, Settings]:
    """Return the settings of each arm with those of all."""
    common: Settings = {}
    if "base" in sections:
        common = with_bases({("base",): _setting(_value(loader, sections, "base", ""), path)}, path, problems)
    if "settings" in sections:
        common = over(common, _settings(loader, sections["settings"][1], path, problems))
    arms: dict[str, Settings] = {}
    node = sections["arms"][1] if "arms" in sections else None
    if node is not None and not isinstance(node, yaml.MappingNode):
        problems.append(_problem(_where(sections, "arms", path), "arms must be a mapping of names to settings"))
        return {}
    for key, own in node.value if node is not None else ():
        name, where = str(key.value), f"{path}:{key.start_mark.line + 1}"
        if ARM_NAME.fullmatch(name) is None or SEED_MARK.search(name):
            rule = "must be named by at most 48 letters, digits, _ and -, without a seed at the end"
            problems.append(_problem(where, f"arms.{name} {rule}"))
        if name.lower() in (arm.lower() for arm in arms):
            problems.append(_problem(where, f"arms.{name} is there twice (upper and lower case are one): rename one"))
        arms[name] = over(common, with_bases(_settings(loader, own, path, problems), path, problems))
    return arms


def _settings(loader: SettingsLoader, node: yaml.Node, path: Path, problems: list[ConfigProblem]) -> Settings:
    """Return the settings below a key, none for an empty one."""
    where = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode) and not node.value:
        return {}
    if not isinstance(node, yaml.MappingNode):
        problems.append(_problem(where, "must be a mapping of settings: write them below, indented"))
        return {}
    settings = settings_below(loader, node, path, problems)
    for name in ("name", "directory", "seed"):
        if ("run", name) in settings:
            problems.append(_problem(where, f"run.{name} is given by the experiment: take it out"))
    return settings


def _seeds(value: object, where: str, problems: list[ConfigProblem]) -> list[int]:
    seeds = [seed for seed in value if isinstance(seed, int)] if isinstance(value, list) else []
    if not seeds or len(set(seeds)) != len(value if isinstance(value, list) else []):
        problems.append(_problem(where, f"seeds={value} must be a list of different whole numbers"))
    return seeds


def _budget(
    loader: SettingsLoader,
    sections: Mapping[str, tuple[yaml.Node, yaml.Node]],
    path: Path,
    problems: list[ConfigProblem],
) -> Settings:
    """Return the settings that end every run at the budget, after however many epochs."""
    if "budget" not in sections:
        return {}
    value, where = _value(loader, sections, "budget", None), _where(sections, "budget", path)
    if not isinstance(value, dict) or len(value) != 1 or not set(value) <= set(BUDGETS):
        problems.append(_problem(where, f"budget={value} must be {{max_tokens: N}} or {{max_hours: N}}"))
        return {}
    given = {**dict.fromkeys(BUDGETS), "max_steps": None, "epochs": ENDLESS, **value}
    return {("schedule", name): Setting(value=each, text=str(each), where=where) for name, each in given.items()}


def _value(
    loader: SettingsLoader, sections: Mapping[str, tuple[yaml.Node, yaml.Node]], name: str, default: object
) -> object:
    return construct(loader, sections[name][1]) if name in sections else default


def _where(sections: Mapping[str, tuple[yaml.Node, yaml.Node]], name: str, path: Path) -> str:
    return f"{path}:{sections[name][0].start_mark.line + 1}" if name in sections else str(path)


def _setting(value: object, path: Path) -> Setting:
    return Setting(value=value, text=str(value), where=str(path))


def _problem(where: str, sentence: str) -> ConfigProblem:
    return ConfigProblem(name="", where=where, sentence=sentence)
