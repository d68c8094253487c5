"""Times ``generate()`` of transformers' BLT under `apply`, beside the same model without: it has no cache that works.

A call reads a prompt and writes behind it. A logits processor notes the most probable byte of every step and puts the
next byte of the text in its place: the weights are random, and so patches are as long as those of text.

The work is what the steps must read, as in ``bench_generate.py``, without the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timing
import torch
from bench_generate import LIMIT_SHAPE, PATCH_SIZE, Case, Steps, millions, text
from common import normal
from peers import models as peers
from timing import OURS, Comparison, Make
from torch import Tensor

OP = "transformers generate"
CASES = (Case(1, 512, 32),)
SMALL = (Case(1, 20, 3),)


def comparisons(*, small: bool = False, device: str = "cpu", compile_peers: bool = True) -> Iterator[Make]:
    """Yield one comparison for each number of bytes."""
    for case in SMALL if small else CASES:
        yield partial(generation, case, device, small)


def generation(case: Case, device: str, small: bool) -> Comparison:
    """Compare a model that `apply` has changed with one that it has not."""
    from blt_kernels.integrations import transformers as integration

    tokens = text(case.rows, case.length + case.new).to(device)
    theirs = peers.transformers_blt(tokens, PATCH_SIZE, peers.SMALLEST if small else peers.SMALL)
    if theirs is None:
        raise ImportError("this bench compares with transformers: pip install transformers")
    model = copy.deepcopy(theirs)
    integration.apply(model)
    ours = Steps(peers.with_weights_of(theirs, device), tokens, case)
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: partial(generate, model, tokens, case),
        "transformers": partial(generate, theirs, tokens, case, use_cache=False),
    }

    def agree(results: dict[str, Any]) -> None:
        assert torch.equal(results[OURS], results["transformers"]), "the models choose other bytes"

    matrix, vector = normal(*LIMIT_SHAPE, device=device), normal(LIMIT_SHAPE[1], device=device)
    return Comparison(
        OP,
        f"{millions(ours.model)} parameters, {case.shape}",
        "float32",
        calls,
        ours.work(),
        {"matrix-vector product": lambda: torch.mv(matrix, vector), **timing.reads(matrix)},
        matrix.nbytes,
        agree,
        device=device,
    )


def generate(model: Any, tokens: Tensor, case: Case, **options: Any) -> Tensor:
    """Return the bytes that the model would write after each byte of the text, ``[rows, new]``."""
    chosen = []

    def follow_text(ids: Tensor, scores: Tensor) -> Tensor:
        chosen.append(scores.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, ids.shape[1], None], 0.0)

    prompt = tokens[:, : case.length]
    options |= {"max_new_tokens": case.new, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), logits_processor=[follow_text], **options)
    return torch.stack(chosen, 1)


def remarks(rows: list[timing.Row]) -> list[str]:
    """Return no remarks: the table shows everything."""
    return []


def test_transformers_generate(run_benchmark: Callable[[], None]) -> None:
    run_benchmark()
