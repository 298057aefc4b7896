"""The trainer on Megatron-core. No other folder imports Megatron-core."""

import warnings

from megatron_p2o.policy.model.layer_choice import transformer_engine_failure

# Each import of megatron-core lists the optional packages it does without; `p2o doctor` says it once.
warnings.filterwarnings("ignore", message=".*not installed.*", category=UserWarning)
warnings.filterwarnings("ignore", message=".*is deprecated.*", category=UserWarning, module="megatron")
warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
warnings.filterwarnings("ignore", message="`load_state_dict` is deprecated", category=FutureWarning, module="megatron")

transformer_engine_failure()  # hides a broken Transformer Engine before megatron-core imports it
