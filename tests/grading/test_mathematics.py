r"""Known verdicts on mathematical answers, by hand; where math-verify is more lenient or stricter than a mathematician, the table says so."""

from collections.abc import Iterator

import pytest

from megatron_prism.grading import Pool, Question

RIGHT = r"""
\frac{1}{2} | 0.5
\frac{1}{2} | 1/2
\frac12 | \dfrac{1}{2}
-\frac{1}{2} | \frac{-1}{2}
0.5 | .5
3\frac{1}{2} | 3.5
1\frac{4}{5} | \frac{9}{5}
\frac{\sqrt{3}}{3} | \frac{1}{\sqrt{3}}
\sqrt{8} | 2\sqrt{2}
11\sqrt2 | 11\sqrt{2}
42 | \frac{84}{2}
42 | 42.0
204 | 204.
073 | 73
73 | 073
32,348 | 32348
\$32,348 | 32348
1{,}000 | 1000
2^{10} | 1024
7.0 \times 10^3 | 7000
10\% | 0.1
10\% | 10\%
15 | 15\text{ cm}^2
864 \mbox{ inches}^2 | 864
90 | 90^\circ
\{1,2\} | \{2, 1\}
1,-2 | -2, 1
\pm 2 | 2,-2
6\text{ and }7 | 6, 7
\emptyset | \{\}
(1,2) | (1, 2)
\left( 3, \frac{\pi}{2} \right) | (3, \pi/2)
[-2,7] | [-2, 7]
[-2,7] | x \in [-2,7]
(-\infty,2)\cup(3,\infty) | (3, \infty) \cup (-\infty, 2)
x<3 | 3>x
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}
6 - 5i | -5i+6
x^2-1 | (x-1)(x+1)
2x+3 | 3+2x
ab | ba
x=5 | 5
5 | x=5
y = 2x+3 | 2x+3
\infty | \infty
2516_8 | 2516_{8}
\text{Evelyn} | Evelyn
\text{Evelyn} | \text{evelyn}
\text{even} | \textbf{even}
\text{(C)} | C
\text{6:00 PM} | 6:00 PM
"""

WRONG = r"""
11/2 | 1 1/2
34 | 3 4
\frac{1}{2} | -\frac{1}{2}
\frac{1}{2} | 2
\frac{1}{3} | 0.333
\sqrt{2} | 1.414
1 | 1.0001
1,2 | 1,2,3
1,2 | 1
5 | 5, 6
12 | 12 \text{ or } 13
(1,2) | (2,1)
[-2,7] | (-2,7)
[0,1) | [0,1]
x<3 | x>3
x<3 | x \le 3
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix} 1 & 2 \\ 4 & 3 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 \\ 2 \\ 3 \end{pmatrix}
6 - 5i | 6 + 5i
x^2-1 | (x-1)^2
a+b+c | abc
p - q | q - p
(x-2)(x-3)=0 | x=2
\text{even} | \text{odd}
\text{even} | neev
\text{Evelyn} | nylevE
\text{(C)} | B
3 | \text{three}
7 | I do not know
7 | ?
"""

LENIENT = r"""
\frac{1}{3} | 0.3333333
2\pi | 6.283185307
10\% | 10
10 | 10\%
(1,2) | 1,2
2516_8 | 2516
\frac{3}{4} | \frac{3}{4
5 | 6=5
12 | 3 \cdot 5 = 12
"""
"""Right for math-verify: decimals to six places, percent without its sign, a pair without brackets, a number without its base, a brace lost, the last
side of an equation that does not hold."""

STRICT = r"""
[0,1) | 0 \le x < 1
e^{i\pi} | -1
0.1\overline{6} | \frac{1}{6}
"""
"""Equal, and wrong for math-verify."""


def rows(table: str) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, answer in (line.split(" | ") for line in table.strip().splitlines())]


def question(gold: str, extraction: str = "boxed") -> Question:
    return Question("?", "math", "", {"answer": gold}, extraction)


def test_known_verdicts() -> None:
    tables = {"RIGHT": (RIGHT, True), "WRONG": (WRONG, False), "LENIENT": (LENIENT, True), "STRICT": (STRICT, False)}
    cases = [(name, gold, answer, right) for name, (table, right) in tables.items() for gold, answer in rows(table)]
    pairs = [
        (question(gold), rf"So \boxed{{{answer}}}.") if answer.count("{") == answer.count("}") else (question(gold, "whole"), answer)
        for _, gold, answer, _ in cases
    ]
    with Pool(1) as pool:
        found = list(pool.verdicts(pairs))
    different = [case for case, verdict in zip(cases, found, strict=True) if (verdict.correct, verdict.reason) != (case[3], RIGHT_OR_WRONG[case[3]])]
    assert different == []


RIGHT_OR_WRONG = {True: "correct", False: "wrong"}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(1) as pool:
        yield pool


def test_the_last_box_counts_and_a_cut_off_box_is_no_answer(pool: Pool) -> None:
    texts = [r"\boxed{1} no: \boxed{2}", r"\boxed{2} no: \boxed{1}", r"\boxed{2} no: \boxed{\frac{1", "2"]
    assert [verdict.reason for verdict in pool.verdicts([(question("2"), text) for text in texts])] == ["correct", "wrong", "no_answer", "no_answer"]


def test_a_question_whose_own_answer_cannot_be_read_is_the_graders_failure(pool: Pool) -> None:
    [found] = pool.verdicts([(question(""), r"\boxed{2}")])
    assert (found.reason, found.correct) == ("grader_failed", False)


def test_endless_text_in_the_box_is_wrong_at_once(pool: Pool) -> None:
    [found] = pool.verdicts([(question("2"), rf"\boxed{{{'1+' * 100_000}1}}")])
    assert found.reason == "wrong"
