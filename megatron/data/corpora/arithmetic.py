"""Generated arithmetic: worked exercises whose every step follows from the one before."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from megatron.data.corpora.documents import Document


def exercises(*, size: int, seed: int = 1) -> Iterator[Document]:
    """Yield sheets of exercises until they hold ``size`` bytes.

    Each sheet has a generator of its own, seeded by its number: the same on every machine
    and independent of how many sheets are asked for.
    """
    total, number = 0, 0
    while total < size:
        number += 1
        dice = random.Random(f"arithmetic {seed} {number}")
        kinds = dice.sample(_KINDS, 3)
        tasks = [dice.choice(kinds)(dice) for _ in range(12)]
        text = f"Sheet {number}\n" + "\n".join(tasks) + "\n"
        document = Document(text=text, source=f"sheet {number}")
        total += document.size
        yield document


def _number(dice: random.Random, *, digits: int = 5) -> int:
    length = dice.randint(1, digits)
    return dice.randint(10 ** (length - 1), 10**length - 1)


def _addition(dice: random.Random) -> str:
    first, second = _number(dice), _number(dice)
    steps, carry = [], 0
    for place in range(len(str(max(first, second)))):
        a, b = first // 10**place % 10, second // 10**place % 10
        value = a + b + carry
        note = f" + {carry}" if carry else ""
        steps.append(f"{a} + {b}{note} = {value}")
        carry = value // 10
    return f"{first} + {second}: {', '.join(steps)}. The sum is {first + second}."


def _subtraction(dice: random.Random) -> str:
    small, large = sorted((_number(dice), _number(dice)))
    return f"{large} - {small} = {large - small}, for {large - small} + {small} = {large}."


def _multiplication(dice: random.Random) -> str:
    first, second = _number(dice, digits=4), _number(dice, digits=3)
    parts = []
    for place, digit in enumerate(reversed(str(second))):
        if digit != "0":
            parts.append(f"{first} * {int(digit) * 10**place} = {first * int(digit) * 10**place}")
    return f"{first} * {second}: {', '.join(parts)}. Together {first * second}."


def _division(dice: random.Random) -> str:
    whole, by = _number(dice), _number(dice, digits=2) + 1
    quotient, rest = divmod(whole, by)
    return (
        f"{whole} / {by} = {quotient} remainder {rest}, for {by} * {quotient} + {rest} = {whole}."
    )


def _common_divisor(dice: random.Random) -> str:
    first, second = _number(dice, digits=4), _number(dice, digits=4)
    a, b = max(first, second), min(first, second)
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return f"gcd({first}, {second}): {', '.join(steps)}. So it is {a}."


def _fraction(dice: random.Random) -> str:
    first = Fraction(_number(dice, digits=2), _number(dice, digits=2) + 1)
    second = Fraction(_number(dice, digits=2), _number(dice, digits=2) + 1)
    bottom = math.lcm(first.denominator, second.denominator)
    tops = [part.numerator * (bottom // part.denominator) for part in (first, second)]
    total = f"{sum(tops)}/{bottom}"
    reduced = "" if str(first + second) == total else f" = {first + second}"
    return (
        f"{first} + {second}: over {bottom} they are {tops[0]} and {tops[1]}, "
        f"together {total}{reduced}."
    )


def _base(dice: random.Random) -> str:
    value = _number(dice)
    return f"{value} is {value:b} in base two, {value:o} in base eight, {value:x} in base sixteen."


def _sequence(dice: random.Random) -> str:
    start, step = _number(dice, digits=3), _number(dice, digits=2)
    if dice.random() < 0.5:
        terms = [start + step * index for index in range(7)]
        return f"{', '.join(map(str, terms[:6]))}: each is {step} more, so {terms[6]} comes next."
    factor = dice.randint(2, 5)
    terms = [step * factor**index for index in range(6)]
    return (
        f"{', '.join(map(str, terms[:5]))}: each is {factor} times more, so {terms[5]} comes next."
    )


def _factors(dice: random.Random) -> str:
    value = _number(dice, digits=4) + 1
    rest, found, divisor = value, [], 2
    while rest > 1:
        while rest % divisor == 0:
            found.append(divisor)
            rest //= divisor
        divisor += 1
    if len(found) == 1:
        return f"{value} is prime."
    return f"{value} = {' * '.join(map(str, found))}."


def _percentage(dice: random.Random) -> str:
    rate, whole = dice.randint(1, 99), _number(dice, digits=4) * 10
    part = Fraction(rate * whole, 100)
    shown = str(part.numerator) if part.denominator == 1 else f"{float(part):g}"
    return f"{rate} percent of {whole}: {rate} * {whole} / 100 = {shown}."


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _addition,
    _subtraction,
    _multiplication,
    _division,
    _common_divisor,
    _fraction,
    _base,
    _sequence,
    _factors,
    _percentage,
)
