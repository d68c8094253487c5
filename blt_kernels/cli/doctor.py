"""``blt-kernels doctor`` says what is installed, which kernels run where, and how to get the missing ones."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
from dataclasses import asdict
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from blt_kernels import _extension, attention_backend
from blt_kernels.cli.base import EXTRAS, ColorOption, Command, JsonOption, app, installed, package_version
from blt_kernels.cli.console import Color, console
from blt_kernels.models.byte_lm import BUNDLED
from blt_kernels.triton.block_causal_attention import flash

DEVICES = ("CPU", "CUDA")


def owners() -> dict[str, dict[str, str]]:
    """Return who computes each op on each device, by the name of its operator without ``_fwd``."""
    forward = sorted(name for name in _extension.OPERATORS if name.endswith(("_fwd", "_step")))
    found = {name.removesuffix("_fwd"): {d: _extension.owner(name, d) for d in DEVICES} for name in forward}
    for by_device in found.values():
        if by_device["CUDA"] == "Triton":
            by_device["CUDA"] = str(attention()["forward"])
    return found


def attention() -> dict[str, Any]:
    """Return who computes the forward of attention on CUDA, and why other packages cannot: None for those that can."""
    reasons = {package.name: flash.find(package).reason or None for package in flash.PACKAGES}
    backend = attention_backend()
    owners = [name for name, reason in reasons.items() if reason is None] if backend == "flash" else ["Triton"]
    return {"backend": backend, "forward": " or ".join(owners), "packages": reasons}


def report() -> dict[str, Any]:
    """Return all that `run` prints, as plain data."""
    loaded = _extension.load_cpu()
    missing = []
    if loaded.isa is None:
        missing.append({"what": f"compiled kernels: {loaded.reason}", "command": "pip install --no-build-isolation ."})
    cuda = _extension.load_cuda()
    if torch.cuda.is_available() and cuda.compiler is None:
        missing.append({"what": f"CUDA kernels: {cuda.reason}", "command": "pip install 'blt-kernels[jit]'"})
    for package, extra in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            purpose = "training and evaluation" if extra == "train" else "the command line"
            missing.append({"what": f"{package}, for {purpose}", "command": f"pip install 'blt-kernels[{extra}]'"})
    if not BUNDLED.is_file():
        missing.append({"what": "the entropy model of the package", "command": "blt-kernels train entropy PATH..."})
    if shutil.which("c++") is None and shutil.which("g++") is None:
        missing.append({"what": "a C++ compiler, for builds and torch.compile", "command": "apt install g++"})
    return {
        "versions": {
            "blt_kernels": package_version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": installed("triton"),
            "CUDA of torch": torch.version.cuda,
            "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "threads": torch.get_num_threads(),
            "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "module": asdict(loaded),
        "cuda": asdict(cuda),
        "attention": attention(),
        "ops": owners(),
        "missing": missing,
    }


@app.command(cls=Command)
def doctor(json: JsonOption = False, color: ColorOption = Color.auto) -> None:
    """Say what is installed, which kernels run where, what is missing and the command that brings it."""
    run(as_json=json, color=color)


def run(*, as_json: bool, color: Color) -> None:
    """Print the report."""
    facts = report()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
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
