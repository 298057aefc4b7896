"""The effect of a change at a resume, for each setting and each file behind the settings: one table.

`run.resume.resumption` applies it. A setting that is in no class fails a test.
"""

from collections.abc import Mapping
from typing import Literal

Effect = Literal["none", "step", "round", "evaluation", "order", "problems", "refused"]
"""`none`: no result depends on it. `step`, `evaluation`: takes effect with the next one. `round`: in
rounds of prompt evolution. `order`: the order in
which an epoch asks its problems depends on it, so it takes effect where that can be said exactly and is refused
elsewhere. `problems`: what counts is the problems it leads to, and those are compared. `refused`: what the checkpoint
holds means nothing else under another value."""

WHEN: Mapping[Effect, str] = {
    "none": "no result depends on it, or rounding alone",
    "step": "from the next step on",
    "round": "in prompt evolution from now on; a round that has begun begins anew where its rules change",
    "evaluation": "from the next evaluation on",
    "problems": "through the problems that it leads to",
}


def _in(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


TASKS = "data.train"

MAPPINGS = (
    TASKS,
    "sglang",
    "megatron",
    "data.evaluation",
    "evolution.reflection.extra_body",
    "evolution.reflection.arguments",
    "grading.arguments",
    "grading.functions",
    "logging.sinks",
)
"""Settings whose keys are free."""

OF_CLASS: Mapping[Effect, tuple[str, ...]] = {
    "none": (
        *("preset", "model.path", "model.layer_backend", "grading.num_workers"),
        *_in("run", "name directory readable_by"),
        *_in("parallel", "tensor pipeline virtual_pipeline context data sequence timeout_s command_timeout_s"),
        *_in("rollout", "num_engines tensor_parallel max_running_requests max_total_tokens startup_timeout_s"),
        *_in("rollout", "max_restarts refresh_bucket_mib weight_transfer verify_every release_memory stall_timeout_s"),
        *_in("head", "kernel weight_grad"),
        "optimizer.lend",
        *_in("schedule", "save_every_steps keep_checkpoints"),
        *_in("logging", "console wandb_project tensorboard mlflow_experiment trackio_project rollouts_every_steps"),
        *_in("logging", "sinks profile_update"),
    ),
    "step": (
        *_in("model", "enable_thinking template_date"),
        *_in("data", "question_format system_prompt max_prompt_tokens hints_field demonstrations_field"),
        *_in("rollout", "group_size temperature top_p max_new_tokens request_timeout_s deterministic"),
        *_in("grading", "function functions arguments deadline_s timeout_s memory_limit_mib"),
        *_in("hard", "max_solved solved_at counted"),
        *_in("advantage", "estimator baseline overlong_tokens"),
        *_in("objective", "context distill_beta ratio_low ratio_high ratio_widening ratio_anneal_steps ratio_form"),
        *_in("objective", "surrogate clip_low clip_high dual_clip"),
        *_in("objective", "normalization entropy_coefficient drop_zero_advantage drop_failed_templated"),
        *_in("objective", "kl_coefficient kl_estimator kl_as drop_truncated"),
        *_in("logprobs", "recompute importance_cap"),
        *_in("alarms", "mismatch mismatch_rise mismatch_action forgotten ratio_mask_dropped undecided"),
        *_in("optimizer", "lr beta1 beta2 eps weight_decay warmup_steps warmup_share lr_decay min_lr"),
        *_in("optimizer", "clip_grad micro_batch_tokens"),
        *_in("schedule", "problems_per_update max_batches_per_step epochs max_steps max_tokens max_hours"),
        *("sglang", "megatron"),
    ),
    "round": (
        *("hard.min_problems", "assignment.num_plain", "assignment.same_template_in_group", "assignment.weight"),
        *_in(
            "evolution",
            "enabled beside_training max_slowdown max_version_gap rules budget max_rollouts dev_size num_lineages",
        ),
        *_in("evolution", "minibatch_size trial_temperature warm_start guard_leaks plain_control"),
        *_in("evolution", "max_template_tokens round_timeout_s templates_file plain_rollouts"),
        *_in(
            "evolution.reflection", "backend base_url model api_key_env phrases task_description temperature max_tokens"
        ),
        *_in("evolution.reflection", "timeout_s max_retries extra_body arguments"),
    ),
    "evaluation": (
        "data.evaluation",
        *_in("evaluation", "every_steps num_samples temperature at_start"),
        *_in("evaluation", "with_best_template best_set best_metric"),
    ),
    "order": ("run.seed", "schedule.problems_per_step", "data.curriculum", "data.curriculum_min_weight"),
    "problems": _in("data", "train id_field question_field answer_field skip_bad_rows"),
    "refused": ("model.dtype", "parallel.distributed_optimizer"),
}
"""Every setting by class. A mapping with free keys (`sglang`, `data.evaluation`) stands for all of them."""

ASKED_AND_GRADED = ("hints_field", "demonstrations_field", "question_format", "system_prompt", "grading")
"""What a task of `data.train` may have of its own and which decides nothing about which problems there are."""

TOKENIZER = "tokenizer"
TOKENIZER_SETTINGS = "tokenizer_config.json"
CHAT_TEMPLATE = "chat template"
GENERATION = "generation_config.json"
INITIAL_WEIGHTS = "weights of model.path"

OF_FILE: Mapping[str, Effect] = {
    TOKENIZER: "refused",
    TOKENIZER_SETTINGS: "step",
    CHAT_TEMPLATE: "step",
    GENERATION: "step",
    INITIAL_WEIGHTS: "step",
    "data.train": "problems",
    "data.evaluation": "evaluation",
    "evolution.reflection.phrases": "round",
    "evolution.templates_file": "round",
}
"""The same of files: those of `model.path`, and those that settings name. The model's sizes are compared one by one.
Its weights count only where a KL term compares the policy with them: a resumed run has the checkpoint's."""

_EFFECTS: Mapping[str, Effect] = {name: effect for effect, names in OF_CLASS.items() for name in names}


def effect_of(name: str) -> Effect:
    """Return the class of a setting by its dotted name. Raises `KeyError` when it is in none."""
    mapping = next((known for known in MAPPINGS if name.startswith(f"{known}.")), name)
    if mapping == TASKS and name.split(".")[3:] == ["description"]:
        return "round"
    if mapping == TASKS and name.split(".")[3:4] in ([each] for each in ASKED_AND_GRADED):
        return "step"
    return _EFFECTS[mapping]


def effect_of_file(name: str) -> Effect:
    """Return the class of a file by its name in `made_with.MadeWith.files`."""
    mapping = next((known for known in MAPPINGS if name.startswith(f"{known}.")), name)
    return OF_FILE[mapping]
