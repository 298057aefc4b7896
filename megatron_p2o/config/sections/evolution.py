"""Settings of prompt evolution: hard problems, their templates, the search and who writes new ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_p2o.config.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, Range, Seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class HardConfig:
    """Which problems count as hard."""

    max_solved: NonNegativeInt = 1
    """Largest number of solved rollouts in the group of a hard problem (the paper's tau = 2, as a count). Larger groups
    (`evolution.plain_rollouts`) are held to the same rate."""
    solved_at: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Reward from which a rollout counts as solved: for the hard rule, the ledger, the coverage of templates and the
    accuracy of an evaluation. Advantages, template scores and mean rewards use the reward itself."""
    counted: Literal["plain", "all"] = "plain"
    """Rollouts of a templated group that decide whether its problem is hard. `plain`: the plain ones, at the rate
    `hard.max_solved / rollout.group_size`, which asks whether the skill is in the weights yet (the paper's Eq. 3).
    `all`: templated successes count too (the authors' code), so that a problem loses its templates as soon as they
    work."""
    min_problems: NonNegativeInt = 100
    """Fewest hard problems of an epoch for which prompts are evolved (the paper's). With fewer there is no round, and
    the next epoch asks every problem plainly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AssignmentConfig:
    """How templates are given to the rollouts of a hard problem."""

    num_plain: NonNegativeInt = 2
    """Rollouts of a templated group that ask plainly. They keep the plain behaviour on-policy and give the group
    baseline failures to compare with. The authors reserve none."""
    same_template_in_group: bool = False
    """Whether all templated rollouts of a group share one drawn template (the paper's ablation). False: each draws its
    own."""
    weight: Literal["score", "transfer"] = "score"
    """What a template is drawn by. `score`: its mean development reward (the paper's). `transfer`: the score times
    exp(min(D, 0) / 0.3), D being how much less likely its solutions are without it, mean log pi(y|x) - log pi(y|x,z)
    per token in nats: what the plain policy nearly writes itself transfers better (HiLL, arXiv:2604.00698). It costs
    two prefills for each trial that solves its problem."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReflectionConfig:
    """Who writes new templates."""

    backend: str = "self"
    """Writer of new templates. `openai`: any OpenAI-compatible endpoint (the paper's Teacher-Ref). `self`: the frozen
    initial policy on an SGLang server of its own (Self-Ref). `phrasebook`: recombines the phrases of a file, for
    machines without a language model. Or one's own: an entry point of `megatron_p2o.reflectors`,
    `package.module:callable` or `path/to/file.py:callable`, called as (request)."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of one's own backend. An argument called `..._env` names an environment variable that holds a
    secret."""
    base_url: str | None = None
    """Address of the `openai` backend, e.g. https://host/v1."""
    model: str | None = None
    """Model name that the `openai` backend is asked for."""
    api_key_env: str = "P2O_REFLECTION_API_KEY"
    """Environment variable that holds the key of the `openai` backend. The key itself is never in a file."""
    phrases: str | None = None
    """File of the `phrasebook` backend, one phrase per line."""
    task_description: str | None = None
    """What reflection is told about the task: a text, or a file if it ends in .txt or .md. It also sees the feedback of
    the reward function. None: what `grading.function: math` asks for, a final answer in a box; with other functions
    nothing but the judged answers."""
    temperature: NonNegativeFloat | None = 0.6
    """Sampling temperature of replies. None leaves it out of the request, for models that accept only their own."""
    max_tokens: PositiveInt | None = 2048
    """Longest reply in tokens, reasoning included; a reply that is cut off gives no template. None leaves it out of the
    request."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, e.g. `{max_completion_tokens: 8192, reasoning_effort: low}`, with `max_tokens`
    and `temperature` null for models that refuse these."""
    timeout_s: Seconds = 120.0
    """Longest wait for a reply in seconds."""
    max_retries: NonNegativeInt = 4
    """Retries of one call, with exponential back-off. If all fail, evolution pauses and says so."""


GEPA_BUDGETS = (
    *(("light", 6), ("medium", 12), ("heavy", 18)),
    *(("heavy_2", 36), ("heavy_3", 54), ("heavy_4", 72), ("heavy_16", 288)),
)
"""Names of budgets, and the candidates that each is meant to try. The last four are the authors'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvolutionConfig:
    """GEPA beside training."""

    enabled: bool = True
    """Whether templates are evolved and used. False is plain GRPO."""
    templates_file: str | None = None
    """File of templates that take the place of a search: after an epoch each hard problem gets some of them, drawn at
    random, and nothing is sampled to choose them. One template a line; if the name ends in .json, a JSON list of texts,
    or an object that has such a list for each task, "" for all tasks. A template that holds a gold answer of a training
    problem is refused. None: templates are evolved."""
    plain_rollouts: PositiveInt | None = None
    """Rollouts that take the place of a search: the groups of an epoch's hard problems get so many further plain
    rollouts, all of them together, in the next epoch. They are trained on, and there are no templates: GRPO that spends
    on the hard problems what evolution would. None: templates are evolved."""
    beside_training: bool = True
    """Whether a round runs in the slots that training leaves idle; its library is used from the next step after it
    ended. False waits for each round, as the authors do: slower, but a run can be repeated exactly."""
    max_slowdown: NonNegativeFloat = 1.0
    """Share by which evolution may lengthen the decode steps of an engine that samples for training. What its requests
    take is learnt from the run; until then this bounds how many of them an engine runs for each request of training.
    Nor does it run more than its KV cache has room for beside training. Engines that have finished their rollouts of a
    step run as many as there is room for, with 0 these alone. A request that becomes too much is paused, keeps its
    tokens, and goes on from them. `docs/evolution.md` shows a simulation, from which the default is."""
    max_version_gap: NonNegativeInt = 2
    """Largest number of training steps between the rollouts by which a template is preferred to its parent. Where it is
    larger, the older side is sampled again. It matters beside training only; otherwise the policy does not change
    during a round."""
    rules: str = "asynchronous"
    """Search rules of a round. `reference`: the authors' lock-step rules exactly. `asynchronous`: lineages advance on
    their own. `single_turn`: no search; reflection writes one template for each hard problem from a plain response to
    it, which is then asked through it, untried (the paper's ablation). Or one's own, an async def called as (round_):
    `package.module:callable`, `path/to/file.py:callable`."""
    budget: Annotated[int, Range(at_least=1, names=GEPA_BUDGETS)] = 72
    """Candidates that a round is meant to try; GEPA's automatic budget makes a number of rollouts of it. A file may
    write the names of GEPA and of the authors. 72 (`heavy_4`) is the paper's: 11,040 rollouts at `dev_size` 300."""
    max_rollouts: PositiveInt | None = None
    """Rollouts with which a round scores candidates, instead of the number that `evolution.budget` gives. None: that
    number."""
    dev_size: PositiveInt = 300
    """Problems that score candidates (the paper's 300); the rest of the hard set gives feedback. Small hard sets are
    split by the authors' rules."""
    num_lineages: PositiveInt = 16
    """Lines of templates that evolve side by side (the paper's)."""
    minibatch_size: PositiveInt = 3
    """Feedback problems by which a new template is compared with its parent (the paper's)."""
    trial_temperature: NonNegativeFloat = 0.0
    """Sampling temperature at which a round scores templates. 0 is greedy, as the authors; training samples at
    `rollout.temperature`."""
    warm_start: bool = True
    """Whether a round begins with the last library's templates. The authors begin with the empty template alone."""
    guard_leaks: bool = True
    """Whether to refuse templates that contain a gold answer of their feedback, and never to pair a template with such
    a problem, but for `evolution.rules: single_turn`, where it is the problem that the template is written for."""
    plain_control: bool = False
    """Whether to sample the development problems plainly after a round, as often as the round did: this measures what
    luck alone solves."""
    max_template_tokens: PositiveInt = 1024
    """Longest addition of a template to a prompt, in tokens; a longer template is refused and counted. One of 16 times
    as many characters is refused before it is tokenized."""
    round_timeout_s: Seconds = 43200.0
    """Longest round in seconds: a backstop, because the budget of rollouts ends a round. A round that takes longer is
    cut off and what it has is used. The log, the metrics and the report say so, because its result then depends on the
    speed of the machine."""
    reflection: ReflectionConfig = field(default_factory=ReflectionConfig)
    """Settings of the writer of new templates."""

    @property
    def searches(self) -> bool:
        """Whether rounds search for templates: not where there are none, a file gives them, or `plain_rollouts` are
        sampled instead."""
        return self.enabled and self.templates_file is None and self.plain_rollouts is None
