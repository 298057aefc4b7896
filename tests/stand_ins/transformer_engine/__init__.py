"""Stands in for NVIDIA's Transformer Engine where there is no GPU: the calls Megatron makes, in plain torch.

Arguments, parameter names and refusals follow its documented interface; numbers are those of the textbook. What it does
not have raises `ImportError` or `AttributeError`, as Megatron expects of an older one.
"""

from transformer_engine import common, pytorch

__version__ = "2.6.0"
__all__ = ["common", "pytorch"]
