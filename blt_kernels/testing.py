"""Helpers for tests of byte-level kernels: a measure of accuracy, ragged data, and poison for unwritten memory.

The helpers are public, so that users can test code built on blt_kernels with them. They need nothing but torch.
"""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blt_kernels._extension import load_cpu
from blt_kernels.layout import PatchLayout

SCRIPTS = {
    "latin": "All human beings are born free and equal in dignity and rights. Ça va, Zoë? Größe, æther; naïve façade.",
    "greek": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "cyrillic": "Все люди рождаются свободными и равными в своём достоинстве и правах.",
    "hebrew": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "arabic": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "devanagari": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "thai": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "chinese": "人人生而自由,在尊严和权利上一律平等。",
    "japanese": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "korean": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "emoji": "👩‍👩‍👧‍👦 family, 🇪🇺 flag, 👍🏽 thumb — “quotes” … 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "code": "def f(x: int) -> str:\n    return f'{x:>8}' if x else \"\"\t# 1_000 != 1e3\r\n\0",
}
"""These are lines of text in twelve scripts. They hold characters of every length that UTF-8 has."""


# --- accuracy ---------------------------------------------------------------------------------------------------------


def assert_close(
    actual: Tensor | Sequence[Tensor],
    eager: Tensor | Sequence[Tensor],
    truth: Tensor | Sequence[Tensor],
    *,
    factor: float = 2.0,
    name: str = "output",
) -> None:
    """Assert that `actual` is about as accurate as plain PyTorch in the same dtype.

    The errors are those against `truth`. The largest and the root-mean-square error of `actual` may each be `factor`
    times that of `eager` plus one unit in the last place, which is what rounding the exact result may cost on its own:
    ``eps * max|truth|`` and ``eps * rms(truth)``. No tolerance is chosen by hand.

    Parameters
    ----------
    actual, eager : any floating dtype, the same shape and dtype
        The result to judge, and that of plain PyTorch for the same inputs in the same dtype. Lists of results are
        judged as one: the error of a handful of numbers is luck.
    truth : the same shape
        The result for the same inputs in fp64. NaN and infinities must stand at the same places in `actual`.
    factor
        How many times the error of `eager` is allowed.
    name
        What the message calls `actual`.

    Raises
    ------
    AssertionError
        A shape or dtype differs, or an error is too large. The message has the coordinate of the largest error, the
        three values there, and both errors.

    Examples
    --------
    >>> x = torch.rand(100)
    >>> assert_close(x.sum(), x.sum(), x.double().sum())
    """
    results = [[x] if isinstance(x, Tensor) else list(x) for x in (actual, eager, truth)]
    triples = list(zip(*results, strict=True))
    for a, p, e in triples:
        assert a.shape == p.shape == e.shape, f"{name}: shape {list(a.shape)}, expected {list(e.shape)}"
        assert a.dtype == p.dtype, f"{name}: dtype {a.dtype}, expected {p.dtype}"
        odd = ~(a.isfinite() & e.isfinite()) & (a != e) & ~(a.isnan() & e.isnan())
        if odd.any():
            where = _coordinate(odd.int())
            raise AssertionError(f"{name}{list(where)} is {a[where].item()}, expected {e[where].item()}")
    values = [torch.cat([x.detach().double().flatten() for x in result]) for result in results]
    finite = values[2].isfinite()
    if not finite.any():
        return
    eps = torch.finfo(triples[0][0].dtype).eps
    error, eager_error = (values[0] - values[2])[finite].abs(), (values[1] - values[2])[finite].abs()
    size = values[2][finite].abs()
    for measure, of in (("largest", Tensor.max), ("root-mean-square", lambda x: x.square().mean().sqrt())):
        got, own = of(error).item(), of(eager_error).item()
        allowed = factor * own + eps * of(size).item()
        if not got <= allowed:
            errors = [(a.double() - e.double()).abs().nan_to_num(0, 0, 0) for a, _, e in triples]
            worst = max(range(len(errors)), key=lambda i: errors[i].max().item() if errors[i].numel() else -1.0)
            where = _coordinate(errors[worst])
            a, p, e = (x[where].item() for x in triples[worst])
            of_list = f"result {worst}, " if len(triples) > 1 else ""
            raise AssertionError(
                f"{name}: {measure} error {got:.3e}, allowed {allowed:.3e} (eager has {own:.3e}); largest at "
                f"{of_list}{list(where)}: {a:.9g}, eager {p:.9g}, truth {e:.9g}"
            )


