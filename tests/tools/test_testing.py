"""The means of testing are tested too: each must fail on what it is there to find."""

from __future__ import annotations

import ctypes

import pytest
import torch

from blt_kernels import token_entropy
from blt_kernels._extension import load_cpu
from blt_kernels.models.config import RELEASED_THRESHOLD
from blt_kernels.testing import (
    assert_close,
    assert_equal,
    binary,
    document_lengths,
    invalid_utf8,
    offsets_of,
    poisoned_empty,
    ragged_layout,
    ragged_logits,
    real_text,
)

TRUTH = torch.linspace(1, 1.999, 100, dtype=torch.float64)
EAGER = TRUTH.float() * (1 + 1e-6)


def test_assert_close_lets_twice_the_eager_error_pass():
    assert_close(TRUTH.float() * (1 - 1.9e-6), EAGER, TRUTH)
    with pytest.raises(AssertionError, match=r"y: largest error 4\.\d+e-06.*eager has 1\.9\d+e-06.*at \[9\d\]: 1\.9"):
        assert_close(TRUTH.float() * (1 + 2.3e-6), EAGER, TRUTH, name="y")


def test_assert_close_finds_a_small_error_everywhere():
    eager = TRUTH.float()
    eager[0] += 1e-3
    with pytest.raises(AssertionError, match="root-mean-square"):
        assert_close(TRUTH.float() + 5e-4, eager, TRUTH)


def test_assert_close_finds_one_wrong_element():
    actual = EAGER.clone().view(10, 10)
    actual[3, 7] += 1e-4
    with pytest.raises(AssertionError, match=r"\[3, 7\]"):
        assert_close(actual, EAGER.view(10, 10), TRUTH.view(10, 10))


def test_assert_close_judges_lists_together():
    few, few_truth = torch.tensor([1.0]), torch.ones(1, dtype=torch.float64)
    assert_close([EAGER, few + 1e-6], [EAGER, few], [TRUTH, few_truth])
    with pytest.raises(AssertionError, match=r"result 1, \[0\]"):
        assert_close([EAGER, few + 1e-3], [EAGER, few], [TRUTH, few_truth])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_assert_close_wants_nan_and_inf_at_their_places(odd: float):
    truth = TRUTH.clone()
    truth[5] = odd
    right = EAGER.clone()
    right[5] = odd
    assert_close(right, right, truth)
    with pytest.raises(AssertionError, match=r"\[5\]"):
        assert_close(EAGER, right, truth)
    with pytest.raises(AssertionError, match=r"\[5\]"):
        assert_close(right, EAGER, TRUTH)


def test_assert_close_wants_the_dtype_and_the_shape():
    with pytest.raises(AssertionError, match="dtype"):
        assert_close(EAGER.double(), EAGER, TRUTH)
    with pytest.raises(AssertionError, match="shape"):
        assert_close(EAGER[:-1], EAGER, TRUTH)
    assert_close(EAGER[:0], EAGER[:0], TRUTH[:0])


def test_assert_equal():
    x = torch.tensor([1.0, float("nan")])
    assert_equal({"a": [x, 1]}, {"a": [x.clone(), 1]})
    for other in (torch.tensor([1.0, 2.0]), x.double(), x[:1]):
        with pytest.raises(AssertionError):
            assert_equal(x, other)
    with pytest.raises(AssertionError, match=r"leaf 1\[2\]: 3, expected 2 \(1 differ\)"):
        assert_equal([x, torch.tensor([0, 1, 3])], [x, torch.tensor([0, 1, 2])])


def forgets_the_tail(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[: x.shape[0] - 1] = x[:-1] * 2
    return out


def test_poison_shows_what_an_op_forgets():
    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_empty():
        assert forgets_the_tail(torch.ones(64))[-1].isnan()
        assert forgets_the_tail(torch.ones(64, dtype=torch.int32))[-1] == torch.iinfo(torch.int32).max
        assert torch.ones(3).new_empty(5).isnan().all()
        assert torch.empty_strided((3, 2), (1, 3)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(load_cpu().path is None, reason="needs the compiled module")
def test_poison_reaches_the_compiled_kernels():
    def poisons() -> bool:
        return ctypes.c_bool.in_dll(ctypes.CDLL(load_cpu().path), "blt_kernels_poison_outputs").value

    with poisoned_empty():
        with poisoned_empty():
            assert poisons()
        assert poisons()
    assert not poisons()


def test_documents_are_ragged():
    assert document_lengths(0) == [0, 0]
    for num_bytes in (1, 2, 10, 1000):
        lengths = document_lengths(num_bytes, seed=num_bytes)
        assert sum(lengths) == num_bytes
        assert min(lengths) == 0
    assert {0, 1, 2, 3} < set(document_lengths(1000))
    assert offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5]
    assert offsets_of([], dtype=torch.int64).tolist() == [0]


def test_patches_have_the_asked_length():
    layout = ragged_layout(20000, mean=4.5)
    assert 4.3 < layout.num_bytes / int(layout.num_patches) < 4.7
    above = (token_entropy(ragged_logits((2, 10000, 260))) > RELEASED_THRESHOLD).float().mean()
    assert 4.3 < 1 / above < 4.7


def test_logits_are_the_same_in_every_dtype():
    low = ragged_logits((3, 5), 1, dtype=torch.bfloat16)
    assert_equal(low, ragged_logits((3, 5), 1).bfloat16())


def test_bytes():
    assert len(real_text(100_000, 3)) == 100_000
    assert real_text(40_000, 3) == real_text(40_000, 3) != real_text(40_000, 4)
    for seed in range(5):
        broken = invalid_utf8(50, seed)
        assert len(broken) == 50
        with pytest.raises(UnicodeDecodeError):
            broken.decode()
    assert len(set(binary(5000))) == 256
    assert real_text(0) == invalid_utf8(0) == binary(0) == b""
