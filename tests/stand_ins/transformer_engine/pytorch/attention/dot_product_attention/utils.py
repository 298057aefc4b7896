"""What Transformer Engine found of flash-attn."""


class FlashAttentionUtils:
    v4_is_installed = True
