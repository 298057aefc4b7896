"""Log-probs of given tokens from hidden states and a (vocabulary-parallel) LM head."""

from p2o_kernels.logprob.op import linear_logprob
from p2o_kernels.logprob.reference import linear_logprob_reference

__all__ = ["linear_logprob", "linear_logprob_reference"]
