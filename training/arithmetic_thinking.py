"""The chain of thought that solves an arithmetic problem, which the embedded reasoner learned."""

from __future__ import annotations

from rac_modifier.problems.arithmetic import Solved, subtractions


def thinking_of(problem: Solved) -> str:
    """Return the steps that solve a problem."""
    a, b, *_ = problem.operands
    if problem.task == "addition":
        return _column_sum(list(problem.operands))
    if problem.task == "multiplication":
        tens, ones = divmod(b, 10)
        products = [_times_digit(a, ones), _times_digit(a, tens)]
        return "\n".join([*products, _column_sum([a * ones, a * tens * 10])])
    if problem.task == "gcd":
        lines = [f"{x}-{y}={x - y}" for x, y in subtractions(a, b)]
        return "\n".join([*lines, f"{problem.answer}={problem.answer}"])
    return _long_division(a, b)


def _column_sum(numbers: list[int]) -> str:
    """Add numbers column by column from the right, a line per column."""
    width = len(str(max(numbers)))
    rows = [str(n).zfill(width) for n in numbers]
    lines, carry, digits = [], 0, ""
    for column in range(width - 1, -1, -1):
        total, steps = carry, []
        for row in rows:
            digit = int(row[column])
            steps.append(f"{total}+{digit}={total + digit}")
            total += digit
        carry, digit = divmod(total, 10)
        digits = f"{digit}{digits}"
        lines.append(f"{', '.join(steps)}, write {digit} carry {carry}")
    if carry:
        digits = f"{carry}{digits}"
    return " ".join(rows) + "\n" + "\n".join(lines) + f"\n-> {digits}"


def _times_digit(number: int, digit: int) -> str:
    carry, steps = 0, []
    for d in reversed(str(number)):
        product = int(d) * digit
        total = product + carry
        steps.append(f"{d}*{digit}={product}, {product}+{carry}={total}")
        carry = total // 10
    return f"{number}*{digit}: " + "; ".join(steps) + f" -> {number * digit}"


def _long_division(a: int, b: int) -> str:
    remainder, lines, digits = 0, [], ""
    for d in str(a):
        head = remainder * 10 + int(d)
        q, r = divmod(head, b)
        lines.append(f"{head}: {b}*{q}={head - r}, {head}-{head - r}={r}, write {q}")
        digits, remainder = digits + str(q), r
    return "\n".join(lines) + f"\n-> {digits}"
