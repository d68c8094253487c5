"""The kernel of the Hugging Face hub, as the package `kernels` loads it, beside an installed blt_kernels.

`make test` builds it into build/hub-native, for the instruction set of this machine, and installs `kernels` into
build/kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
HUB, KERNELS = ROOT / "build" / "hub-native", ROOT / "build" / "kernels"

# Loads the hub's kernel before or after the installed package, calls all public functions of both, and compares bits.
CALL_EVERY_FUNCTION = """
import inspect
import sys
import sysconfig
from pathlib import Path
import torch
from kernels import get_local_kernel
from torch.utils._pytree import tree_leaves, tree_map

path, first = Path(sys.argv[1]), sys.argv[2] == "first"
if not first:
    import blt_kernels
    blt_kernels.token_entropy(torch.zeros(2, 3))
sysconfig.get_config_vars()  # imports a module of the standard library
loaded = set(sys.modules)
hub = get_local_kernel(path)
new = {name.partition(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names)
assert new == {hub.__name__}, new
assert Path(hub.__file__).is_relative_to(path)

import blt_kernels
from blt_kernels import _extension
from cases import CASES
from test_few_row_layer import make

assert hub.__name__ != "blt_kernels" and set(hub.__all__) == set(blt_kernels.__all__)
for operator in _extension.OPERATORS:
    own = sys.modules[f"{hub.__name__}._extension"].owner(operator, "CPU")
    assert own == _extension.owner(operator, "CPU"), (operator, own)

def converted(value):
    if isinstance(value, (blt_kernels.PatchLayout, blt_kernels.AttentionRanges)):
        return getattr(hub, type(value).__name__)(**vars(value))
    return [converted(x) for x in value] if isinstance(value, list) else value

def assert_same(name, ours, theirs):
    assert len(ours) == len(theirs) > 0, name
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name

def results(function, case, arguments):
    leaves = [x.requires_grad_() for name in case.differentiable for x in tree_leaves(arguments[name])]
    outputs = [x for x in tree_leaves(function(**arguments)) if isinstance(x, torch.Tensor)]
    scalars = [x.sum() for x in outputs if x.requires_grad]
    grads = torch.autograd.grad(sum(scalars), leaves) if scalars else ()
    return [*outputs, *(x.to_dense() for x in grads)]

called = {"to_ids", "to_bytes", "set_attention_backend", "attention_backend", "few_row_layer"}
for case in CASES:
    name, dtype = case.function.__name__, torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    ours = results(case.function, case, case.make(dtype, 40, 1))
    theirs = results(getattr(hub, name), case, {k: converted(v) for k, v in case.make(dtype, 40, 1).items()})
    assert_same(name, ours, theirs)
    called.add(name)
call = make((1, 1, 1, 1))
assert_same("few_row_layer", call.run(blt_kernels.few_row_layer), call.run(hub.few_row_layer))
assert hub.to_bytes(hub.to_ids("text")) == b"text"
hub.set_attention_backend("triton")
assert hub.attention_backend() == blt_kernels.attention_backend()
assert called == {name for name in hub.__all__ if inspect.isfunction(getattr(hub, name))}

table = torch.ones(7, 4, requires_grad=True)
hub.ngram_hash_embed(torch.arange(9), table, ngram_sizes=(2,), grad="sparse").sum().backward()
hub.optim.SGD([table], lr=1.0).step()
assert table.sum() == 28 - 9 * 4
"""


def run(script: str, *arguments: str) -> None:
    for made in (HUB / "build", KERNELS / "kernels"):
        assert made.is_dir(), f"make {made.relative_to(ROOT)}"
    path = os.pathsep.join(map(str, (KERNELS, ROOT, ROOT / "tests", ROOT / "tests" / "ops")))
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("order", ["first", "last"])
def test_every_function_gives_what_the_installed_one_gives(order: str) -> None:
    """Loading imports no module but those of the kernel's folder and of the standard library."""
    run(CALL_EVERY_FUNCTION, str(HUB), order)


# Adds another platform's variants to the names, as the loader sees them on CUDA 13.0.
CHOOSE_VARIANT = """
import sys
from packaging.version import Version
from kernels.backends import CUDA
from kernels.variants import _resolve_variant_for_system, parse_variant

variants = [parse_variant(name) for name in sys.argv[1:]]
for torch, backend, expected in (("2.11", CUDA(Version("13.0")), 1), ("2.13", CUDA(Version("13.2")), 1),
                                 ("2.10", CUDA(Version("13.0")), None), ("2.11", CUDA(Version("12.8")), None)):
    found, _ = _resolve_variant_for_system(variants, backend, "x86_64", "linux", Version(torch), True, None)
    assert found == ([] if expected is None else [variants[expected]]), (torch, found)
"""


def test_the_loader_chooses_the_variant_for_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is for the CUDA of the nvcc that built it and later ones of the same major version, and for torch >= 2.11."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    variant_of = importlib.import_module("hub").variant_of
    run(CHOOSE_VARIANT, *(variant_of(cuda)[1] for cuda in (False, True)))
