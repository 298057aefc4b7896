"""Weights between Hugging Face names and this rank's part of the Megatron model; exact in both directions.

A Megatron parameter is made of one or several Hugging Face tensors. Each is cut over the tensor ranks along one
dimension, or whole on every rank, and the cut parts are joined on the rank.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_p2o.policy.hf_directory import WeightFiles
from megatron_p2o.policy.model import PolicyModel
from megatron_p2o.policy.parallel import pipeline_group, tensor_group


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Which Hugging Face tensors a parameter is made of."""

    names: tuple[str, ...]
    cut_dimension: int | None
    """Dimension cut over the tensor ranks; None: every rank holds all of it."""
    joined: Literal["alone", "stacked", "grouped"] = "alone"
    """`stacked`: one after the other. `grouped`: for each key/value group its query heads, key head and value head."""


LAYER_ORIGINS = {
    "input_layernorm.weight": Origin(names=("input_layernorm",), cut_dimension=None),
    "self_attention.linear_qkv.weight": Origin(
        names=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), cut_dimension=0, joined="grouped"
    ),
    "self_attention.q_layernorm.weight": Origin(names=("self_attn.q_norm",), cut_dimension=None),
    "self_attention.k_layernorm.weight": Origin(names=("self_attn.k_norm",), cut_dimension=None),
    "self_attention.linear_proj.weight": Origin(names=("self_attn.o_proj",), cut_dimension=1),
    "pre_mlp_layernorm.weight": Origin(names=("post_attention_layernorm",), cut_dimension=None),
    "mlp.linear_fc1.weight": Origin(names=("mlp.gate_proj", "mlp.up_proj"), cut_dimension=0, joined="stacked"),
    "mlp.linear_fc2.weight": Origin(names=("mlp.down_proj",), cut_dimension=1),
}
"""Parameters of a Megatron layer, with the names inside a Hugging Face layer."""


def origin_of(parameter_name: str, layer_offset: int, ties_embeddings: bool) -> Origin:
    """Return where a parameter of this pipeline stage comes from; `layer_offset` is the stage's first layer."""
    if parameter_name == "embedding.word_embeddings.weight":
        return Origin(names=("model.embed_tokens.weight",), cut_dimension=0)
    if parameter_name == "output_layer.weight":
        name = "model.embed_tokens.weight" if ties_embeddings else "lm_head.weight"
        return Origin(names=(name,), cut_dimension=0)
    if parameter_name == "decoder.final_layernorm.weight":
        return Origin(names=("model.norm.weight",), cut_dimension=None)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter_name)
    assert match is not None, parameter_name
    origin = LAYER_ORIGINS[match[2]]
    prefix = f"model.layers.{int(match[1]) + layer_offset}"
    names = tuple(f"{prefix}.{part}.weight" for part in origin.names)
    return Origin(names=names, cut_dimension=origin.cut_dimension, joined=origin.joined)


def join_parts(parts: Sequence[Tensor], origin: Origin, num_groups: int) -> Tensor:
    """Return the parameter made of this rank's cut of each part; `num_groups` key/value groups are on this rank."""
    if origin.joined == "grouped":
        return torch.cat([part.unflatten(0, (num_groups, -1)) for part in parts], dim=1).flatten(0, 1)
    return torch.cat(list(parts))


def split_parts(parameter: Tensor, origin: Origin, num_groups: int, head_dim: int) -> list[Tensor]:
    """Return the parts that `join_parts` was given."""
    if origin.joined == "grouped":
        grouped = parameter.unflatten(0, (num_groups, -1))
        sizes = [grouped.shape[1] - 2 * head_dim, head_dim, head_dim]
        return [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]
    return list(parameter.chunk(len(origin.names)))


