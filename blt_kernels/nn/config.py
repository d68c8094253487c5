"""`TransformerConfig` configures a stack of transformer layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from blt_kernels import _checks


@dataclass(frozen=True)
class TransformerConfig:
    """Holds the sizes of a stack of layers.

    Attributes
    ----------
    dim : int
        Width, a multiple of ``2 * num_heads``.
    num_layers, num_heads : int
    num_kv_heads : int, optional
        A divisor of `num_heads`, which it is if None.
    ffn_dim : int, optional
        Width of the feed-forward. If None, 8/3 of `dim`, rounded up to a multiple of 256.
    window : int, optional
        In bytes (or patches), the query itself counted; the whole document if None.
    rope_theta, norm_eps : float
    rope_scaling : (float, float, float, float), optional
        That of Llama 3.1: a factor, the turns below which a frequency is divided by it, the turns above which it is
        not, and the length within which turns are counted.

    Raises
    ------
    TypeError, ValueError
        A field has the wrong type or value; the message names it.

    Examples
    --------
    >>> config = TransformerConfig(dim=64, num_layers=2, num_heads=4, num_kv_heads=2)
    >>> config.head_dim, config.hidden_dim
    (16, 256)
    """

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    window: int | None = None
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    rope_scaling: tuple[float, float, float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("dim", "num_layers", "num_heads"):
            _checks.check_int(name, getattr(self, name), 0 if name == "num_layers" else 1)
        for name in ("num_kv_heads", "ffn_dim", "window"):
            if getattr(self, name) is not None:
                _checks.check_int(name, getattr(self, name), 1)
        for name in ("rope_theta", "norm_eps"):
            _checks.check_number(name, getattr(self, name))
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta: expected a finite value > 0, got {self.rope_theta}")
        if not 0 <= self.norm_eps <= _checks.INT64_MAX:  # torch adds no larger int
            raise ValueError(f"norm_eps: expected a value from 0 to 2**63 - 1, got {self.norm_eps}")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim: expected a multiple of 2 * num_heads = {2 * self.num_heads}, got {self.dim}")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.kv_heads}")
        if self.rope_scaling is not None:
            for value in self.rope_scaling:
                _checks.check_number("rope_scaling", value)
            factor, low, high, length = self.rope_scaling
            if not (min(factor, length) > 0 and low < high):
                raise ValueError(f"rope_scaling: expected factor, low < high, length, got {self.rope_scaling}")

    @property
    def head_dim(self) -> int:
        """E, the width of a head."""
        return self.dim // self.num_heads

    @property
    def rotations(self) -> tuple[int, float, tuple[float, float, float, float] | None]:
        """The width of a head, theta and the scaling of the frequencies, on which rotary positions depend."""
        return self.head_dim, self.rope_theta, self.rope_scaling

    @property
    def kv_heads(self) -> int:
        """G, the number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward."""
        return self.ffn_dim or 256 * math.ceil(8 * self.dim / 3 / 256)