def assert_equal(actual: object, expected: object, *, name: str = "output") -> None:
    """Assert that two pytrees of tensors are equal bit for bit. All NaNs are equal.

    Parameters
    ----------
    actual, expected : pytrees
        Leaves that are no tensors are compared with ``==``.
    name
        What the message calls `actual`.

    Raises
    ------
    AssertionError
        The structure, a dtype, a shape or a value differs. The message names the first leaf and coordinate.

    Examples
    --------
    >>> assert_equal([torch.tensor([1.0, torch.nan]), 3], [torch.tensor([1.0, torch.nan]), 3])
    """
    actual_leaves, actual_spec = torch.utils._pytree.tree_flatten(actual)
    expected_leaves, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"{name}: structure {actual_spec}, expected {expected_spec}"
    for i, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if not isinstance(a, Tensor):
            assert a == e, f"{name}, leaf {i}: {a!r}, expected {e!r}"
            continue
        assert a.dtype == e.dtype, f"{name}, leaf {i}: dtype {a.dtype}, expected {e.dtype}"
        assert a.shape == e.shape, f"{name}, leaf {i}: shape {list(a.shape)}, expected {list(e.shape)}"
        differs = (a != e) & ~((a != a) & (e != e))
        if differs.any():
            where = _coordinate(differs.int())
            count = int(differs.sum())
            raise AssertionError(f"{name}, leaf {i}{list(where)}: {a[where]}, expected {e[where]} ({count} differ)")


def _coordinate(x: Tensor) -> tuple[int, ...]:
    """Return the index of the largest entry of `x`."""
    return tuple(int(i) for i in torch.unravel_index(x.argmax(), x.shape))


# --- unwritten memory -------------------------------------------------------------------------------------------------


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill memory from `torch.empty` with NaN, or with the largest integer, inside the context.

    Outputs that a kernel does not write show: every allocation through torch's dispatcher is filled, and those of the
    compiled kernels. It switches torch's deterministic mode on, and its errors to warnings.

    Returns
    -------
    context manager

    Examples
    --------
    >>> with poisoned_empty():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic  # a module whose attributes are properties
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    path = load_cpu().path
    poison = ctypes.c_bool.in_dll(ctypes.CDLL(path), "blt_kernels_poison_outputs") if path else ctypes.c_bool()
    poisoned, poison.value = poison.value, True
    try:
        yield
    finally:
        poison.value = poisoned
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        deterministic.fill_uninitialized_memory = fill


# --- ragged data ------------------------------------------------------------------------------------------------------


def document_lengths(num_bytes: int, seed: int = 0) -> list[int]:
    """Return random lengths of documents: an empty one, and as far as they fit one-byte, short and a long one.

    Parameters
    ----------
    num_bytes : int
        The sum of the lengths.
    seed : int

    Returns
    -------
    list of int

    Examples
    --------
    >>> sum(document_lengths(1000)), min(document_lengths(1000))
    (1000, 0)
    """
    rng = random.Random(seed)
    lengths = [0]
    for short in (1, 2, 3, 1, 5 + rng.randrange(30), 1 + rng.randrange(200)):
        if sum(lengths) + short <= num_bytes // 2:
            lengths.append(short)
    lengths.append(num_bytes - sum(lengths))
    rng.shuffle(lengths)
    return lengths


