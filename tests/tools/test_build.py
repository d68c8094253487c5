"""The compiled module as it is built, packed and loaded."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from packaging.requirements import Requirement

import blt_kernels
from blt_kernels import _extension
from blt_kernels._version import __version__

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(blt_kernels.__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
BEST_TO_WORST = ("v4", "v3", "v2") if X86 else ("plain",)

# The script runs all that patches, on every dtype, and saves the results to the path in its argument.
RUN_OPS = """
import sys, torch, blt_kernels as k
from blt_kernels import _extension

torch.manual_seed(0)
cu = torch.tensor([0, 1, 1, 40, 300])
logits = torch.randn(300, 260) * 3
tokens = torch.randint(0, 260, (300,))
coarse = torch.randint(0, 8, (300,)) / 4.0
out = {}
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    out[f"entropy {dtype}"], out[f"layout {dtype}"] = k.entropy_patch(logits.to(dtype), cu, threshold=2.5)
out["linear"] = k.linear_entropy(logits[:, :64], logits[:260, 64:128])
for name, rule in {"plain": {}, "add": {"threshold_add": 0.5}, "monotonic": {"monotonic": True},
                   "length": {"max_patch_length": 3}, "full": {"max_patches": 20}}.items():
    out[f"starts {name}"] = k.patch_starts(coarse, cu, threshold=1.0, **rule)
out["space"], out["topk"] = k.space_patch(tokens, cu), k.topk_patch(coarse, 4, cu)
out["static"], out["delimiter"] = k.static_patch(cu, 5), k.delimiter_patch(tokens, 9, cu)
torch.save(torch.utils._pytree.tree_flatten(out)[0], sys.argv[1])
print(_extension.load_cpu().isa)
"""


def run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "BLT_KERNELS_ISA"}
    return subprocess.run(command, cwd=cwd, env=inherited | env, capture_output=True, text=True)


def python(*args: str, **options: str | Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *args, **options)


def passed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def failure(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0, done.stdout
    return done.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """Return the wheel, built from the sdist as an installer would; once for all processes of pytest-xdist."""
    importlib.import_module("build.env")  # the folder build/ is a namespace package, too
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "dist"
    with FileLock(f"{folder}.lock"):
        if not list(folder.glob("*.whl")):
            passed(python("-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)))
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """Return a folder with the wheel's package, which has every variant; a checkout has that of this machine."""
    folder = tmp_path_factory.mktemp("site")
    passed(python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)))
    return folder


@pytest.fixture(scope="module")
def reference_outputs(tmp_path_factory):
    path = tmp_path_factory.mktemp("none") / "outputs.pt"
    assert passed(python("-c", RUN_OPS, str(path), BLT_KERNELS_ISA="none")) == "None"
    return torch.load(path)


@pytest.mark.parametrize("isa", _extension.runnable())
def test_every_variant_agrees_with_the_reference(isa, reference_outputs, site, tmp_path):
    assert passed(python("-c", RUN_OPS, str(tmp_path / "outputs.pt"), cwd=site, BLT_KERNELS_ISA=isa)) == isa
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == len(reference_outputs)
    for value, expected in zip(outputs, reference_outputs, strict=True):
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if value.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(value, expected, **tolerance)


SCORES_OF_ANY_SIZE = """
import inputs, torch, test_block_causal_attention_scores as tests
from blt_kernels import _extension
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    for width, scale, window in inputs.LARGE_SCORES[1:4]:
        for size in inputs.sizes_of_scores(dtype):
            attend = tests.attend_on_cpu(scale, window)
            inputs.check_large_scores(attend, size, (4, 2), width, scale, window, dtype)
print(_extension.load_cpu().isa)
"""


@pytest.mark.parametrize("isa", _extension.runnable()[1:])
def test_attention_scores_of_any_size_on_older_instruction_sets(isa, site):
    """v2 has no fused multiply-adds, v3 has."""
    tests = os.pathsep.join(str(ROOT / folder) for folder in ("tests/ops", "tests"))
    assert passed(python("-c", SCORES_OF_ANY_SIZE, cwd=site, BLT_KERNELS_ISA=isa, PYTHONPATH=tests)) == isa


# --- which variant is loaded ------------------------------------------------------------------------------------------

SAY_ISA = "from blt_kernels import _extension; print(_extension.load_cpu().isa)"
SAY_REASON = "from blt_kernels import _extension; print(_extension.load_cpu().reason)"


