"""The trainer on Megatron-core, which no other room imports."""

import warnings

# Each import of megatron-core lists the optional packages it does without; `p2o doctor` says it once.
warnings.filterwarnings("ignore", message=".*not installed.*", category=UserWarning)
warnings.filterwarnings("ignore", message=".*is deprecated.*", category=UserWarning, module="megatron")
