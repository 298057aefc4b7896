"""The policy a second time, as plainly as possible: transformers, torch's AdamW, one sample after the other.

What Megatron computes under any layout must equal this. R tokens of one response, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_p2o.config.tree import (
    Config,
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    one_task,
)
from megatron_p2o.types import Logprobs, TrainSample


def policy_config(
    directory: Path,
    *,
    parallel: ParallelConfig | None = None,
    objective: ObjectiveConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    dtype: str = "float32",
) -> Config:
    """Return a configuration that trains the model in `directory`; what is not given is its default.

    The default optimizer has a large `eps`, because Adam divides by it where gradients are nearly zero and would blow
    up rounding errors, and small micro-batches, so that there are several.
    """
    return Config(
        run=RunConfig(name="test"),
        model=ModelConfig(path=str(directory), dtype=dtype),  # pyright: ignore[reportArgumentType]
        data=DataConfig(train=one_task("")),
        parallel=parallel or ParallelConfig(timeout_s=30.0),
        objective=objective or ObjectiveConfig(),
        optimizer=optimizer or OptimizerConfig(lr=1e-3, eps=1e-4, weight_decay=0.1, micro_batch_tokens=48),
    )


def random_samples(
    response_lengths: Sequence[int], *, vocab_size: int, seed: int = 0, num_context_tokens: int = 5
) -> list[TrainSample]:
    """Return samples of random tokens with advantages of both signs; every second one is templated.

    Token 0 is left out: it is the tiny model's padding, whose embedding transformers never gives a gradient.
    """
    generator = np.random.default_rng(seed)
    return [
        TrainSample(
            context_ids=generator.integers(1, vocab_size, num_context_tokens + index % 3).astype(np.int32),
            response_ids=generator.integers(1, vocab_size, length).astype(np.int32),
            advantage=float(generator.normal()),
            sampling_logprobs=generator.uniform(-9.0, -3.0, length).astype(np.float32),
            is_templated=index % 2 == 1,
            key=(f"problem-{index}", 0),
        )
        for index, length in enumerate(response_lengths)
    ]


class PolicyOracle:
    """The same model, loss and optimizer steps in float32 on one process."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
        settings = config.optimizer
        norms = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
        )
        self.num_steps = 0

    def change(self, settings: OptimizerConfig) -> None:
        """Take the steps to come with other settings; moments and the number of steps stay."""
        self.config = replace(self.config, optimizer=settings)
        for group in self.optimizer.param_groups:
            is_decayed = group["weight_decay"] > 0
            group["weight_decay"] = settings.weight_decay if is_decayed else 0.0
            group["betas"], group["eps"] = (settings.beta1, settings.beta2), settings.eps

    def logprobs_R(self, sample: TrainSample) -> Tensor:
        """Return log pi(response | context) at the sampling temperature, [R], differentiable."""
        return self.logprobs_and_entropies_R(sample)[0]

    def logprobs_and_entropies_R(self, sample: TrainSample) -> tuple[Tensor, Tensor]:
        """Return the log-probs, and the entropies of the distributions of the same tokens; both differentiable."""
        ids = torch.from_numpy(np.concatenate([sample.context_ids, sample.response_ids]).astype(np.int64))
        logits = self.model(ids[None]).logits[0] / self.config.rollout.temperature
        targets = ids[len(sample.context_ids) :]
        logprobs_RV = logits[len(sample.context_ids) - 1 : -1].log_softmax(-1)
        entropies_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
        return logprobs_RV.gather(1, targets[:, None]).squeeze(1), entropies_R

    def logprobs(self, samples: Sequence[TrainSample]) -> list[Logprobs]:
        with torch.no_grad():
            return [self.logprobs_R(sample).numpy() for sample in samples]

    def update(
        self, samples: Sequence[TrainSample], old_logprobs: Sequence[Logprobs] | None, num_loss_tokens: int
    ) -> tuple[float, float]:
        """Take one optimizer step; return its loss and the gradient norm before clipping."""
        objective, settings = self.config.objective, self.config.optimizer
        total, num_kept = torch.zeros(()), 0.0
        for index, sample in enumerate(samples):
            logprobs_R, entropies_R = self.logprobs_and_entropies_R(sample)
            old_R = logprobs_R.detach() if old_logprobs is None else torch.from_numpy(old_logprobs[index])
            losses_R, weights_R = token_losses(logprobs_R, old_R, sample, objective)
            losses_R = losses_R - objective.entropy_coefficient * entropies_R
            if sample.reference_logprobs is not None:
                difference_R = torch.from_numpy(sample.reference_logprobs) - logprobs_R
                k3_R = difference_R.exp() - 1 - difference_R
                estimate_R = k3_R if objective.kl_estimator == "k3" else difference_R.square() / 2
                losses_R = losses_R + objective.kl_coefficient * estimate_R
            total = total + (losses_R * weights_R).sum()
            num_kept += float((weights_R != 0).sum())
        loss = total / (num_kept if objective.normalization == "kept_token_mean" else num_loss_tokens)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_grad)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (self.num_steps + 1) / (settings.warmup_steps + 1))
        self.optimizer.step()
        self.num_steps += 1
        return float(loss.detach()), float(norm)

    def weights(self) -> dict[str, Tensor]:
        """Return copies by Hugging Face name; a tied head is named once."""
        tied = self.model.config.tie_word_embeddings
        state = self.model.state_dict()
        return {name: value.clone() for name, value in state.items() if not (tied and name == "lm_head.weight")}