@pytest.fixture
def bare_package(tmp_path):
    """Return a copy of the package without its compiled module; it is imported from where it lies."""
    shutil.copytree(PACKAGE, tmp_path / "blt_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_the_best_variant_is_loaded():
    assert passed(python("-c", SAY_ISA)) == _extension.runnable()[0]


@pytest.mark.skipif(not X86, reason="levels of x86-64")
@pytest.mark.parametrize(("capability", "isa"), [("default", "v2"), ("avx2", "v3")])
def test_torch_says_what_the_machine_runs(capability, isa, site):
    assert passed(python("-c", SAY_ISA, cwd=site, ATEN_CPU_CAPABILITY=capability)) == isa


def test_override_with_an_unknown_name():
    message = "ImportError: BLT_KERNELS_ISA: expected one of v4, v3, v2, plain, none, got 'avx'"
    assert failure(python("-c", SAY_ISA, BLT_KERNELS_ISA="avx")) == message


def test_override_that_the_machine_cannot_run():
    isa = "plain" if X86 else "v2"
    message = f"ImportError: BLT_KERNELS_ISA={isa}: this machine runs {', '.join(_extension.runnable())}, none"
    assert failure(python("-c", SAY_ISA, BLT_KERNELS_ISA=isa)) == message


def test_override_that_was_not_built(bare_package):
    isa = _extension.runnable()[-1]
    message = failure(python("-c", SAY_ISA, cwd=bare_package, BLT_KERNELS_ISA=isa))
    path = bare_package / f"blt_kernels/_C_{isa}.abi3.so"
    assert message == f"ImportError: BLT_KERNELS_ISA={isa}: was not built, expected {path}; what can be loaded: none"


def test_without_a_module_the_package_runs_on_its_references(bare_package):
    isa, reason = passed(python("-c", RUN_OPS + SAY_REASON, "outputs.pt", cwd=bare_package)).splitlines()
    assert isa == "None"
    assert reason.endswith("was not built: `pip install .` in a checkout builds it")


@pytest.mark.skipif(len(_extension.runnable()) < 2, reason="this machine runs one variant only")
def test_the_best_variant_that_was_built_is_loaded(bare_package, site):
    isa = _extension.runnable()[-1]
    shutil.copy(site / f"blt_kernels/_C_{isa}.abi3.so", bare_package / "blt_kernels")
    assert passed(python("-c", SAY_ISA, cwd=bare_package)) == isa


def test_a_module_that_does_not_load(bare_package):
    isa = _extension.runnable()[0]
    broken = bare_package / f"blt_kernels/_C_{isa}.abi3.so"
    broken.write_bytes(b"not a shared object")
    done = python("-c", SAY_REASON, cwd=bare_package)
    assert f"RuntimeWarning: blt_kernels runs on its slow references: {broken} does not load with torch" in done.stderr
    assert passed(done).startswith(f"{broken} does not load with torch {torch.__version__}: ")
    message = failure(python("-c", SAY_REASON, cwd=bare_package, BLT_KERNELS_ISA=isa))
    assert message.startswith(f"ImportError: {broken} does not load with torch")


# --- what is built ----------------------------------------------------------------------------------------------------


def test_wheel_serves_every_python(wheel):
    name = f"blt_kernels-{re.escape(__version__)}-cp310-abi3-"
    assert re.match(name + (r"linux_x86_64\.whl" if sys.platform == "linux" and X86 else ""), wheel.name)


def test_wheel_contents(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {name for name in names if name.endswith(".so")}
    assert modules == {f"blt_kernels/_C_{name}.abi3.so" for name in (*BEST_TO_WORST, "jit")}
    sources = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".so", ".pyc")]
    assert names - modules == {f"blt_kernels/{path.relative_to(PACKAGE).as_posix()}" for path in sources}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files are sources")
def test_sdist_contents(wheel):
    """Hidden files are for the repository only."""
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = passed(run("git", "ls-files", "--cached", "--others", "--exclude-standard")).splitlines()
    sources = {name for name in tracked if not name.startswith(".") and (ROOT / name).exists()}
    assert sources <= names
    assert not [
        name for name in names - sources if Path(name).suffix in (".so", ".pyc", ".log", ".csv", ".safetensors")
    ]


