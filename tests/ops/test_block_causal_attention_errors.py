"""block_causal_attention: wrong arguments are named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blt_kernels import AttentionRanges, attention_ranges, block_causal_attention

PACKED = {name: torch.zeros(6, 4 if name == "q" else 2, 8) for name in "qkv"}
PADDED = {name: torch.zeros(2, 3, 4, 8) for name in "qkv"}
CU = torch.tensor([0, 2, 6])
RANGES = AttentionRanges(torch.zeros(32, dtype=torch.int32), 6, 6, None, True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 1}, TypeError, "q: expected a tensor, got int"),
        ({"q": torch.zeros(6, 4, 8).int()}, TypeError, "q: expected dtype in float32.*got torch.int32"),
        ({"q": torch.zeros(6, 32)}, ValueError, r"q: expected 3 or 4 dimensions, got shape \[6, 32\]"),
        (
            {"q": torch.zeros(6, 4, 0), "k": torch.zeros(6, 2, 0), "v": torch.zeros(6, 2, 0)},
            ValueError,
            "q: expected at",
        ),
        ({"k": torch.zeros(1, 6, 2, 8)}, ValueError, r"k: expected 3 dimensions, got shape \[1, 6, 2, 8\]"),
        ({"k": torch.zeros(6, 2, 8).double()}, TypeError, "k: expected dtype torch.float32 of q, got torch.float64"),
        ({"v": torch.zeros(6, 2, 8, device="meta")}, ValueError, "v: expected device cpu of q, got meta"),
        ({"k": torch.zeros(6, 2, 9)}, ValueError, r"k: expected the head width E = 8 of q, got shape \[6, 2, 9\]"),
        ({"v": torch.zeros(6, 4, 8)}, ValueError, r"v: expected shape \[6, 2, 8\] of k, got \[6, 4, 8\]"),
        (
            {"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)},
            ValueError,
            "k: expected a number of heads G that divides H = 4, got 3",
        ),
        (
            {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)},
            ValueError,
            "cu_seqlens_k: expected offsets, since q has 6 rows and k 5; got None",
        ),
        ({"cu_seqlens_q": torch.tensor([0, 7])}, ValueError, "cu_seqlens_q: expected offsets .* at most at 6, got"),
        ({"cu_seqlens_q": CU.float()}, TypeError, "cu_seqlens_q: expected dtype in int32, int64, got torch.float32"),
        ({"cu_seqlens_k": torch.tensor([0, 7, 8])}, ValueError, "cu_seqlens_k: expected offsets .* at most at 6, got"),
        (
            {"cu_seqlens_k": torch.tensor([0, 6])},
            ValueError,
            "cu_seqlens_k: expected 3 entries, as cu_seqlens_q has, got 2",
        ),
        (
            {"cu_seqlens_q": None, "cu_seqlens_k": CU},
            ValueError,
            "cu_seqlens_k: expected None, since cu_seqlens_q is None",
        ),
        ({**PADDED, "cu_seqlens_q": CU}, ValueError, "cu_seqlens_q: expected None, since q is padded"),
        (
            {**PADDED, "cu_seqlens_q": None, "cu_seqlens_k": CU},
            ValueError,
            "cu_seqlens_k: expected None, since q is padded",
        ),
        (
            {**PADDED, "q": torch.zeros(1, 3, 4, 8), "cu_seqlens_q": None},
            ValueError,
            r"k: expected the B = 1 documents of q, got shape \[2, 3, 4, 8\]",
        ),
        ({"ranges": torch.zeros(32).int()}, TypeError, "ranges: expected an AttentionRanges, got Tensor"),
        ({"ranges": replace(RANGES, num_keys=5)}, ValueError, "of 6 queries and 6 keys, got 6 queries and 5 keys"),
        ({"ranges": replace(RANGES, num_queries=7)}, ValueError, "of 6 queries and 6 keys, got 7 queries and 6 keys"),
        ({"ranges": replace(RANGES, window=3)}, ValueError, "window = None and .* True, got window = 3 and causal = T"),
        ({"ranges": RANGES, "causal": False}, ValueError, "ranges: expected those of .* False, got .* = True"),
        (
            {"ranges": replace(RANGES, intervals=RANGES.intervals.to("meta"))},
            ValueError,
            "ranges: expected device cpu of q, got meta",
        ),
        ({"window": 0}, ValueError, "window: expected a value >= 1, got 0"),
        ({"window": 1.5}, TypeError, "window: expected an int, got 1.5"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got 1"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got '1'"),
        ({"seqused_k": [2, 4]}, TypeError, "seqused_k: expected a tensor, got list"),
        (
            {"seqused_k": torch.tensor([2.0, 4.0])},
            TypeError,
            "seqused_k: expected dtype in int32, int64, got torch.float32",
        ),
        ({"seqused_k": torch.tensor([2])}, ValueError, "seqused_k: expected one entry for each of 2 documents, got 1"),
        (
            {"seqused_k": torch.tensor([2, 5])},
            ValueError,
            "seqused_k: expected 0 to 4 keys, the length of document 1, got 5",
        ),
        ({"seqused_k": torch.tensor([-1, 4])}, ValueError, "seqused_k: expected 0 to 2 keys.*document 0, got -1"),
        ({"seqused_k": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, "seqused_k: expected device cpu"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        block_causal_attention(**{**PACKED, "cu_seqlens_q": CU, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_queries": -1}, ValueError, "num_queries: expected a value >= 0, got -1"),
        ({"num_queries": 5}, ValueError, "cu_seqlens_q: expected offsets .* at most at 5, got"),
        ({"num_keys": 7}, ValueError, "num_keys: expected num_queries = 6, since cu_seqlens_k is None; got 7"),
        ({"cu_seqlens_k": CU}, ValueError, "num_keys: expected an int, since cu_seqlens_k is not None; got None"),
        ({"cu_seqlens_k": torch.tensor([0, 6]), "num_keys": 6}, ValueError, "cu_seqlens_k: expected 3 entries"),
        ({"cu_seqlens_q": [0, 6]}, TypeError, "cu_seqlens_q: expected a tensor, got list"),
        ({"window": 0}, ValueError, "window: expected a value >= 1, got 0"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got 1"),
        ({"seqused_k": torch.tensor([3, 4])}, ValueError, "seqused_k: expected 0 to 2 keys"),
    ],
)
def test_errors_of_ranges(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention_ranges(**{"cu_seqlens_q": CU, "num_queries": 6, **change})