def token_losses(
    logprobs_R: Tensor, old_R: Tensor, sample: TrainSample, objective: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """Return the loss and the weight of each token; for the contexts `replace`, `importance` and `ratio_mask`."""
    first_R = old_R
    if objective.context == "importance":
        old_R = torch.from_numpy(sample.sampling_logprobs)
    weights_R = torch.ones_like(old_R) if sample.loss_weights is None else torch.from_numpy(sample.loss_weights)
    if objective.context == "ratio_mask" and sample.is_templated:
        rho_R = (first_R - torch.from_numpy(sample.sampling_logprobs)).exp()
        is_inside_R = (rho_R >= objective.ratio_low) & (rho_R <= objective.ratio_high)
        beyond_R = rho_R.clamp(objective.ratio_low, objective.ratio_high) / rho_R
        outside_R = {
            "hard": torch.zeros_like(rho_R),
            "one_sided": torch.full_like(rho_R, float(sample.advantage > 0)),
            "soft": beyond_R,
            "fading": torch.minimum(beyond_R, 1 / beyond_R),
        }[objective.ratio_form]
        weights_R = weights_R * torch.where(is_inside_R, 1.0, outside_R)
    return surrogate_losses(logprobs_R, old_R, sample.advantage, objective), weights_R


def surrogate_losses(logprobs_R: Tensor, old_R: Tensor, advantage: float, objective: ObjectiveConfig) -> Tensor:
    """Return the policy gradient's loss of each token of one response."""
    if objective.surrogate == "clone":
        return -advantage * logprobs_R
    ratio_R = (logprobs_R - old_R).exp()
    if objective.surrogate == "gspo":
        # One number for all tokens, with the gradient of each token's own log-prob: GSPO-token, eq. 14.
        ratio_R = (logprobs_R - old_R).mean().exp().detach() * (logprobs_R - logprobs_R.detach()).exp()
    clipped_R = ratio_R.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.surrogate == "cispo":
        return -advantage * clipped_R.detach() * logprobs_R
    losses_R = torch.maximum(-advantage * ratio_R, -advantage * clipped_R)
    if advantage < 0 and objective.surrogate == "ppo":
        losses_R = losses_R.clamp(max=-objective.dual_clip * advantage)
    return losses_R
