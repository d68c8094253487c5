"""The emulator runs sound kernels as a GPU would, and names kernel, block and thread of each injected fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import emulator, order
from torch import Tensor

# The error of a kernel says this after the place.
FAULTS = {
    "divergent_barrier": r"fault_injection.cpp:\d+: a barrier that 1 of 64 threads do not reach",
    "two_barriers": r"fault_injection.cpp:\d+: a barrier while other threads are at that of fault_injection.cpp:\d+",
    "exited_lane": r"device.cuh:\d+: lane 3 of the mask has ended",
    "missing_lane": r"fault_injection.cpp:\d+: waits for lanes of its mask that do not come",
    "outside_mask": r"fault_injection.cpp:\d+: a value from lane 20, which is not in the mask 0xffff",
    "not_in_mask": r"fault_injection.cpp:\d+: its own lane is not in the mask",
    "different_collectives": r"fault_injection.cpp:\d+: other lanes of the mask do something else",
    "unwritten_static": r"shared memory read before it was written, 4 bytes at 0x",
    "unwritten_dynamic": r"shared memory read before it was written, 4 bytes at 0x",
    "other_blocks_shared": r"shared memory read before it was written, 4 bytes at 0x",
    "too_little_shared": r"wants 4096 bytes of shared memory, was launched with 8",
    "early_copy": r"shared memory read before it was written, 4 bytes at 0x",
    "read_behind": r"a read outside of every tensor, 4 bytes at 0x",
    "read_before": r"a read outside of every tensor, 4 bytes at 0x",
    "write_behind": r"a write outside of every tensor, 4 bytes at 0x",
    "write_input": r"a write of a tensor that is only read, 4 bytes at 0x",
    "null": r"a read outside of every tensor, 4 bytes at 0",
    "waiting_block": r"waits for a block that has not run",
    "misaligned": r"an access out of alignment, 16 bytes at 0x",
}


def inject(name: str, x: Tensor) -> Tensor:
    emulator()
    return torch.ops.blt_emulated.inject_fault(name, x)


@pytest.fixture(params=["FORWARD", "BACKWARD", "RANDOM"], autouse=True)
def _order(request: pytest.FixtureRequest) -> Iterator[None]:
    with order(request.param, seed=5):
        yield


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(name: str) -> None:
    where = rf"blt::.*{name}_kernel, block \(\d, 0, 0\), thread \(\d+, 0, 0\): "
    with pytest.raises(RuntimeError, match=where + FAULTS[name]):
        inject(name, torch.ones(100))


def test_a_fault_leaves_the_emulator_usable() -> None:
    x = torch.arange(128.0)
    for name in FAULTS:
        with pytest.raises(RuntimeError):
            inject(name, x)
        assert torch.equal(inject("block_sum", x), x.view(2, 64).sum(1).repeat_interleave(64))


@pytest.mark.parametrize("n", [1, 31, 64, 65, 200])
def test_barriers_and_shared_memory(n: int) -> None:
    x = torch.arange(float(n))
    padded = torch.nn.functional.pad(x, (0, -n % 64)).view(-1, 64)
    assert torch.equal(inject("block_sum", x), padded.sum(1).repeat_interleave(64)[:n])


@pytest.mark.parametrize("n", [1, 16, 33, 64, 130])
def test_shuffles_in_parts_of_a_warp(n: int) -> None:
    x = torch.arange(float(n))
    padded = torch.nn.functional.pad(x, (0, -n % 16)).view(-1, 16)
    assert torch.equal(inject("half_warp", x), padded.sum(1).repeat_interleave(16)[:n])


@pytest.mark.parametrize("n", [1, 64, 130])
def test_asynchronous_copies(n: int) -> None:
    x = torch.randn(n)
    assert torch.equal(inject("copies", x), 2 * x)


def test_votes_and_atomics() -> None:
    x = torch.randn(150)
    padded = torch.nn.functional.pad(x, (0, 42)).view(-1, 64)
    expected = (padded > 0).sum(1) + 64000.0
    assert torch.equal(inject("counts", x), expected.repeat_interleave(64)[:150])


def test_orders_reveal_races() -> None:
    x = torch.arange(128.0)
    seen = []
    for name in ("FORWARD", "BACKWARD"):
        with order(name):
            seen.append(inject("race", x))
    assert not torch.equal(*seen)


def test_traffic_is_counted_in_sectors() -> None:
    module = emulator()
    module.take_launches()
    inject("half_warp", torch.ones(256))
    (launch,) = module.take_launches()
    assert "half_warp_kernel" in launch.kernel
    assert (launch.grid, launch.block) == ((4, 1), 64)
    assert launch.loaded == launch.stored == 1024
    assert 1024 <= launch.read <= 1024 + 4 * 32  # a tensor may begin inside a sector
    assert 1024 <= launch.written <= 1024 + 4 * 32
    assert module.take_launches() == []


@pytest.mark.parametrize("n", [1, 64, 300])
def test_the_longest_thread_is_counted(n: int) -> None:
    module = emulator()
    module.take_launches()
    inject("one_thread", torch.ones(n))  # one thread of the grid loads all of x and stores once
    inject("vectors", torch.ones(n))  # a thread loads and stores 16 bytes
    inject("half_warp", torch.ones(n))  # every thread loads and stores once
    inject("block_sum", torch.ones(n))  # thread 0 makes 6 sums of 2 loads and a store, besides x and the result
    one_thread, vectors, half_warp, block_sum = (launch.longest for launch in module.take_launches())
    assert one_thread == n + 1
    assert vectors == (2 if n >= 4 else 0)
    assert half_warp == 2
    assert block_sum == 1 + 1 + 6 * 3 + 1 + 1


def test_zeroing_is_counted_as_a_launch() -> None:
    module = emulator()
    module.take_launches()
    assert inject("zero", torch.ones(100)).tolist() == [0.0] * 100
    (launch,) = module.take_launches()
    assert (launch.kernel, launch.read, launch.written, launch.stored) == ("memset", 0, 416, 400)
    assert inject("zero", torch.ones(0)).numel() == 0
    assert module.take_launches() == []


def test_every_kernel_is_known_by_name() -> None:
    names = emulator().kernels()
    assert len(names) == len(set(names))
    assert {"blt::patch_pool_fwd_kernel<__nv_bfloat16, 8, blt::Kinds::kMax>"} <= set(names)
