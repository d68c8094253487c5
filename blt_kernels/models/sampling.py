"""Sampling chooses the next byte, greedily or at random, and decides whether a drafted byte is kept.

A draft is kept by rejection sampling (arXiv 2211.17192, algorithm 1): byte d, drawn from q, is kept with probability
``min(1, p(d) / q(d))``, else another is drawn from ``max(p - q, 0)``. What comes out has exactly the distribution p of
the model. Greedy choice is the case of distributions with a single byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from blt_kernels import _checks


@dataclass(frozen=True)
class Sampling:
    """Describes how the next byte is drawn from logits.

    Attributes
    ----------
    temperature : float
        Logits are divided by it; 0 is greedy choice.
    top_k : int, optional
        Only the k most probable ids are drawn.
    top_p : float, optional
        Of these only the fewest most probable ids are drawn that have at least this probability together.
    min_p : float, optional
        Of these only ids with at least this fraction of the probability of the most probable one are drawn.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        _checks.check_number("temperature", self.temperature)
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite value >= 0, got {self.temperature}")
        if self.top_k is not None:
            _checks.check_int("top_k", self.top_k, 1)
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None:
                _checks.check_number(name, value)
                if not 0 < value <= 1:
                    raise ValueError(f"{name}: expected a value above 0, up to 1, got {value}")

    @property
    def greedy(self) -> bool:
        """True if the most probable id is always chosen."""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of ids ``[n, A]``, fp64 on the CPU.

        Of equal logits, lower ids come first: greedily, and where `top_k` and `top_p` leave some out.

        Raises
        ------
        ValueError
            A logit is NaN or positive infinity, or all of a row are negative infinity.
        """
        logits = logits.double().cpu()
        top = logits.amax(-1)
        if not top.isfinite().all():
            raise ValueError(f"logits: expected numbers, got {float(top[~top.isfinite()][0])}; the model has overflown")
        return self.distribution(logits)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the probabilities of ids for fp64 logits ``[n, A]`` on any device, where none is checked."""
        top, first = logits.max(-1, keepdim=True)
        if self.greedy:
            return torch.zeros_like(logits).scatter(-1, first, 1)
        p = ((logits - top) / self.temperature).softmax(-1)
        if self.top_k is None and self.top_p is None and self.min_p is None:
            return p
        p, order = p.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            p[..., self.top_k :] = 0
        if self.top_p is not None and self.top_p < 1:
            before = p.cumsum(-1) - p
            p = p.where(before < self.top_p * p.sum(-1, keepdim=True), 0)
        if self.min_p is not None:
            p = p.where(p >= self.min_p * p[..., :1], 0)
        return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))

    def draw(self, probabilities: Tensor, random: Sequence[Random]) -> list[int]:
        """Return an id of each distribution ``[n, A]``, by the random numbers of its row."""
        numbers = torch.tensor([] if self.greedy else [r.random() for r in random], dtype=torch.float64, device="cpu")
        return self.pick(probabilities, numbers).tolist()

    def pick(self, probabilities: Tensor, numbers: Tensor) -> Tensor:
        """Return an id of each distribution ``[n, A]``, by a number from 0 to 1 for each, fp64 ``[n]``."""
        if self.greedy:
            return probabilities.argmax(-1)
        cumulative = probabilities.cumsum(-1)
        ids = torch.searchsorted(cumulative, numbers[:, None] * cumulative[:, -1:], right=True)
        last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # where rounding leads beyond
        return torch.minimum(ids, last)[:, 0]

    def verify(self, p: Tensor, draft: Sequence[int], q: Tensor | None, random: Random) -> tuple[int, int]:
        """Return how many ids of a draft are kept, and the id after them.

        Parameters
        ----------
        p : fp64 ``[k + 1, A]``
            The model's distributions of each drafted id, and of the one after the last.
        draft : sequence of int
            k ids.
        q : fp64 ``[k, A]``, optional
            The distributions that they were drawn from; None if they were not drawn.
        random : random.Random
        """
        for i, drafted in enumerate(draft):
            own, other = float(p[i, drafted]), 1.0 if q is None else float(q[i, drafted])
            # Every id takes a number: p and q may be equal but for rounding, which must not move the numbers after it.
            if random.random() * other < own:
                continue
            rest = p[i].clone()
            if q is None:
                rest[drafted] = 0
            else:
                rest = (rest - q[i]).clamp(min=0)
            return i, self.draw((rest if rest.any() else p[i])[None], [random])[0]
        return len(draft), self.draw(p[-1:], [random])[0]