def test_wheel_runs_where_it_is_installed(site, tmp_path):
    script = RUN_OPS + "print(k.__file__)"
    isa, path = passed(python("-c", script, str(tmp_path / "outputs.pt"), cwd=site)).splitlines()
    assert isa == _extension.runnable()[0]
    assert Path(path).is_relative_to(site)


def test_wheel_keeps_to_the_stable_abis(wheel):
    pytest.importorskip("abi3audit")
    if not Path(sys.executable).with_name("torch-abi-audit").exists():
        pytest.skip("torch-abi-audit is not installed")
    report = passed(python("release/audit.py", str(wheel)))
    assert f"{len(BEST_TO_WORST) + 1} modules, stable" in report  # _C_jit is the one more


def test_a_build_that_cannot_start_says_what_is_missing():
    script = (
        "import importlib.util, runpy, shutil, sys, sysconfig; sys.argv = ['setup.py', '--quiet', 'build_ext'];"
        "find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest);"
        "shutil.which = lambda *args, **kwargs: None; sysconfig.get_path = lambda *args: '/nowhere';"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = python("-c", script)
    assert done.returncode != 0
    assert "blt_kernels: the compiled module cannot be built. Missing:" in done.stderr
    lines = re.findall(r"  - (.*)\. To get it: (.*)", done.stderr)
    assert [what.split(" (")[0] for what, _how in lines] == [
        "a C++20 compiler",
        "CMake >= 3.22",
        "Ninja",
        "torch >= 2.11 with its headers",
        "the headers of Python",
    ]
    assert all("install" in how for _what, how in lines)


# --- an empty environment ---------------------------------------------------------------------------------------------


def required(dependent: Distribution, extra: str = "") -> dict[str, Distribution]:
    """Return all installed distributions that another one requires, by name."""
    found, left = {}, [(dependent, extra)]
    while left:
        dependent, extra = left.pop()
        for requirement in map(Requirement, dependent.requires or ()):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if wanted and requirement.name not in found:
                found[requirement.name] = distribution(requirement.name)
                left += [(found[requirement.name], extra) for extra in requirement.extras or {""}]
    return found


@pytest.fixture(scope="module")
def empty(wheel, tmp_path_factory):
    """Return a function that makes an environment of the wheel and what it requires with an extra, and returns its bin.

    The environment has links to the packages of this one, since tests have no network.
    """

    def make(extra: str = "") -> Path:
        folder = tmp_path_factory.mktemp("empty")
        passed(python("-m", "venv", "--without-pip", str(folder)))
        install = ("-m", "pip", f"--python={folder}", "install", "--no-deps", "--no-index", str(wheel))
        passed(python(*install, PYTHONPATH=""))
        (site,) = folder.glob("lib/python*/site-packages")
        (own,) = Distribution.discover(name="blt-kernels", path=[str(site)])
        for found in required(own, extra).values():
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (site / top).exists():
                    (site / top).symlink_to(found.locate_file(top))
        return folder / "bin"

    return make


def run_alone(*command: str | Path, cwd: Path) -> str:
    """Run a command of an environment outside of the checkout, where there is no compiler, and return its output."""
    environment = {"PATH": str(Path(command[0]).parent), "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return passed(subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True))


def test_the_core_needs_torch_alone(empty, tmp_path):
    script = "import importlib.util; assert not importlib.util.find_spec('numpy');" + RUN_OPS
    isa = run_alone(empty() / "python", "-c", script, "outputs.pt", cwd=tmp_path)
    assert isa.splitlines()[-1] == _extension.runnable()[0]


def test_commands_in_an_empty_environment(empty, tmp_path):
    command = empty("cli") / "blt-kernels"
    report = json.loads(run_alone(command, "doctor", "--json", cwd=tmp_path))
    assert report["versions"]["blt_kernels"] == __version__
    assert not Path(report["module"]["path"]).is_relative_to(ROOT)
    assert report["module"]["isa"] == _extension.runnable()[0]
    assert not [name for name, owners in report["ops"].items() if owners["CPU"] == "reference"]
    assert [item["command"] for item in report["missing"]] == ["apt install g++"]
    (tmp_path / "text.txt").write_text("Kernels for bytes. Zwei Größen, 12 €.\n")
    assert "│for │" in run_alone(command, "patch", "text.txt", "--color", "never", cwd=tmp_path)
    assert "reference" in run_alone(command, "demo", cwd=tmp_path)
