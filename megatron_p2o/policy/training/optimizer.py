"""Megatron's optimizer and schedule as this trainer uses them: AdamW, warm-up and decay, guarded steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import utils as megatron_utils
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, clip_grads, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_p2o.config.tree import OptimizerConfig
from megatron_p2o.policy.model.model import PolicyModel
from megatron_p2o.policy.training.lending import Lending
from megatron_p2o.policy.training.megatron_settings import NO_OVERRIDES, MegatronOverrides
from megatron_p2o.types import UpdateOutcome

FOREVER = 2**31 - 1
"""Steps of a schedule, or of a part of it, that has no end."""

GROUP_STATE = ("params", "step")
"""What a group of Adam's parameters holds besides settings; a fused Adam keeps its step there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutcome:
    """What became of one optimizer step; the same on every rank."""

    grad_norm: float
    """Norm of the whole gradient before clipping."""
    outcome: UpdateOutcome


class Optimization:
    """The model under data parallelism with its optimizer and schedule; owns gradients and optimizer state."""

    def __init__(
        self,
        models: Sequence[PolicyModel],
        config: TransformerConfig,
        settings: OptimizerConfig,
        *,
        is_sharded: bool,
        overrides: MegatronOverrides = NO_OVERRIDES,
    ) -> None:
        """Wrap this rank's stages. Collective.

        Their weights must be loaded already, because the optimizer's float32 copies are made here.

        Args:
            is_sharded: `parallel.distributed_optimizer`.
            overrides: what `megatron` says about data parallelism and the optimizer.
        """
        _take_norms_without_waiting()
        self.modules = _data_parallel(models, config, is_sharded=is_sharded, overrides=overrides)
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            megatron_optimizer_config(settings, config, is_sharded=is_sharded, overrides=overrides),
            list(self.modules),
        )
        self._rates = settings
        self._num_planned = FOREVER
        self.scheduler = self._schedule()
        if settings.lends_state:
            self.fill_state()
        self.lending = Lending(self.modules, self.optimizers, settings)
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss

    def _schedule(self) -> OptimizerParamScheduler:
        """Return the schedule of the rates; it is also what exempts the norms from weight decay."""
        rates = self._rates
        num_warmup = max(rates.warmup_steps, math.ceil(rates.warmup_share * self._num_planned))
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=rates.lr / (num_warmup + 1),
            max_lr=rates.lr,
            min_lr=rates.min_lr,
            lr_warmup_steps=num_warmup,
            # At the first step behind the run's last one the rate would be `min_lr`.
            lr_decay_steps=max(self._num_planned, num_warmup + 1),
            lr_decay_style=rates.lr_decay,
            start_wd=rates.weight_decay,
            end_wd=rates.weight_decay,
            wd_incr_steps=FOREVER,
            wd_incr_style="constant",
        )

    def plan(self, num_updates: int) -> None:
        """Stretch the schedule over this number of optimizer steps, including those already done."""
        num_done = self.scheduler.num_steps
        self._num_planned = max(1, num_updates)
        self.scheduler = self._schedule()
        self.scheduler.step(increment=num_done)

    def settings(self) -> list[dict[str, Any]]:
        """Return the settings of each parameter group: rates, decay, betas and eps, without parameters and step."""
        return [
            {name: value for name, value in group.items() if name not in GROUP_STATE}
            for group in self.optimizer.param_groups
        ]

    def resume(self, settings: Sequence[Mapping[str, Any]], num_steps: int) -> None:
        """Continue after `num_steps` steps with this run's settings instead of the checkpoint's. `settings`: the result
        of `settings` before the optimizer's state was loaded. Warm-up counts from the run's first step.
        """
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.scheduler.num_steps = num_steps
        self.scheduler.step(increment=0)

    @property
    def learning_rate(self) -> float:
        """The rate the next step uses.

        With N steps planned and W of them warm-up, step k (from 0) uses lr (k + 1) / (W + 1) for k < W; then, with
        d = (k - W) / (N - W): min_lr + (lr - min_lr) (1 - d), or ... (1 + cos(pi d)) / 2; min_lr from step N on.

        Raises:
            RuntimeError: it depends on the number of steps, and none has been planned.
        """
        rates = self._rates
        if self._num_planned == FOREVER and (rates.lr_decay != "constant" or rates.warmup_share > 0):
            raise RuntimeError("the learning rate depends on the number of updates: call plan_updates first")
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def optimizers(self) -> list[Any]:
        """Megatron's optimizers, one for each kind of parameters."""
        return list(getattr(self.optimizer, "chained_optimizers", [self.optimizer]))

    def fill_state(self) -> None:
        """Give Adam the state it makes at its first step, where it has none yet."""
        for optimizer in self.optimizers:
            if not distrib_optimizer.HAVE_APEX_OR_TE:
                _fill_torch_adam_state(optimizer.optimizer)
            elif optimizer.init_state_fn is not None:
                optimizer.init_state_fn(optimizer.optimizer, optimizer.config)

    def clear_gradients(self) -> None:
        """Zero the gradient buffers, which must be here: see `lending`."""
        for module in self.modules:
            module.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self) -> StepOutcome:
        """Apply the accumulated gradient unless it is not finite, and advance the schedule. Collective."""
        with torch.no_grad():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
        self.lending.arrive()
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            self.optimizer.step()
        self.skip()
        return StepOutcome(grad_norm=grad_norm, outcome="applied" if is_finite else "non_finite")

    def close(self) -> None:
        """Take Megatron's hooks off the parameters' gradients. Nothing of this can be used afterwards.

        They hold the model and, by it, the process groups. Where something in the model still holds a graph of the
        parameters, such as a sharded optimizer's views of them or a router's probabilities, that is a cycle through
        C++, which no collector sees.
        """
        for module in self.modules:
            for accumulator in module.grad_accs:
                hooks = accumulator.register_hook(lambda *gradients: None).hooks_dict_ref()
                if hooks is not None:
                    hooks.clear()

    def gather_weights(self) -> None:
        """Gather the weights completely, for reading outside a forward pass. Collective.

        With `megatron.overlap_param_gather` a step leaves each data-parallel rank with its own part updated, and the
        next forward pass gathers the rest.
        """
        for module in self.modules:
            if module.ddp_config.overlap_param_gather:
                module.start_param_sync(force_sync=True)

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Make the weights whole, and have no forward pass inside gather them again: they may be others. Collective."""
        overlapped = [module for module in self.modules if module.ddp_config.overlap_param_gather]
        for module in overlapped:
            module.disable_forward_pre_hook()
        try:
            yield
        finally:
            for module in overlapped:
                module.enable_forward_pre_hook()

    def skip(self) -> None:
        """Advance the schedule without a step."""
        self.scheduler.step(increment=1)


def _fill_torch_adam_state(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if parameter not in adam.state:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _take_norms_without_waiting() -> None:
    """Replace megatron-core's own norm of the gradients, used without Transformer Engine and Apex: it fetches the norm
    of every tensor from the GPU, one after the other, twice a step.
    """
    if clip_grads.l2_norm_impl is megatron_utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _norm


def _norm(chunk_size: int, flags: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Return the norm [1] of all elements of the tensors of the first list, on their device."""
    return get_total_norm(lists[0]).reshape(1), None


