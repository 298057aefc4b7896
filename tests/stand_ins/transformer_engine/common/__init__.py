"""What Megatron derives from at import."""

from types import SimpleNamespace

recipe = SimpleNamespace(DelayedScaling=object)
