"""What the policy of each regime is taught, and the measure of how far its skill leans on the template."""

import hashlib
import json
import math
import random
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from megatron_p2o.tiny.measurements import measure_context_ratios
from megatron_p2o.tiny.model import build_tokenizer
from megatron_p2o.tiny.problems import FAMILIES, MODULUS, starts
from megatron_p2o.tiny.regimes import GO_ON_PROBABILITY, TAUGHT_AT, Regime, demonstrate, demonstrations


def test_the_policy_of_the_examples_is_taught_the_same_to_the_bit() -> None:
    """Numbers in the README and in `experiments/results` are of the policy that these demonstrations make."""
    tokenizer, generator = build_tokenizer(), random.Random(1)
    taught = [demonstrations(tokenizer, 256, starts("train"), regime, generator) for regime in (None, "transfer")]
    digest = hashlib.sha256(json.dumps(taught).encode()).hexdigest()
    assert digest == "22cd07c4608985557d1eae20e33516e4f6bde521d077f9c3a208ec0c71d64475"


@pytest.mark.parametrize(("regime", "share_begun"), [("transfer", 0.1), ("leaning", 0.0)])
def test_the_regimes_differ_in_how_often_the_bare_prompt_goes_on(regime: Regime, share_begun: float) -> None:
    generator, family = random.Random(3), FAMILIES["walk"]
    plain, one_key, both_keys = GO_ON_PROBABILITY[regime]
    texts = [demonstrate(family, "hard", (1, 2), plain, generator) for _ in range(4000)]
    assert abs(sum("," in text for text in texts) / len(texts) - share_begun) < 0.015, "0.005 is one deviation"
    at_sampling = one_key ** (TAUGHT_AT[regime] / 0.8), (1 - one_key) ** (TAUGHT_AT[regime] / 0.8)
    if regime == "leaning":
        assert at_sampling[0] / sum(at_sampling) == pytest.approx(0.75, abs=0.003), "one key works as in the other"
    else:
        assert (one_key, TAUGHT_AT[regime]) == (0.75, 1.0)
    assert demonstrate(family, "hard", (1, 2), both_keys, generator).count(",") == 9
    assert demonstrate(family, "easy", (1, 2), plain, generator) == "\\boxed{ 2 10 }", "easy problems are answered"


class GoesOnWhenTold:
    """Logits of a policy that avoids numbers by `penalty` after a comma or at the start, where the prompt is bare."""

    def __init__(self, penalty: float) -> None:
        self.penalty, self.vocabulary = penalty, build_tokenizer().get_vocab()

    def eval(self) -> "GoesOnWhenTold":
        return self

    def __call__(self, input_ids: Tensor) -> SimpleNamespace:
        logits = torch.zeros(1, input_ids.shape[1], len(self.vocabulary))
        numbers = [self.vocabulary[str(number)] for number in range(MODULUS)]
        is_bare = self.vocabulary["."] not in input_ids[0]
        for place, token in enumerate(input_ids[0].tolist()):
            if is_bare and token in (self.vocabulary[","], self.vocabulary["<|assistant|>"]):
                logits[0, place, numbers] = -self.penalty
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("penalty", [0.0, 3.0, 12.0])
def test_the_measured_ratio_is_that_of_the_tokens_that_go_on(penalty: float) -> None:
    temperature, num_tokens = 0.8, len(build_tokenizer())
    policy = cast(Qwen3ForCausalLM, GoesOnWhenTold(penalty))
    scaled = penalty / temperature
    bare = -scaled - math.log(MODULUS * math.exp(-scaled) + num_tokens - MODULUS)
    expected = (bare + math.log(num_tokens)) / math.log(10)
    for ratios in measure_context_ratios(policy, build_tokenizer(), temperature, num_problems=3, seed=1):
        measured = (ratios.skill_smallest, ratios.skill_mean, ratios.skill_largest)
        assert measured == pytest.approx([expected] * 3, abs=1e-5), "float32"
        assert ratios.rest_smallest == pytest.approx(0, abs=1e-5), "the box is more likely where numbers are avoided"