def offsets_of(lengths: Sequence[int], *, dtype: torch.dtype = torch.int32, device: str = "cpu") -> Tensor:
    """Return document offsets, the `cu_seqlens` of every op.

    Parameters
    ----------
    lengths : B ints
    dtype : torch.dtype
    device : str

    Returns
    -------
    `dtype` ``[B+1]``

    Examples
    --------
    >>> offsets_of([2, 0, 3])
    tensor([0, 2, 2, 5], dtype=torch.int32)
    """
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def ragged_layout(
    num_bytes: int, seed: int = 0, *, mean: float = 4.5, max_patches: int | None = None, device: str = "cpu"
) -> PatchLayout:
    """Return random patches of the documents of `document_lengths`.

    Parameters
    ----------
    num_bytes, seed : int
    mean : float
        Mean length of a patch in bytes.
    max_patches : int, optional
        The capacity; `num_bytes` if None.
    device : str

    Returns
    -------
    PatchLayout

    Examples
    --------
    >>> layout = ragged_layout(1000)
    >>> layout.num_bytes, layout.capacity
    (1000, 1000)
    """
    generator = torch.Generator().manual_seed(seed)
    boundaries = torch.rand(num_bytes, generator=generator) < 1 / mean
    cu_seqlens = offsets_of(document_lengths(num_bytes, seed))
    return PatchLayout.from_cuts(boundaries.to(device), cu_seqlens.to(device), max_patches)


def ragged_logits(
    shape: Sequence[int],
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    surprise: float = 1 / 4.5,
) -> Tensor:
    """Return random logits whose entropies are distributed like those of a byte model.

    Parameters
    ----------
    shape : sequence of int
        ``[..., A]``.
    seed : int
    dtype : torch.dtype
    device : str
    surprise : float
        Share of the bytes with an entropy above BLT's threshold of 1.335 nats at A = 260: patches have
        ``1 / surprise`` bytes on average. Hardly any entropy is close to the threshold.

    Returns
    -------
    `dtype` `shape`

    Examples
    --------
    >>> ragged_logits([100, 260]).shape
    torch.Size([100, 260])
    """
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.empty(*shape, device=device).normal_(generator=generator)
    flat = torch.rand(*shape[:-1], 1, generator=generator, device=device) < surprise
    # 260 normal logits of deviation up to 1.5 have about 4.4 nats or more. With a peak of 16 nearly all have under 0.2.
    spread = torch.where(flat, 0.5, 1.0) + torch.rand(*shape[:-1], 1, generator=generator, device=device)
    x *= spread
    if shape[-1] > 1:
        peak = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator, device=device)
        x.scatter_add_(-1, peak, torch.where(flat, 0.0, 16.0))
    return x.to(dtype)


def real_text(num_bytes: int, seed: int = 0) -> bytes:
    """Return text: sources of Python's standard library, with the `SCRIPTS` before every tenth file.

    Where Python's test data for Asian encodings is installed, its UTF-8 files follow the scripts.

    Parameters
    ----------
    num_bytes, seed : int

    Returns
    -------
    bytes

    Examples
    --------
    >>> len(real_text(1000))
    1000
    """
    rng = random.Random(seed)
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    encoded = sorted((Path(os.__file__).parent / "test" / "cjkencodings").glob("*utf8.txt"))
    scripts = "\n".join(SCRIPTS.values()).encode() + b"".join(path.read_bytes() for path in encoded)
    out, turn = bytearray(), 0
    while len(out) < num_bytes:
        out += rng.choice(sources).read_bytes() if turn % 10 else scripts
        turn += 1
    return bytes(out[:num_bytes])


def invalid_utf8(num_bytes: int, seed: int = 0) -> bytes:
    r"""Return random bytes of text in many scripts, some with a flipped bit, which are no UTF-8.

    Parameters
    ----------
    num_bytes, seed : int

    Returns
    -------
    bytes

    Examples
    --------
    >>> invalid_utf8(2)
    b'\xff\x80'
    """
    rng = random.Random(seed)
    text = "".join(SCRIPTS.values()).encode()
    out = bytearray(b"\xff\x80\xc3"[:num_bytes])
    while len(out) < num_bytes:
        byte = text[rng.randrange(len(text))]
        out.append(byte ^ (1 << rng.randrange(8)) if rng.random() < 0.2 else byte)
    return bytes(out)


def binary(num_bytes: int, seed: int = 0) -> bytes:
    """Return uniform random bytes with runs of zeros, as executables have.

    Parameters
    ----------
    num_bytes, seed : int

    Returns
    -------
    bytes

    Examples
    --------
    >>> len(binary(1000)), len(set(binary(1000))) > 200
    (1000, True)
    """
    rng = random.Random(seed)
    out = bytearray()
    while len(out) < num_bytes:
        out += bytes(rng.randrange(40)) if rng.random() < 0.3 else rng.randbytes(1 + rng.randrange(40))
    return bytes(out[:num_bytes])
