"""Divisors, for layouts that must cut something evenly."""


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def nearest_divisor(size: int, wanted: int) -> int:
    """Of two that are equally near, the larger."""
    return min(divisors(size), key=lambda divisor: (abs(divisor - wanted), -divisor))
