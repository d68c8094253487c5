"""``blt-kernels doctor`` says what is installed, which kernels run where, and how to get the missing ones."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
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
# Other code bases, by the integrations that put the ops under them: the package to import, the distribution that has
# its version, and a file that tells it apart from a package of the same name, such as hnet of the package index.
CODE_BASES = {
    "transformers": ("transformers", "transformers", "models/blt/modeling_blt.py"),
    "bytelatent": ("bytelatent", "bytelatent", "model/blt.py"),
    "hnet": ("hnet", "hnet", "modules/dc.py"),
    "megabyte": ("MEGABYTE_pytorch", "MEGABYTE-pytorch", "attend.py"),
}


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


def code_bases() -> dict[str, dict[str, Any] | None]:
    """Return version, folder and what ``apply`` replaces, by integration, None where it is not there.

    No code base is imported.
    """
    found: dict[str, dict[str, Any] | None] = {}
    for name, (package, distribution, file) in CODE_BASES.items():
        spec = importlib.util.find_spec(package)
        folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
        folder = next((folder for folder in folders if (folder / file).is_file()), None)
        module = f"blt_kernels.integrations.{name}"
        found[name] = None
        if folder is not None:
            found[name] = {
                "version": installed(distribution),
                "path": str(folder),
                "apply": f"{module}.apply()",
                "replaces": importlib.import_module(module).REPLACES,
            }
    return found


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
        "code_bases": code_bases(),
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
    out.print(table_of_code_bases(facts["code_bases"]))
    for item in facts["missing"]:
        out.print(escape(f"missing: {item['what']}. To get it: {item['command']}"))
    if not facts["missing"]:
        out.print("Nothing is missing.")


def table_of_code_bases(found: dict[str, dict[str, Any] | None]) -> Table | str:
    """Return one line for each function that ``apply`` of the code bases that are there would replace."""
    there = {name: base for name, base in found.items() if base is not None}
    if not there:
        return f"no code base that the ops can be put under: {', '.join(CODE_BASES)}"
    table = Table(title="what the ops replace in other code bases, by apply()", title_justify="left")
    for column in ("code base", "replaced", "computed by"):
        table.add_column(column)
    for name, base in there.items():
        first = f"{name} {base['version'] or 'of unknown version'}"
        for replaced, computed in base["replaces"].items():
            table.add_row(escape(first), escape(replaced), escape(computed))
            first = ""
        table.add_section()
    return table
