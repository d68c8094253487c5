"""`Sampling`: its distributions equal plain formulas, and a verified draft leaves the model's distribution as it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from blt_kernels.models.sampling import Sampling

SAMPLED = Sampling(temperature=1.0)


# --- distributions ----------------------------------------------------------------------------------------------------


def formula(logits: list[float], sampling: Sampling) -> list[float]:
    """Return the probabilities of one row, id by id, in plain Python."""
    top = max(logits)
    p = [math.exp((x - top) / sampling.temperature) for x in logits]
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if sampling.top_k is not None:
        order = order[: sampling.top_k]
    if sampling.top_p is not None:
        sums = list(itertools.accumulate(p[i] for i in order))
        order = order[: 1 + next(i for i, s in enumerate(sums) if s >= sampling.top_p * sums[-1])]
    if sampling.min_p is not None:
        order = [i for i in order if p[i] >= sampling.min_p * p[order[0]]]
    total = sum(p[i] for i in order)
    return [p[i] / total if i in order else 0.0 for i in range(len(p))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 3, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.6, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.2, 1.0])
def test_probabilities_equal_the_formula(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.tensor([formula(row, sampling) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(sampling.probabilities(logits), expected, rtol=1e-12, atol=1e-15)


def test_lower_ids_win_ties() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, 1.0]])
    for sampling in (Sampling(0.0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=0.1), Sampling(1e-320, top_k=1)):
        assert sampling.probabilities(logits).tolist() == [[0, 1, 0, 0, 0]]
    assert Sampling(1.0, top_k=2).probabilities(logits).tolist() == [[0, 0.5, 0.5, 0, 0]]
    assert Sampling(1.0, min_p=1.0).probabilities(logits)[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize("temperature", [1e-9, 1e-320, 1e9])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, -float("inf"), 2.0]])
    p = Sampling(temperature).probabilities(logits)[0].tolist()
    expected = [0, 1, 0, 0] if temperature < 1 else [1 / 3, 1 / 3, 0, 1 / 3]
    assert p == pytest.approx(expected, abs=1e-8)


def test_top_p_of_one_drops_nothing() -> None:
    logits = torch.linspace(0, -80, 260, dtype=torch.float64)[None]
    assert bool((Sampling(1.0, top_p=1.0).probabilities(logits) > 0).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(temperature: float, wrong: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = wrong
    with pytest.raises(ValueError, match=f"logits: expected numbers, got {wrong}"):
        Sampling(temperature).probabilities(logits)
    with pytest.raises(ValueError, match="logits: expected numbers, got -inf"):
        Sampling(temperature).probabilities(torch.full((1, 5), -float("inf")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature: expected a finite value >= 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected a number, got nan"),
        ({"temperature": float("inf")}, "temperature: expected"),
        ({"temperature": "hot"}, "temperature: expected"),
        ({"top_k": 0}, "top_k: expected a value >= 1, got 0"),
        ({"top_k": 1.5}, "top_k: expected"),
        ({"top_p": 0.0}, "top_p: expected a value above 0, up to 1, got 0.0"),
        ({"top_p": 1.5}, "top_p: expected"),
        ({"min_p": -0.1}, "min_p: expected"),
        ({"min_p": True}, "min_p: expected"),
    ],
)
def test_wrong_values_name_themselves(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Sampling(**arguments)


class Scripted(Random):
    """Gives the random numbers of a list, one after another."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__(0)
        self.values = list(values)

    def random(self) -> float:
        return self.values.pop(0)


def test_drawn_ids_lie_where_the_random_number_does() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    numbers = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    drawn = SAMPLED.draw(p.expand(6, 6), [Scripted([u]) for u in numbers])
    assert drawn == [1, 1, 3, 3, 4, 4]
    tenths = torch.full((10,), 0.1, dtype=torch.float64)  # their sum is not 1
    assert SAMPLED.draw(tenths[None], [Scripted([1 - 2**-53])]) == [9]


# --- drafts -----------------------------------------------------------------------------------------------------------


class Recorded(Sampling):
    """Keeps the distribution that the id after a draft is drawn from."""

    def draw(self, probabilities: Tensor, random: Sequence[Random]) -> list[int]:
        object.__setattr__(self, "drawn_from", probabilities[0] / probabilities[0].sum())
        return [-1]


def verified(p: Tensor, drafted: int, q: Tensor | None) -> tuple[float, Tensor]:
    """Return the probability that a drafted id is kept, and the distribution of another one in its place.

    An id is kept if a random number is below a threshold, which bisection finds.
    """
    recorded = Recorded(1.0)
    both = torch.stack([p, torch.full_like(p, 1 / len(p))])
    rejected = p

    def keeps(u: float) -> bool:
        nonlocal rejected
        accepted, _ = recorded.verify(both, [drafted], None if q is None else q[None], Scripted([u]))
        if not accepted:
            rejected = recorded.drawn_from
        return accepted == 1

    low, high = 0.0, 1 - 2**-53
    if keeps(high):
        return 1.0, rejected
    if not keeps(low):
        return 0.0, rejected
    while high - low > 1e-13:
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return high, rejected


