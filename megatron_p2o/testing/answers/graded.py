"""Generated gold answers with answers that are right or wrong by construction, and reward functions outside workers."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_p2o.rewards.functions import RewardFunction, RewardSpec, found_function, made_function
from megatron_p2o.rewards.math.grader import local_verdict
from megatron_p2o.rewards.workers.algebra import is_match
from megatron_p2o.testing.answers import numbers as number_answers
from megatron_p2o.testing.answers import quantities as quantity_answers
from megatron_p2o.testing.answers import structured as structured_answers
from megatron_p2o.testing.answers.record import Spelled
from megatron_p2o.types import Problem


def load_function(spec: RewardSpec) -> RewardFunction:
    """Return the reward function that settings name, with its arguments bound, in this process."""
    return made_function(found_function(spec), spec)


@dataclass(frozen=True, slots=True)
class GradedAnswers:
    """A gold answer, and what must and must not be accepted for it."""

    shape: str
    gold: str
    right: tuple[Spelled, ...]
    wrong: tuple[Spelled, ...]
    question: str = "Find it."


def generated(seed: int, num_golds: int) -> Iterator[GradedAnswers]:
    """Yield `num_golds` gold answers, all shapes in turn. What is right follows from how an answer is made."""
    generator = random.Random(seed)
    modules = (number_answers, quantity_answers, structured_answers)
    shapes = [shape for module in modules for shape in module.SHAPES.items()]
    for index in range(num_golds):
        shape, make = shapes[index % len(shapes)]
        made = make(generator)
        right = [("same", made.gold), *made.right, *_respelled(made.gold, made.right, generator)]
        wrong = [*made.wrong, *_extended(made.gold, generator)]
        yield GradedAnswers(shape, made.gold, tuple(right), tuple(wrong), made.question)


def _respelled(gold: str, right: list[Spelled], generator: random.Random) -> list[Spelled]:
    """Return spellings that never change an answer, of the gold answer and of one that equals it."""
    texts = [gold, generator.choice(right)[1] if right else gold]
    spelled: list[Spelled] = []
    for text in texts:
        spelled += [("dollars", f"${text}$"), ("full stop", f"{text}."), ("blanks", f"  {text} ")]
        if r"\frac" in text:
            spelled += [("dfrac", text.replace(r"\frac", r"\dfrac")), ("tfrac", text.replace(r"\frac", r"\tfrac"))]
        if "(" in text and r"\left" not in text and "_(" not in text:
            spelled.append(("left right", text.replace("(", r"\left(").replace(")", r"\right)")))
        if "-" in text and "e-" not in text and "{-" not in text and r"\text" not in text:
            spelled.append(("minus sign", text.replace("-", "\u2212")))
        if r"\text" not in text and any(sign in text for sign in "+=<"):
            spaced = text
            for sign in "+=<":
                spaced = spaced.replace(sign, f" {sign} ")
            spelled.append(("spaced signs", spaced))
        if r"\text" in text:
            spelled.append(("textbf", text.replace(r"\text{", r"\textbf{")))
            spelled.append(("mathrm", text.replace(r"\text{", r"\mathrm{")))
        else:
            spelled.append(("bold", rf"\mathbf{{{text}}}" if r"\begin" not in text else text))
            spelled.append(("display style", rf"\displaystyle {text}"))
    return spelled


def _extended(gold: str, generator: random.Random) -> list[Spelled]:
    """Return answers that say something else, or more, than the gold one, whatever it is."""
    number = generator.randint(2_000_001, 2_999_999)
    name = "uvw"[generator.randint(0, 2)]
    return [
        ("an extra element", f"{gold}, {number}"),
        ("an extra alternative", rf"{name} = {number} \text{{ or }} {name} = {gold}"),
        ("another alternative", rf"{gold} \text{{ or }} {number}"),
        ("denied", rf"{gold}\text{{ is not the answer}}"),
        ("not equal", rf"{name} \neq {gold}"),
        ("another equation before", rf"{name}={number};\quad {name}={gold}"),
        ("plus one", f"{gold}+{number}" if gold[-1].isdigit() else f"{number}"),
        ("a congruence", rf"{number} \equiv {gold}"),
        ("empty", ""),
    ]


def is_correct(problem: Problem, answer: str) -> bool:
    """Grade as `MathGrader` does, with the algebra of its workers in this process."""
    verdict = local_verdict(problem, answer)
    return verdict if isinstance(verdict, bool) else is_match([verdict.answer], verdict.gold)


def accepts(gold: str, answer: str, question: str = "Find it.") -> bool:
    """Return the verdict on an answer to a question with the gold answer `gold`."""
    return is_correct(Problem(id="p", question=question, answer=gold), answer)
