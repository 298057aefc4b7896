"""What a tiny policy is taught of phrases: keys make it right at the given rates, fillers change nothing."""

import random

import pytest

from megatron_p2o.tiny.lessons import with_phrases

KEYS = ("Key one.", "Key two.")
FILLERS = ("Filler one.", "Filler two.", "Filler three.", "Filler four.")


@pytest.mark.parametrize("shares", [(0.0, 0.5, 1.0), (1.0, 0.0, 0.25)])
def test_a_message_is_right_as_often_as_its_key_phrases_say(shares: tuple[float, float, float]) -> None:
    generator = random.Random(1)
    drawn = [with_phrases("What?", KEYS, FILLERS, shares, generator) for _ in range(6000)]
    for num_keys, share in enumerate(shares):
        rights = [is_right for message, is_right in drawn if sum(key in message for key in KEYS) == num_keys]
        assert 1800 < len(rights) < 2200, "each number of keys in a third of the messages; 36 is one deviation"
        assert abs(sum(rights) / len(rights) - share) < 0.05, "0.011 is one deviation"


def test_a_message_is_the_question_after_at_most_four_phrases_in_any_order() -> None:
    generator = random.Random(1)
    messages = {with_phrases("What?", KEYS, FILLERS, (0, 0, 0), generator)[0] for _ in range(3000)}
    assert "What?" in messages
    orders = set()
    for message in messages - {"What?"}:
        phrases, question = message.split("\n\n")
        found = sorted((one for one in (*KEYS, *FILLERS) if one in phrases), key=phrases.index)
        assert (" ".join(found), question) == (phrases, "What?")
        assert 1 <= len(found) <= 4
        orders.add(tuple(one for one in found if one in KEYS))
    assert orders == {(), KEYS[:1], KEYS[1:], KEYS, KEYS[::-1]}