def distributions(seed: int, sampling: Sampling, count: int, alphabet: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return sampling.probabilities(2 * torch.randn(count, alphabet, generator=generator, dtype=torch.float64))


RULES = {
    "all": Sampling(1.0),
    "hot": Sampling(3.0),
    "top_k": Sampling(1.0, top_k=3),
    "top_p": Sampling(1.0, top_p=0.7),
    "min_p": Sampling(1.0, min_p=0.3),
    "greedy": Sampling(0.0),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("drafts", [*RULES, "equal", "not drawn"])
def test_a_verified_id_has_the_distribution_of_the_model(rule: str, drafts: str) -> None:
    """The mean over all drafts, with their probabilities, of what comes out is p."""
    for i, p in enumerate(distributions(1, RULES[rule], 8)):
        q = p if drafts == "equal" else distributions(100 + i, RULES.get(drafts, SAMPLED), 1)[0]
        out = torch.zeros_like(p)
        for drafted in q.nonzero()[:, 0].tolist():
            kept, other = verified(p, drafted, None if drafts == "not drawn" else q)
            if drafts == "not drawn":  # p comes out of every one
                each = (1 - kept) * other
                each[drafted] += kept
                torch.testing.assert_close(each, p, rtol=0, atol=1e-11)
            out += q[drafted] * (1 - kept) * other
            out[drafted] += q[drafted] * kept
        torch.testing.assert_close(out, p, rtol=0, atol=1e-11)


def test_texts_have_the_distribution_of_the_model() -> None:
    """Over all drafts of two of three ids, texts of three ids have the product of p, whatever follows what was kept."""
    alphabet, drafted = 3, 2
    texts = list(itertools.product(range(alphabet), repeat=drafted + 1))
    prefixes = [t for n in range(drafted + 1) for t in itertools.product(range(alphabet), repeat=n)]
    p = dict(zip(prefixes, distributions(5, SAMPLED, len(prefixes), alphabet), strict=True))
    q = dict(zip(prefixes, distributions(6, Sampling(2.0), len(prefixes), alphabet), strict=True))
    out = dict.fromkeys(texts, 0.0)
    for draft in itertools.product(range(alphabet), repeat=drafted):
        kept = math.prod(float(q[draft[:i]][draft[i]]) for i in range(drafted))
        for i in range(drafted + 1):
            following = p[draft[:i]]
            share = 1.0
            if i < drafted:
                share, other = verified(p[draft[:i]], draft[i], q[draft[:i]])
                following = (1 - share) * other
            for text in texts:
                if text[:i] == draft[:i]:
                    rest = math.prod(float(p[text[:j]][text[j]]) for j in range(i + 1, drafted + 1))
                    out[text] += kept * float(following[text[i]]) * rest
            kept *= share
    for text, probability in out.items():
        assert probability == pytest.approx(math.prod(float(p[text[:i]][x]) for i, x in enumerate(text)), abs=1e-11)


def test_a_draft_is_verified_id_by_id() -> None:
    """Every id takes one random number, up to the first that is not kept."""
    p, q = distributions(7, SAMPLED, 5), distributions(8, SAMPLED, 4)
    counts = [0] * 5
    for seed in range(200):
        draft = SAMPLED.draw(q, [Random(100 * seed + i) for i in range(4)])
        random, numbers = Random(seed), Random(seed)
        expected = 0
        while expected < 4:
            ratio = float(p[expected, draft[expected]] / q[expected, draft[expected]])
            if numbers.random() >= ratio:
                break
            expected += 1
        accepted, following = SAMPLED.verify(p, draft, q, random)
        rest = (p[accepted] - q[accepted]).clamp(min=0) if accepted < 4 else p[4]
        assert accepted == expected
        assert following == SAMPLED.draw(rest[None], [numbers])[0]
        counts[accepted] += 1
    assert min(counts) > 0


def test_a_greedy_draft_is_kept_where_it_is_right() -> None:
    greedy = Sampling(0.0)
    p = torch.eye(5, dtype=torch.float64)[[3, 1, 4, 2]]
    for q in (None, torch.eye(5, dtype=torch.float64)[[3, 1, 0]]):
        assert greedy.verify(p, [3, 1, 0], q, Random(0)) == (2, 4)
        assert greedy.verify(p[:3], [3, 1], None if q is None else q[:2], Random(0)) == (2, 4)
    assert greedy.verify(p[:1], [], None, Random(0)) == (0, 3)
