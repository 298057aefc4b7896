"""Transformer Engine's attention over a pack. Importable only where Transformer Engine is.

T packed tokens of this rank, H query heads and G key/value heads of this rank, K channels per head.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from torch import Tensor

from megatron_p2o.policy.model.attention import PackLayout


def avoid_flash_attention_4() -> None:
    """Keep Transformer Engine from flash-attn 4, whose beta SGLang installs for its own use.

    Where cuDNN's attention does not apply, Transformer Engine would prefer it to flash-attn 2, which is compiled for
    the installed torch. It has no setting for the version (2.17.0).
    """
    try:
        from transformer_engine.pytorch.attention.dot_product_attention.utils import FlashAttentionUtils
    except ImportError:  # a version that knows no flash-attn 4
        return
    FlashAttentionUtils.v4_is_installed = False


avoid_flash_attention_4()


class PackedTransformerEngineAttention(TEDotProductAttention):
    """Passes Megatron's one long sequence to Transformer Engine as samples laid end to end ("thd").

    Megatron itself must not know (see `PackLayout`), so that the rotary embedding stays the one of the local layers.
    Under context parallelism Transformer Engine passes keys and values around the ranks; it cuts a sample as we do.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackLayout | None = None,
    ) -> Tensor:
        """Return [T, 1, H*K] from query [T, 1, H, K] and key, value [T, 1, G, K]."""
        assert isinstance(packed_seq_params, PackLayout) and attention_mask is None and attention_bias is None
        output = super().forward(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            None,
            attn_mask_type,
            packed_seq_params=packed_seq_params.whole,
        )
        return output.reshape(len(query), 1, -1)