def megatron_optimizer_config(
    settings: OptimizerConfig, config: TransformerConfig, *, is_sharded: bool, overrides: MegatronOverrides
) -> MegatronOptimizerConfig:
    """Return Megatron's configuration of AdamW; `is_sharded` is `parallel.distributed_optimizer`.

    Raises:
        RuntimeError: what `overrides` ask for is not installed here.
    """
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        params_dtype=config.params_dtype,
        bf16=config.bf16,
        use_distributed_optimizer=is_sharded,
        **overrides.optimizer,
    )


def data_parallel_config(*, is_sharded: bool, overrides: MegatronOverrides) -> DistributedDataParallelConfig:
    """Return Megatron's configuration of the gradients' reduction, in float32 unless `overrides` say otherwise."""
    return DistributedDataParallelConfig(
        **{"grad_reduce_in_fp32": True, "use_distributed_optimizer": is_sharded, **overrides.data_parallel}
    )


def _data_parallel(
    models: Sequence[PolicyModel], config: TransformerConfig, *, is_sharded: bool, overrides: MegatronOverrides
) -> Sequence[DistributedDataParallel]:
    """Return the stages with gradient buffers, and tell the pipeline schedule how it may overlap their reduction."""
    reduction = data_parallel_config(is_sharded=is_sharded, overrides=overrides)
    modules = [
        DistributedDataParallel(
            config,
            reduction,
            Float16Module(config, model) if config.bf16 else model,
            # The later chunks' gradients are ready at another time on each stage: one bucket each.
            disable_bucketing=chunk > 0,
        )
        for chunk, model in enumerate(models)
    ]

    def each(functions: list[Any]) -> Any:
        return functions if len(functions) > 1 else functions[0]

    if reduction.overlap_grad_reduce:
        config.no_sync_func = each([module.no_sync for module in modules])
    return modules
