"""Reads a Hugging Face config.json: the sizes of a model, and the features of its model type."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_p2o.files import read_json_object

MAX_LAYERS = 1024
MAX_EXPERTS = 1024
"""More than any model has: a config.json that names more is damaged, and its tensors would be listed for hours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelType:
    """What distinguishes the layers of one `model_type`. All have RMS norms, rotary embeddings and gated SiLU MLPs."""

    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    """RMS norm of each query and key head."""
    has_experts: bool = False


MODEL_TYPES = {
    "qwen3": ModelType(has_qk_norm=True),
    "qwen3_moe": ModelType(has_qk_norm=True, has_experts=True),
    "qwen2": ModelType(has_qkv_bias=True),
    "llama": ModelType(),
}
"""Model families by `model_type`. Qwen2.5 uses qwen2."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants of Llama 3's scaled rotary embedding that Megatron has fixed; the factor is free."""


ELEMENT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2}
"""Bytes per element, by `model.dtype`."""


def element_bytes(dtype: str) -> int:
    """Return the size of one number of a weight in `model.dtype`."""
    return ELEMENT_BYTES[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """The MLP of a mixture-of-experts layer; every layer has one."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    """Intermediate size of one expert."""
    normalizes_weights: bool
    """The weights of a token's experts add up to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """What the trainer must know of a model."""

    model_type: ModelType
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Intermediate size of a dense MLP; unused if there are experts."""
    experts: Experts | None
    """None: the MLPs are dense."""
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Factor of Llama 3's scaled rotary embedding; None: not scaled."""
    max_positions: int
    ties_embeddings: bool
    """The LM head is the embedding."""

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the Hugging Face directory by name; a tied head has none."""
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size),
            "model.norm.weight": (self.hidden_size,),
        }
        if not self.ties_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        layer = self._attention_shapes() | self._mlp_shapes()
        for number in range(self.num_layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        return shapes

    def forward_flops(self, num_tokens: int, num_head_tokens: int) -> float:
        """Return the floating-point operations of the matrix products of a forward pass over one sequence.

        Attention is causal; of a layer's experts those count that a token visits.

        Args:
            num_tokens: length of the sequence.
            num_head_tokens: positions whose states go through the LM head.
        """
        query_size, key_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        mlp_weights = 3 * self.hidden_size * self.intermediate_size
        if self.experts is not None:
            visited = 3 * self.experts.num_experts_per_token * self.experts.intermediate_size
            mlp_weights = self.hidden_size * (self.experts.num_experts + visited)
        weights = 2 * self.hidden_size * (query_size + key_size) + mlp_weights
        pairs = num_tokens * (num_tokens + 1) / 2
        layer = 2.0 * num_tokens * weights + 4.0 * pairs * query_size
        return self.num_layers * layer + 2.0 * num_head_tokens * self.hidden_size * self.vocab_size

    def largest_weight_bytes(self, dtype: str) -> int:
        """Return the size of the largest tensor of the directory in `model.dtype`."""
        return max(math.prod(shape) for shape in self.weight_shapes().values()) * element_bytes(dtype)

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        query_size, key_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (self.hidden_size,),
            "post_attention_layernorm.weight": (self.hidden_size,),
            "self_attn.o_proj.weight": (self.hidden_size, query_size),
        }
        for part, size in (("q", query_size), ("k", key_size), ("v", key_size)):
            shapes[f"self_attn.{part}_proj.weight"] = (size, self.hidden_size)
            if self.model_type.has_qkv_bias:
                shapes[f"self_attn.{part}_proj.bias"] = (size,)
        if self.model_type.has_qk_norm:
            shapes |= {f"self_attn.{part}_norm.weight": (self.head_dim,) for part in "qk"}
        return shapes

    def _mlp_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.experts is None:
            return self._gated_shapes("mlp", self.intermediate_size)
        shapes: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (self.experts.num_experts, self.hidden_size)}
        for expert in range(self.experts.num_experts):
            shapes |= self._gated_shapes(f"mlp.experts.{expert}", self.experts.intermediate_size)
        return shapes

    def _gated_shapes(self, prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.gate_proj.weight": (size, self.hidden_size),
            f"{prefix}.up_proj.weight": (size, self.hidden_size),
            f"{prefix}.down_proj.weight": (self.hidden_size, size),
        }


def read_architecture(directory: Path) -> Architecture:
    """Return the architecture of a Hugging Face model directory.

    Raises:
        ValueError: not of one of the `MODEL_TYPES`, or it uses a feature the trainer does not compute.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"model.path={directory} has no config.json: name a Hugging Face model directory")
    settings = read_json_object(path)
    _check_supported(settings, path)
    model_type, rope, sizes = MODEL_TYPES[settings["model_type"]], _rope(settings), _Sizes(settings, path)
    num_heads, hidden_size = sizes.count("num_attention_heads"), sizes.count("hidden_size")
    factor = sizes.positive("rope factor", rope.get("factor")) if rope["rope_type"] == "llama3" else None
    return Architecture(
        model_type=model_type,
        num_layers=sizes.count("num_hidden_layers", at_most=MAX_LAYERS),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=sizes.count("num_key_value_heads", num_heads),
        head_dim=sizes.count("head_dim", hidden_size // num_heads),
        intermediate_size=sizes.count("intermediate_size"),
        experts=_experts(sizes) if model_type.has_experts else None,
        vocab_size=sizes.count("vocab_size"),
        norm_epsilon=sizes.positive("rms_norm_eps", settings.get("rms_norm_eps")),
        rope_theta=sizes.positive("rope_theta", rope["rope_theta"]),
        rope_scaling_factor=factor,
        max_positions=sizes.count("max_position_embeddings"),
        ties_embeddings=bool(settings.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The numbers of a config.json, checked one by one."""

    settings: Mapping[str, Any]
    path: Path

    def count(self, name: str, default: int | None = None, *, at_most: int = 2**31 - 1) -> int:
        """Return a whole number of at least 1; `default` where it is missing or null."""
        value = self.settings.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= at_most:
            raise ValueError(f"{self.path}: {name} is {value!r:.80}, must be a whole number from 1 to {at_most}")
        return value

    def positive(self, name: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{self.path}: {name} is {value!r:.80}, must be a number greater than 0")
        return float(value)


def _experts(sizes: _Sizes) -> Experts:
    # transformers 5 writes the second name.
    name = "num_experts" if sizes.settings.get("num_experts") is not None else "num_local_experts"
    return Experts(
        num_experts=sizes.count(name, at_most=MAX_EXPERTS),
        num_experts_per_token=sizes.count("num_experts_per_tok"),
        intermediate_size=sizes.count("moe_intermediate_size"),
        normalizes_weights=bool(sizes.settings.get("norm_topk_prob", False)),
    )


def _check_supported(settings: Mapping[str, Any], path: Path) -> None:
    model_type, rope = settings.get("model_type"), _rope(settings)
    wrong_rope = [
        f"{name} is {rope.get(name)}, must be {value:g}"
        for name, value in LLAMA3_ROPE.items()
        if rope["rope_type"] == "llama3" and rope.get(name) != value
    ]
    rules = [
        (
            isinstance(model_type, str) and model_type in MODEL_TYPES,
            f"model_type is {model_type!r}, must be one of {', '.join(sorted(MODEL_TYPES))}",
        ),
        (settings.get("hidden_act") == "silu", f"hidden_act is {settings.get('hidden_act')!r}, must be 'silu'"),
        (not settings.get("attention_bias"), "attention_bias is set"),
        (not settings.get("mlp_bias"), "mlp_bias is set"),
        (not settings.get("use_sliding_window"), "use_sliding_window is set"),
        (rope["rope_type"] in ("default", "llama3"), f"the rotary embedding is scaled ({rope['rope_type']!r})"),
        (not wrong_rope, f"the rotary embedding's {'; its '.join(wrong_rope)}"),
        (settings.get("decoder_sparse_step", 1) == 1, "decoder_sparse_step is not 1"),
        (not settings.get("mlp_only_layers"), "mlp_only_layers is set"),
    ]
    broken = [text for holds, text in rules if not holds]
    if broken:
        raise ValueError(f"{path}: {'; '.join(broken)}. The trainer computes models of these types without that")


def _rope(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the rotary settings of transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`)."""
    stated = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    found = dict(stated) if isinstance(stated, Mapping) else {"rope_type": stated}
    found.setdefault("rope_theta", settings.get("rope_theta", 10000.0))
    found["rope_type"] = found.get("rope_type", found.get("type", "default"))
    return found
