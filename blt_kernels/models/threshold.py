"""Searches the entropy threshold at which patches have a given mean size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def find_threshold(mean_size: Callable[[float], float], entropy: Tensor, patch_size: float) -> float:
    """Return the threshold at which the mean size of patches is nearest to `patch_size`.

    It is found by bisection: a higher threshold makes no more patches, whatever the rule. Only with `max_patch_length`
    and whole characters together may it make a few more; then another threshold may be nearer.

    Parameters
    ----------
    mean_size : callable
        Returns the mean size of patches in bytes at a threshold in nats.
    entropy : floating ``[T]``
        The entropies in nats. Thresholds between minus their maximum and their maximum are searched, which holds the
        rises from byte to byte as well.
    patch_size : float
        The mean size that is wanted, in bytes.

    Returns
    -------
    float
        In nats.
    """
    finite = entropy[entropy.isfinite()]
    high = float(finite.max()) + 1 if finite.numel() else 1.0
    low = -high
    for _ in range(40):
        middle = (low + high) / 2
        if mean_size(middle) < patch_size:
            low = middle
        else:
            high = middle
    return min((low, high), key=lambda threshold: abs(mean_size(threshold) - patch_size))
