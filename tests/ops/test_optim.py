"""The optimizers: against torch's own, in every dtype, and in how much memory they need; what the CUDA kernels move."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backends
import pytest
import torch
from torch import Tensor

import blt_kernels as bk
from blt_kernels.cli import bench
from blt_kernels.reference import optim as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sparse(
    rows: list[int], width: int, size: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Tensor:
    values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows], device=device), values, (size, width), check_invariants=False)


def table_of(size: int, width: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(size, width, generator=torch.Generator().manual_seed(9)).to(device, dtype).requires_grad_()


def test_sgd_is_that_of_torch(device: str) -> None:
    ours, theirs = table_of(20, 5, device=device), table_of(20, 5, device=device)
    steps = [(bk.optim.SGD([ours], lr=0.3), ours), (torch.optim.SGD([theirs], lr=0.3), theirs)]
    for seed, rows in enumerate(([1, 4, 19], [0, 4], [])):
        for optimizer, table in steps:
            table.grad = sparse(rows, 5, 20, seed=seed, device=device)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_rowwise_adagrad_of_one_column_is_adagrad(device: str) -> None:
    ours, theirs = table_of(9, 1, device=device), table_of(9, 1, device=device)
    options = {"lr": 0.3, "eps": 1e-3, "initial_accumulator_value": 0.5}
    steps = [(bk.optim.RowwiseAdagrad([ours], **options), ours), (torch.optim.Adagrad([theirs], **options), theirs)]
    for seed in range(4):
        for optimizer, table in steps:
            table.grad = sparse([0, 2 + seed, 8], 1, 9, seed=seed, device=device)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_rowwise_adagrad_by_hand(device: str) -> None:
    table = torch.zeros(3, 2, device=device, requires_grad=True)
    optimizer = bk.optim.RowwiseAdagrad([table], lr=1.0, eps=0.0)
    for _ in range(2):  # mean(g**2) = (9 + 16) / 2 both times
        table.grad = torch.sparse_coo_tensor([[1]], [[3.0, 4.0]], (3, 2), device=device)
        optimizer.step()
    torch.testing.assert_close(optimizer.state[table]["sum"].cpu(), torch.tensor([0.0, 25.0, 0.0]))
    root = 12.5**0.5
    expected = -torch.tensor([3.0, 4.0]) * (1 / root + 1 / 5.0)
    torch.testing.assert_close(table.detach().cpu(), torch.stack((torch.zeros(2), expected, torch.zeros(2))))


@pytest.mark.parametrize("margin", [3, 8])
@pytest.mark.parametrize("width", [1, 7, 64, 1000, 1600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_their_references(dtype: torch.dtype, width: int, margin: int, device: str) -> None:
    """In rows of a larger tensor, aligned to 16 bytes or not."""
    rows = torch.arange(1, 150, 3, device=device)
    generator = torch.Generator().manual_seed(width)
    values = torch.randn(rows.shape[0], width, generator=generator).to(device, dtype)
    wide = torch.randn(200, width + margin, generator=generator).to(device, dtype)
    sums = torch.rand(200, generator=generator).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
    for step, extra in (("sgd_step", []), ("rowwise_adagrad_step", [1e-6])):
        results = []
        for function in (getattr(torch.ops.blt_kernels, step), getattr(reference, f"{step}_reference")):
            memory, state = wide.clone(), sums.clone()
            table = memory[:, :width]  # these are rows of a larger tensor
            function(table, *([state] if extra else []), rows, values, 0.25, *extra)
            results.append((memory, state))
        torch.testing.assert_close(results[0], results[1])


def test_rows_without_a_gradient_stay_and_uncoalesced_gradients_add_up(device: str) -> None:
    for make in (bk.optim.SGD, bk.optim.RowwiseAdagrad):
        once, twice = table_of(6, 3, device=device), table_of(6, 3, device=device)
        before = once.detach().clone()
        once.grad = sparse([2, 2], 3, 6, device=device).coalesce()
        twice.grad = sparse([2, 2], 3, 6, device=device)
        make([once]).step()
        make([twice]).step()
        torch.testing.assert_close(once, twice)
        changed = (once != before).any(1)
        assert changed.tolist() == [False, False, True, False, False, False]


def test_groups_schedulers_and_closures() -> None:
    fast, slow = table_of(4, 2), table_of(4, 2)
    optimizer = bk.optim.SGD([{"params": [fast], "lr": 1.0}, {"params": [slow]}], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    start = fast.detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        rows = torch.tensor([1])
        loss = sum(torch.nn.functional.embedding(rows, t, sparse=True).sum() for t in (fast, slow))
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    torch.testing.assert_close(fast.detach()[1], start[1] - 1.0)
    torch.testing.assert_close(slow.detach()[1], start[1] - 0.5)
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(fast.detach()[1], start[1] - 1.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_loaded_state_goes_on_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    def run(table: Tensor, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            table.grad = sparse([0, 3 + seed], 4, 9, dtype, seed)
            optimizer.step()

    whole, part = table_of(9, 4, dtype), table_of(9, 4, dtype)
    reference_run = bk.optim.RowwiseAdagrad([whole], lr=0.1)
    run(whole, reference_run, range(4))
    first = bk.optim.RowwiseAdagrad([part], lr=0.1)
    run(part, first, range(2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = bk.optim.RowwiseAdagrad([part], lr=7.0)  # what is loaded overwrites lr
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.state[part]["sum"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    run(part, second, range(2, 4))
    assert torch.equal(whole, part)
    assert torch.equal(reference_run.state[whole]["sum"], second.state[part]["sum"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bk.optim.SGD([table_of(3, 2)], lr=-1.0), ValueError, "lr: expected a value >= 0, got -1.0"),
        (lambda: bk.optim.SGD([table_of(3, 2)], lr="fast"), TypeError, "lr: expected a number, got 'fast'"),
        (lambda: bk.optim.RowwiseAdagrad([table_of(3, 2)], eps=-1.0), ValueError, "eps: expected a value >= 0"),
        (lambda: bk.optim.SGD([torch.zeros(3, requires_grad=True)]), ValueError, "params: expected 2 dimensions"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_dense_gradient_is_refused() -> None:
    table = table_of(3, 2)
    table.grad = torch.ones(3, 2)
    with pytest.raises(TypeError, match="expected sparse gradients of rows"):
        bk.optim.SGD([table]).step()


@pytest.mark.parametrize("rows", [[3, 1], [1, 1], [-1], [10]])
def test_kernels_refuse_rows_that_are_not_rising_or_not_there(rows: list[int]) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("blt_kernels::sgd_step", "CPU"):
        pytest.skip("no compiled module")
    arguments = torch.tensor(rows), torch.ones(len(rows), 2)
    with pytest.raises(RuntimeError, match="rows: expected rising rows below 10"):
        torch.ops.blt_kernels.sgd_step(torch.ones(10, 2), *arguments, 0.1)
    with pytest.raises(RuntimeError, match="rows: expected rising rows below 10"):
        torch.ops.blt_kernels.rowwise_adagrad_step(torch.ones(10, 2), torch.ones(10), *arguments, 0.1, 0.1)


@pytest.mark.parametrize("step", ["sgd_step", "rowwise_adagrad_step"])
def test_opcheck(step: str) -> None:
    sums = [torch.ones(10)] if step == "rowwise_adagrad_step" else []
    extra = [1e-3] if sums else []
    arguments = (torch.ones(10, 4), *sums, torch.tensor([2, 5]), torch.ones(2, 4), 0.1, *extra)
    torch.library.opcheck(getattr(torch.ops.blt_kernels, step).default, arguments)


@pytest.mark.parametrize("make", [bk.optim.SGD, bk.optim.RowwiseAdagrad])
def test_a_training_step_needs_no_second_table(
    make: Callable[..., torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(bench.SOURCE))
    memory = importlib.import_module("memory")
    width, rows, bytes_read = 64, 50_000, 300
    tables = torch.randn(6 * rows, width, requires_grad=True)  # they take 77 MB
    byte_table = torch.randn(260, width, requires_grad=True)
    tokens = torch.randint(4, 260, (bytes_read,))
    optimizer = make([tables, byte_table])

    def train() -> None:
        optimizer.zero_grad()
        bk.ngram_hash_embed(tokens, tables, byte_table, grad="sparse").square().sum().backward()
        optimizer.step()

    train()  # the first step makes the state
    if torch._C._dispatch_has_kernel_for_dispatch_key("blt_kernels::sgd_step", "CPU"):
        per_byte = 4 * width * (7 + 4)  # counts the gradient, and the output with what autograd keeps of it
        assert memory.peak_extra_bytes(train) < 4 * bytes_read * per_byte
    before = tables.detach().clone()
    train()
    assert 0 < int((before != tables).any(1).sum()) <= 6 * bytes_read


# --- the CUDA kernels on the emulator ---------------------------------------------------------------------------------


def emulated_step(step: str, table: Tensor, rows: Tensor, values: Tensor) -> tuple[Tensor, list[Any]]:
    """Return the sums after a step, which SGD has not, and its launches."""
    sums = torch.ones(table.shape[0])
    backends.emulator().take_launches()
    extra = ([sums], [1e-6]) if step == "rowwise_adagrad_step" else ([], [])
    getattr(torch.ops.blt_emulated, step)(table, *extra[0], rows, values, 0.25, *extra[1])
    return sums, backends.emulator().take_launches()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("step", "state"), [("sgd_step", 0), ("rowwise_adagrad_step", 8)])
def test_traffic(step: str, state: int, dtype: torch.dtype) -> None:
    """A row of values read, a row of the table read and written, once."""
    backends.emulator()
    count, width = 100, 1536
    table, values = torch.ones(300, width, dtype=dtype), torch.ones(count, width, dtype=dtype)
    _, launches = emulated_step(step, table, torch.arange(0, 300, 3), values)
    minimum = count * (3 * width * dtype.itemsize + 8 + state)
    assert len(launches) == 1
    assert 0.9 * minimum <= sum(x.read + x.written for x in launches) <= 1.1 * minimum


@pytest.mark.parametrize("step", ["sgd_step", "rowwise_adagrad_step"])
def test_every_order_gives_the_same_and_rows_that_are_not_there_are_left_out(step: str) -> None:
    backends.emulator()
    results = []
    for order in ("FORWARD", "BACKWARD", "RANDOM"):
        table, values = table_of(50, 300).detach(), table_of(20, 300).detach()
        rows = torch.cat((torch.tensor([-1, -(2**62)]), torch.arange(16) * 3, torch.tensor([50, 2**62])))
        before = table.clone()
        with backends.order(order, seed=3):
            sums, _ = emulated_step(step, table, rows, values)
        assert torch.equal((table != before).any(1).nonzero()[:, 0], rows[2:18])
        results.append((table, sums))
    for table, sums in results[1:]:
        assert torch.equal(table, results[0][0])
        assert torch.equal(sums, results[0][1])
