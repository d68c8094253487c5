"""Audits wheels: they keep to the stable ABIs of Python 3.10 and torch 2.11, and to the C library of a platform."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

BIN = Path(sys.executable).parent
TORCH = {"2.9.0", "2.10.0", "2.11.0"}


def run(*command: object) -> str:
    """Return what a command prints, or exit with it."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_abis(wheel: Path) -> int:
    """Return the number of compiled modules in a wheel, or exit if one does not keep to the stable ABIs."""
    run(sys.executable, "-m", "abi3audit", "--strict", "--summary", wheel)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        modules = [path for path in Path(folder, "blt_kernels").iterdir() if path.suffix == ".so"]
        report = run(BIN / "torch-abi-audit", "--check", "both", "--verbose", Path(folder, "blt_kernels"))
    needed = set(re.findall(r"min-torch=(\S+)", report))
    if not needed <= TORCH or report.count("[STABLE") != len(modules):
        sys.exit(f"{wheel.name}: expected {len(modules)} stable modules for torch 2.11, got\n{report}")
    return len(modules)


def check_platform(wheel: Path, platform: str) -> None:
    """Exit unless the wheel runs on a platform, such as manylinux_2_28_x86_64."""
    report = run(sys.executable, "-m", "auditwheel", "show", wheel)
    found = re.search(r'"(manylinux_\d+_\d+_\w+)"', report.replace("\n", " "))
    if found is None or _version(found[1]) > _version(platform):
        sys.exit(f"{wheel.name}: expected {platform}, got\n{report}")


def _version(platform: str) -> list[int]:
    return [int(number) for number in platform.split("_")[1:3]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--platform", help="newest platform tag that the wheels may need")
    options = parser.parse_args()
    for wheel in options.wheels:
        number = check_abis(wheel)
        if options.platform:
            check_platform(wheel, options.platform)
        print(f"{wheel.name}: {number} modules, stable{f', for {options.platform}' if options.platform else ''}")