@torch.no_grad()
def load_hf_weights(model: PolicyModel, directory: Path) -> None:
    """Copy the weights of a Hugging Face directory into this rank's stage. Local to the rank.

    Raises:
        ValueError: the directory has no safetensors, lacks a tensor, or a shape does not fit config.json.
    """
    num_groups = _groups_per_rank(model)
    with WeightFiles(directory) as files:
        for parameter_name, parameter, origin in _parameters(model):
            parts = [_read_cut(files, name, origin.cut_dimension) for name in origin.names]
            joined = join_parts(parts, origin, num_groups)
            if joined.shape != parameter.shape:
                raise ValueError(
                    f"model.path={directory}: {' and '.join(origin.names)} give {tuple(joined.shape)} for "
                    f"{parameter_name}, but config.json asks for {tuple(parameter.shape)}"
                )
            parameter.copy_(joined)


def export_hf_weights(model: PolicyModel, control: ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Yield (Hugging Face name, full tensor) of the whole model on rank 0; nothing on other ranks.

    Collective: every rank must exhaust its iterator. One tensor at a time is gathered over the tensor ranks of the
    first data-parallel replica; later pipeline stages send theirs to rank 0. The receiver may keep the tensors.
    """
    if parallel_state.get_data_parallel_rank() != 0:
        return
    is_head = parallel_state.get_tensor_model_parallel_rank() == 0
    stages = pipeline_group()
    if stages.rank() == 0:
        for name, tensor in _gathered(model):
            if is_head:
                yield name, tensor
        if is_head:
            for stage in range(1, stages.size()):
                yield from _receive_stage(stage, model, stages, control)
    else:
        _send_stage(model, stages, control, is_head=is_head)


def _send_stage(model: PolicyModel, stages: ProcessGroup, control: ProcessGroup, *, is_head: bool) -> None:
    conductor = dist.get_global_rank(stages, 0)
    for name, tensor in _gathered(model):
        if is_head:
            dist.send_object_list([(name, tensor.shape)], conductor, group=control)
            dist.send(tensor, conductor, group=stages)
    if is_head:
        dist.send_object_list([None], conductor, group=control)


def _receive_stage(
    stage: int, model: PolicyModel, stages: ProcessGroup, control: ProcessGroup
) -> Iterator[tuple[str, Tensor]]:
    sender = dist.get_global_rank(stages, stage)
    like = next(model.parameters())
    while True:
        header: list[tuple[str, torch.Size] | None] = [None]
        dist.recv_object_list(header, sender, group=control)
        if header[0] is None:
            return
        name, shape = header[0]
        tensor = like.new_empty(shape, requires_grad=False)
        dist.recv(tensor, sender, group=stages)
        yield name, tensor


def _gathered(model: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the full tensors of this stage on every tensor rank."""
    num_groups, head_dim = _groups_per_rank(model), model.config.kv_channels
    assert head_dim is not None
    for parameter_name, parameter, origin in _parameters(model):
        if parameter_name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            continue
        for name, part in zip(origin.names, split_parts(parameter.data, origin, num_groups, head_dim), strict=True):
            full = _gather(part.contiguous(), origin.cut_dimension)
            is_vocabulary = name in ("model.embed_tokens.weight", "lm_head.weight")
            yield name, full[: model.real_vocab_size].contiguous() if is_vocabulary else full


def _gather(part: Tensor, cut_dimension: int | None) -> Tensor:
    """Return a new tensor joined over the tensor ranks."""
    group = tensor_group()
    if cut_dimension is None or group.size() == 1:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim=cut_dimension)


def _parameters(model: PolicyModel) -> Iterator[tuple[str, Tensor, Origin]]:
    offset = get_transformer_layer_offset(model.config)
    for name, parameter in model.named_parameters():
        yield name, parameter, origin_of(name, offset, model.share_embeddings_and_output_weights)


def _read_cut(files: WeightFiles, name: str, cut_dimension: int | None) -> Tensor:
    """Return this rank's cut; the last ranks' share of a vocabulary that does not divide ends in zeros."""
    if cut_dimension is None:
        return files.read(name)
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    full = files.shape(name)[cut_dimension]
    share = -(-full // num_ranks)
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
