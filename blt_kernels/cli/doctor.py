"""``blt-kernels doctor``: what is installed, which kernels run where, and what would bring the missing ones."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

from blt_kernels import _extension, attention_backend
from blt_kernels.cli.base import ColorOption, Command, JsonOption, app, package_version
from blt_kernels.cli.console import Color, console
from blt_kernels.models.byte_lm import BUNDLED
from blt_kernels.triton import attention_flash

# The operator that stands for each public op.
OPS = {
    "entropy_patch": "entropy_patch_fwd",
    "token_entropy": "token_entropy_fwd",
    "linear_entropy": "linear_entropy_fwd",
    "patch_starts": "patch_starts_fwd",
    "space_patch": "space_patch_fwd",
    "static_patch, byte_patch": "static_patch_fwd",
    "delimiter_patch": "delimiter_patch_fwd",
    "topk_patch": "topk_patch_fwd",
    "patch_pool": "patch_pool_fwd",
    "patch_unpool": "patch_unpool_fwd",
    "ngram_hash": "ngram_hash_fwd",
    "ngram_hash_embed": "ngram_hash_embed_fwd",
    "block_causal_attention": "block_causal_attention_fwd",
    "attention_ranges": "block_causal_attention_ranges_fwd",
    "patch_cross_attention": "patch_cross_attention_fwd",
    "optim.SGD": "sgd_step",
    "optim.RowwiseAdagrad": "rowwise_adagrad_step",
}
DEVICES = ("CPU", "CUDA")
TRITON = ("block_causal_attention_fwd", "block_causal_attention_ranges_fwd")  # whose kernels on CUDA are Triton's
EXTRAS = {"typer": "cli", "rich": "cli", "matplotlib": "cli", "safetensors": "cli"}


def owner(operator: str, device: str) -> str:
    """Who computes ``blt_kernels::operator`` on a device: "C++ (v4)", or "reference" where no kernel is registered."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"blt_kernels::{operator}", device):
        return "reference"
    if device == "CPU":
        return f"C++ ({_extension.load_cpu().isa})"
    return str(attention()["forward"]) if operator in TRITON else f"CUDA ({_extension.load_cuda().compiler})"


def attention() -> dict[str, Any]:
    """Who computes the forward of attention on CUDA, and why other packages cannot: None for those that can."""
    reasons = {package.name: attention_flash.find(package)[1] or None for package in attention_flash.PACKAGES}
    backend = attention_backend()
    faster = {package for package, *_ in attention_flash.FASTER} if backend == "auto" else set()
    delegates = [name for name, reason in reasons.items() if reason is None and (backend == "flash" or name in faster)]
    owners = delegates if backend == "flash" else ["Triton", *delegates]
    return {"backend": backend, "forward": " or ".join(owners), "packages": reasons}


def report() -> dict[str, Any]:
    """All that `run` prints, as plain data."""
    loaded = _extension.load_cpu()
    missing = []
    if loaded.isa is None:
        missing.append({"what": f"compiled kernels: {loaded.reason}", "command": "pip install --no-build-isolation ."})
    cuda = _extension.load_cuda()
    if torch.cuda.is_available() and cuda.compiler is None:
        missing.append({"what": f"CUDA kernels: {cuda.reason}", "command": "pip install 'blt-kernels[jit]'"})
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            missing.append(
                {"what": f"{package}, for the command line", "command": f"pip install 'blt-kernels[{extra}]'"}
            )
    if not BUNDLED.is_file():
        missing.append({"what": "the entropy model of the package", "command": "blt-kernels train entropy PATH..."})
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing.append({"what": "a C++ compiler, for builds and torch.compile", "command": "apt install g++"})
    return {
        "versions": {
            "blt_kernels": package_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _installed("triton"),
            "CUDA of torch": torch.version.cuda,
            "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "module": {
            "isa": loaded.isa,
            "path": loaded.path,
            "reason": loaded.reason,
            "available": list(loaded.available),
        },
        "cuda": {"compiler": cuda.compiler, "path": cuda.path, "reason": cuda.reason},
        "attention": attention(),
        "ops": {name: {device: owner(operator, device) for device in DEVICES} for name, operator in OPS.items()},
        "missing": missing,
    }


@app.command(cls=Command)
def doctor(json: JsonOption = False, color: ColorOption = Color.auto) -> None:
    """Say what is installed, which kernels run where, what is missing and the command that brings it."""
    raise typer.Exit(run(as_json=json, color=color))


def run(*, as_json: bool, color: Color) -> int:
    """Print the report and return the exit code: 0, since without kernels the references do the work."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    out = console(color)
    versions = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts["versions"].items():
        versions.add_row(name, escape(str(value)) if value is not None else "none")
    module = facts["module"]
    if module["isa"]:
        built = ", ".join(module["available"])
        versions.add_row("compiled module", escape(f"{module['isa']}, from {module['path']}"))
        versions.add_row("", f"this machine can load {built}; BLT_KERNELS_ISA chooses")
    else:
        versions.add_row("compiled module", escape(f"none: {module['reason']}"))
    if facts["cuda"]["compiler"]:
        versions.add_row("CUDA kernels", escape(f"by {facts['cuda']['compiler']}, from {facts['cuda']['path']}"))
        versions.add_row("", "BLT_KERNELS_CUDA chooses: nvcc, nvrtc or none")
    else:
        versions.add_row("CUDA kernels", escape(f"none: {facts['cuda']['reason']}"))
    choice = facts["attention"]
    versions.add_row("attention on CUDA", escape(f"backend {choice['backend']}: {choice['forward']}"))
    for name, reason in choice["packages"].items():
        versions.add_row("", escape(f"{name}: {reason or 'can be used, by set_attention_backend'}"))
    out.print(versions)
    owners = Table(title="who computes each op", title_justify="left")
    owners.add_column("op")
    for device in DEVICES:
        owners.add_column(device)
    for name, by_device in facts["ops"].items():
        owners.add_row(name, *by_device.values())
    out.print(owners)
    out.print('"reference" is plain PyTorch: right, differentiable and slow.')
    for item in facts["missing"]:
        out.print(escape(f"missing: {item['what']}. To get it: {item['command']}"))
    if not facts["missing"]:
        out.print("Nothing is missing.")
    return 0


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
