"""Joint policy and prompt optimization (P2O, arXiv:2603.21877) with Megatron-core and SGLang."""

__version__ = "0.1.0"
"""Also the distribution's version. A checkout that is not installed has no other."""
