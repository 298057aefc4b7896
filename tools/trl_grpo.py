"""Trains a policy with GRPO by TRL's trainer and times its phases: the peer of `bench_against_trl.py`.

    python tools/trl_grpo.py SETTINGS.json RESULT.json

Runs in TRL's environment and imports nothing of megatron_p2o. `SETTINGS.json` holds the fields of `Settings`;
`RESULT.json` gets what `bench_against_trl.py` compares.
"""

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

EVALUATED_AT_ONCE = 256
"""Problems whose responses are generated in one batch of an evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What both trainers of the benchmark are given."""

    model: str
    output: str
    train: str
    evaluation: str
    seed: int
    threads: int
    num_steps: int
    problems_per_step: int
    group_size: int
    samples_per_pass: int
    """Rollouts of one forward and backward pass."""
    temperature: float
    max_new_tokens: int
    lr: float
    evaluate_every_steps: int


def main() -> None:
    settings = Settings(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(settings.threads)
    trainer = make_trainer(settings)
    trainer.train()
    result = {
        "steps": trainer.steps,
        "accuracy": trainer.accuracy,
        "first_step": trainer.first_step,
        "began_at": trainer.began_at,
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


def make_trainer(settings: Settings) -> "TimedTrainer":
    """Return TRL's trainer with our objective: mean over all tokens of a step, no KL, one update on fresh rollouts."""
    rollouts = settings.problems_per_step * settings.group_size
    arguments = GRPOConfig(
        output_dir=settings.output,
        seed=settings.seed,
        use_cpu=True,
        bf16=False,
        max_steps=settings.num_steps,
        num_generations=settings.group_size,
        per_device_train_batch_size=settings.samples_per_pass,
        gradient_accumulation_steps=rollouts // settings.samples_per_pass,
        gradient_checkpointing=False,
        temperature=settings.temperature,
        max_completion_length=settings.max_new_tokens,
        loss_type="dapo",
        beta=0.0,
        scale_rewards="group",
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.num_steps,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return TimedTrainer(
        settings,
        model=AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        reward_funcs=boxed_reward,
        args=arguments,
        train_dataset=Dataset.from_list(conversations(settings.train)),
    )


def conversations(path: str) -> list[dict[str, Any]]:
    """Return the problems of a JSON lines file as TRL wants them."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]


def boxed_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """Return 1 for each completion whose last boxed answer is the gold one, word by word."""
    return [is_right(completion[0]["content"], gold) for completion, gold in zip(completions, answer, strict=True)]


def is_right(response: str, gold: str) -> float:
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", response)
    return float(bool(boxed) and boxed[-1].split() == gold.split())


class TimedTrainer(GRPOTrainer):
    """TRL's trainer with a clock around its phases; what it computes is unchanged."""

    def __init__(self, settings: Settings, **arguments: Any) -> None:
        self.steps: list[dict[str, float]] = []
        """Seconds of each step's phases, and what it sampled."""
        self.accuracy: dict[int, float] = {}
        """Share of right responses to the held-out problems, by step."""
        self.first_step: dict[str, Any] = {}
        """The first step's rollouts and its gradient norm, to be compared."""
        self.began_at = 0.0
        """Unix time of the first step's beginning."""
        self._current: dict[str, float] = {}
        super().__init__(callbacks=[StepClock(self, settings)], **arguments)

    def _generate(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        generated = super()._generate(*arguments, **named)
        self._current["generate_s"] = time.perf_counter() - begun
        return generated

    def _calculate_rewards(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        rewards = super()._calculate_rewards(*arguments, **named)
        self._current["grade_s"] = time.perf_counter() - begun
        self._current["reward_mean"] = float(rewards.mean())
        if not self.first_step:
            self.first_step["rewards"] = rewards.sum(dim=1).tolist()
        return rewards

    def _generate_and_score_completions(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        scored = super()._generate_and_score_completions(*arguments, **named)
        self._current["rollout_s"] = time.perf_counter() - begun
        self._current["num_rollouts"] = len(scored["completion_mask"])
        self._current["response_tokens"] = int(scored["completion_mask"].sum())
        self._current["passed_tokens"] = scored["prompt_ids"].numel() + scored["completion_ids"].numel()
        if "prompts" not in self.first_step:
            self.first_step["prompts"] = kept(scored["prompt_ids"], scored["prompt_mask"])
            self.first_step["responses"] = kept(scored["completion_ids"], scored["completion_mask"])
        return scored


def kept(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[chosen.bool()].tolist() for row, chosen in zip(ids, mask, strict=True)]


class StepClock(TrainerCallback):
    """Times whole steps, and measures the policy between them."""

    def __init__(self, trainer: TimedTrainer, settings: Settings) -> None:
        self._trainer = trainer
        self._settings = settings
        self._problems = conversations(settings.evaluation)
        self._begun = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()
        if not self._trainer.steps:
            self._trainer.began_at = time.time()

    def on_step_end(self, _arguments: Any, state: Any, _control: Any, **__: Any) -> None:
        current = self._trainer._current
        current["step_s"] = time.perf_counter() - self._begun
        current["update_s"] = current["step_s"] - current["rollout_s"]
        self._trainer.steps.append(dict(current))
        if state.global_step % self._settings.evaluate_every_steps == 0:
            self._trainer.accuracy[state.global_step] = self.measured()

    def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, Any], **__: Any) -> None:
        if "grad_norm" in logs and "grad_norm" not in self._trainer.first_step:
            self._trainer.first_step |= {"grad_norm": float(logs["grad_norm"]), "loss": float(logs["loss"])}

    @torch.no_grad()
    def measured(self) -> float:
        """Return the share of right responses, one to each held-out problem at the training temperature."""
        trainer, tokenizer = self._trainer, self._trainer.processing_class
        rights: list[float] = []
        for begin in range(0, len(self._problems), EVALUATED_AT_ONCE):
            part = self._problems[begin : begin + EVALUATED_AT_ONCE]
            inputs = tokenizer.apply_chat_template(
                [problem["prompt"] for problem in part],
                add_generation_prompt=True,
                padding=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = trainer.model.generate(**inputs, generation_config=trainer.generation_config)
            responses = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            rights += [is_right(text, problem["answer"]) for text, problem in zip(responses, part, strict=True)]
        return sum(rights) / len(rights)


if __name__ == "__main__":
    main()
