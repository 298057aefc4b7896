"""Weights between Hugging Face names and this rank's part of the Megatron model; exact in both directions.

A Megatron parameter is made of one or several Hugging Face tensors. Each is cut over the tensor ranks along one
dimension, or whole on every rank, and the cut parts are joined on the rank.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_p2o.policy.model.architecture import Architecture
from megatron_p2o.policy.model.model import PolicyModel
from megatron_p2o.policy.model.parallel import pipeline_group, tensor_group
from megatron_p2o.policy.weights.hf_directory import WeightFiles, first_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterMapping:
    """Which Hugging Face tensors a parameter is made of."""

    names: tuple[str, ...]
    cut_dimension: int | None
    """Dimension cut over the tensor ranks; None: every rank holds all of it."""
    joined: Literal["alone", "stacked", "grouped"] = "alone"
    """`stacked`: one after the other. `grouped`: for each key/value group its query heads, key head and value head."""


def _whole(name: str) -> ParameterMapping:
    return ParameterMapping(names=(name,), cut_dimension=None)


def _grouped(suffix: str) -> ParameterMapping:
    names = tuple(f"self_attn.{part}_proj.{suffix}" for part in "qkv")
    return ParameterMapping(names=names, cut_dimension=0, joined="grouped")


def _gate_and_up(prefix: str) -> ParameterMapping:
    names = (f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
    return ParameterMapping(names=names, cut_dimension=0, joined="stacked")


MODEL_MAPPINGS = {
    "embedding.word_embeddings.weight": ParameterMapping(names=("model.embed_tokens.weight",), cut_dimension=0),
    "output_layer.weight": ParameterMapping(names=("lm_head.weight",), cut_dimension=0),
    "decoder.final_layernorm.weight": _whole("model.norm.weight"),
}
"""Parameters outside the layers."""

LAYER_MAPPINGS = {
    "input_layernorm.weight": _whole("input_layernorm.weight"),
    "self_attention.linear_qkv.layer_norm_weight": _whole("input_layernorm.weight"),
    "self_attention.linear_qkv.weight": _grouped("weight"),
    "self_attention.linear_qkv.bias": _grouped("bias"),
    "self_attention.q_layernorm.weight": _whole("self_attn.q_norm.weight"),
    "self_attention.k_layernorm.weight": _whole("self_attn.k_norm.weight"),
    "self_attention.linear_proj.weight": ParameterMapping(names=("self_attn.o_proj.weight",), cut_dimension=1),
    "pre_mlp_layernorm.weight": _whole("post_attention_layernorm.weight"),
    "mlp.linear_fc1.layer_norm_weight": _whole("post_attention_layernorm.weight"),
    "mlp.linear_fc1.weight": _gate_and_up("mlp"),
    "mlp.linear_fc2.weight": ParameterMapping(names=("mlp.down_proj.weight",), cut_dimension=1),
    "mlp.router.weight": _whole("mlp.gate.weight"),
    "mlp.experts.local_experts.{expert}.linear_fc1.weight": _gate_and_up("mlp.experts.{expert}"),
    "mlp.experts.linear_fc1.weight{expert}": _gate_and_up("mlp.experts.{expert}"),
    "mlp.experts.local_experts.{expert}.linear_fc2.weight": ParameterMapping(
        names=("mlp.experts.{expert}.down_proj.weight",), cut_dimension=1
    ),
    "mlp.experts.linear_fc2.weight{expert}": ParameterMapping(
        names=("mlp.experts.{expert}.down_proj.weight",), cut_dimension=1
    ),
}
"""Parameters of a Megatron layer, with the names inside a Hugging Face layer: every family, and both the layers of
megatron-core alone and those of Transformer Engine (norms inside the linear layers, experts in one module)."""


def mapping_of(parameter_name: str, layer_offset: int, ties_embeddings: bool) -> ParameterMapping:
    """Return where a parameter of this pipeline stage comes from; `layer_offset` is the stage's first layer."""
    if parameter_name == "output_layer.weight" and ties_embeddings:
        return MODEL_MAPPINGS["embedding.word_embeddings.weight"]
    if parameter_name in MODEL_MAPPINGS:
        return MODEL_MAPPINGS[parameter_name]
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter_name)
    assert layer is not None, parameter_name
    expert = re.search(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$", layer[2])
    place = layer[2] if expert is None else f"{layer[2][: expert.start()]}{{expert}}{layer[2][expert.end() :]}"
    mapping = LAYER_MAPPINGS[place]
    prefix = f"model.layers.{int(layer[1]) + layer_offset}"
    number = "" if expert is None else expert[0]
    return replace(mapping, names=tuple(f"{prefix}.{name.replace('{expert}', number)}" for name in mapping.names))


def join_parts(parts: Sequence[Tensor], mapping: ParameterMapping, num_groups: int) -> Tensor:
    """Return the parameter made of this rank's cut of each part; `num_groups` key/value groups are on this rank."""
    if mapping.joined == "grouped":
        return torch.cat([part.unflatten(0, (num_groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts))


def split_parts(parameter: Tensor, mapping: ParameterMapping, num_groups: int, head_dim: int) -> list[Tensor]:
    """Return the parts that `join_parts` was given."""
    if mapping.joined == "grouped":
        grouped = parameter.unflatten(0, (num_groups, -1))
        sizes = [grouped.shape[1] - 2 * head_dim, head_dim, head_dim]
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]
    return list(parameter.chunk(len(mapping.names)))


@torch.no_grad()
def load_hf_weights(models: Sequence[PolicyModel], files: WeightFiles, architecture: Architecture) -> None:
    """Copy the weights of a Hugging Face directory into this rank's stages. Local to the rank.

    Reads the headers of all files, so that every rank raises the same error, but only this rank's slices of the
    weights.

    Raises:
        ValueError: the tensors are not those of config.json, or hold a value that is not finite.
    """
    num_groups = _groups_per_rank(models[0])
    files.check(architecture.weight_shapes())
    for parameter_name, parameter, mapping in _parameters(models):
        parts = [_read_cut(files, name, mapping.cut_dimension) for name in mapping.names]
        check_finite(files.directory, dict(zip(mapping.names, parts, strict=True)))
        joined = join_parts(parts, mapping, num_groups)
        assert joined.shape == parameter.shape, parameter_name
        parameter.copy_(joined)


def diverged_weights(models: Sequence[PolicyModel]) -> list[str]:
    """Return the Hugging Face names of this rank's parameters that are not finite everywhere. Local to the rank."""
    names = [mapping.names for _, _, mapping in _parameters(models)]
    are_finite = _are_finite([parameter for _, parameter, _ in _parameters(models)])
    return [name for group, is_finite in zip(names, are_finite, strict=True) if not is_finite for name in group]


def check_finite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` that names the tensors of `directory` which are not finite everywhere."""
    are_finite = _are_finite(list(tensors.values()))
    broken = [name for name, is_finite in zip(tensors, are_finite, strict=True) if not is_finite]
    if broken:
        raise ValueError(
            f"model.path={directory}: {first_of(broken)} must be finite and holds NaN or infinite values: use an "
            "intact copy of the model"
        )


@torch.no_grad()
def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Return which tensors are finite everywhere; the device is waited for once."""
    # Smallest and largest value are NaN where any is. Unlike isfinite this takes no memory.
    extremes = [torch.stack(torch.aminmax(tensor.detach())) for tensor in tensors]
    return torch.stack(extremes).isfinite().all(dim=1).tolist() if extremes else []


def export_hf_weights(models: Sequence[PolicyModel], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of the whole model, on every rank alike.

    Collective: every rank must exhaust its iterator. One tensor at a time is gathered over the tensor ranks of its
    pipeline stage, which sends it to the other stages. The receiver may keep the tensors.
    """
    stages = pipeline_group()
    for stage in range(stages.size()):
        if stages.size() == 1:
            yield from _gathered(models)
        elif stage == stages.rank():
            yield from _sent(models, stages)
        else:
            yield from _received(stage, models[0], stages, architecture)


def _sent(models: Sequence[PolicyModel], stages: ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of this stage and send them to the others."""
    source = dist.get_rank()
    names = [name for _, mapping in _exported(models) for name in mapping.names]
    dist.broadcast_object_list([names], source, group=stages)
    for name, tensor in _gathered(models):
        dist.broadcast(tensor, source, group=stages)
        yield name, tensor


def _received(
    stage: int, model: PolicyModel, stages: ProcessGroup, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of another stage."""
    source = dist.get_global_rank(stages, stage)
    shapes, like = architecture.weight_shapes(), next(model.parameters())
    received: list[list[str]] = [[]]
    dist.broadcast_object_list(received, source, group=stages)
    for name in received[0]:
        tensor = like.new_empty(shapes[name], requires_grad=False)
        dist.broadcast(tensor, source, group=stages)
        yield name, tensor


def _gathered(models: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of this stage on every tensor rank."""
    num_groups, head_dim = _groups_per_rank(models[0]), models[0].config.kv_channels
    assert head_dim is not None
    for parameter, mapping in _exported(models):
        for name, part in zip(mapping.names, split_parts(parameter.data, mapping, num_groups, head_dim), strict=True):
            full = _gather(part.contiguous(), mapping.cut_dimension)
            is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            yield name, full[: models[0].real_vocab_size].contiguous() if is_vocabulary else full


def _exported(models: Sequence[PolicyModel]) -> Iterator[tuple[Tensor, ParameterMapping]]:
    """Yield the parameters of this stage but the last stage's copy of a tied embedding."""
    is_tied = models[0].share_embeddings_and_output_weights
    for name, parameter, mapping in _parameters(models):
        if not (is_tied and name == "output_layer.weight"):
            yield parameter, mapping


def _gather(part: Tensor, cut_dimension: int | None) -> Tensor:
    """Return a new tensor joined over the tensor ranks."""
    group = tensor_group()
    if cut_dimension is None or group.size() == 1:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=cut_dimension)


def _parameters(models: Sequence[PolicyModel]) -> Iterator[tuple[str, Tensor, ParameterMapping]]:
    for model in models:
        offset = get_transformer_layer_offset(model.config, model.vp_stage)
        for name, parameter in model.named_parameters():
            yield name, parameter, mapping_of(name, offset, model.share_embeddings_and_output_weights)


def _read_cut(files: WeightFiles, name: str, cut_dimension: int | None) -> Tensor:
    """Return this rank's cut; the last ranks' share of a vocabulary that does not divide ends in zeros."""
    if cut_dimension is None:
        return files.read(name)
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    full = files.shape(name)[cut_dimension]
    share = math.ceil(full / num_ranks)
    start = min(share * parallel_state.get_tensor_model_parallel_rank(), full)
    end = min(start + share, full)
    cut = files.read(name, cut_dimension, start, end)
    missing = share - (end - start)
    if missing == 0:
        return cut
    padding_shape = list(cut.shape)
    padding_shape[cut_dimension] = missing
    return torch.cat([cut, cut.new_zeros(padding_shape)], dim=cut_dimension)


def _groups_per_rank(model: PolicyModel) -> int:
    num_groups = model.config.num_query_groups
    assert num_groups is not None
    return num_groups // parallel_state.get_tensor_model_parallel_world_size()
