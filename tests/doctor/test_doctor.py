"""`ouro doctor` with what this machine really lacks, and with stand-ins for what it lacks on the path."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ouro_megatron.doctor import findings as doctor
from ouro_megatron.doctor.findings import SLURM, Finding, examine, probe
from ouro_megatron.doctor.show import unmet

OURO = Path(sys.executable).with_name("ouro")

FAKE_TORCH = """
from types import SimpleNamespace as N
__version__ = "2.99.0+cu130"
version = N(cuda="13.0")
_gpu = N(name="NVIDIA H200", total_memory=141 * 2**30, major={major}, minor=0)
cuda = N(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda index: _gpu,
         nccl=N(version=lambda: (2, 28, 9)))
backends = N(cudnn=N(version=lambda: 91400))
distributed = N(is_nccl_available=lambda: True)
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front of everything else on the path of the probe's process."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def write(folder: Path, **modules: str) -> None:
    """`a__b="..."` is the package a.b with that source."""
    for name, source in modules.items():
        path = folder.joinpath(*name.split("__"))
        path.mkdir(parents=True, exist_ok=True)
        for parent in [path, *path.parents]:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
        (path / "__init__.py").write_text(source)


def command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def by_name(found: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_machine_without_a_gpu() -> None:
    environment = {**os.environ, "PATH": "/nowhere"}
    done = subprocess.run([OURO, "doctor", "--json"], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in shown["findings"]}
    assert states["torch"] == states["megatron-core"] == states["Python"] == states["wandb"] == "active"
    assert states["CUDA"] == states["FP8"] == states["Slurm"] == "missing"
    for finding in shown["findings"]:
        if finding["state"] in ("missing", "broken"):
            assert finding["cost"] and finding["fix"], finding
    versions = {finding["name"]: finding["found"] for finding in shown["findings"]}
    assert versions["torch"] == torch.__version__

    done = subprocess.run(
        [OURO, "doctor", "--require", "gpu", "--require", "wandb"],
        capture_output=True,
        text=True,
        env={**environment, "COLUMNS": "200"},
        timeout=280,
    )
    assert done.returncode == 1
    assert "gpu is required" in done.stderr and "wandb is required" not in done.stderr
    assert "gloo" in done.stdout and "sbatch" not in done.stderr


def test_an_unknown_requirement() -> None:
    done = subprocess.run([OURO, "doctor", "--require", "gpus"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "gpus is not known" in done.stderr and "transformer-engine" in done.stderr


@pytest.mark.parametrize(
    ("major", "recipes"), [(8, ""), (9, "current, delayed, blockwise"), (10, "current, delayed, blockwise, mxfp8")]
)
def test_a_machine_with_gpus(packages: Path, monkeypatch: pytest.MonkeyPatch, major: int, recipes: str) -> None:
    write(packages, torch=FAKE_TORCH.format(major=major), transformer_engine__pytorch="", triton="")
    commands = packages.parent / "bin"
    command(commands, "nvidia-smi", "echo 580.65.06; echo 580.65.06")
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    found = by_name(examine())
    assert found["CUDA"].active and found["CUDA"].found == "13.0, driver 580.65.06"
    assert found["NCCL"].found == "2.28.9" and found["cuDNN"].found == "9.14.0"
    assert found["GPU 1"].found == f"NVIDIA H200, 141 GiB, compute capability {major}.0"
    assert found["Transformer Engine"].active
    assert found["FP8"].active is bool(recipes)
    assert found["FP8"].found == (f"recipes {recipes}" if recipes else "compute capability 8.0")
    assert found["apex"].state == "missing" and "github.com/NVIDIA/apex" in found["apex"].fix
    problems = unmet(list(found.values()), ["gpu", "fp8", "mxfp8"])
    assert [line.split()[0] for line in problems if "--require" in line] == {8: ["fp8", "mxfp8"], 9: ["mxfp8"], 10: []}[
        major
    ]


def apex_finding(on_gpu: bool = True) -> Finding:
    return doctor._apex(probe(["apex"])["apex"], on_gpu)


def test_nvidias_apex_is_told_from_the_other_one(packages: Path) -> None:
    assert apex_finding().state == "missing"
    assert apex_finding(on_gpu=False).state == "unused"
    write(packages, apex="")
    other = apex_finding()
    assert other.state == "unused" and "unrelated" in other.found and "pip uninstall apex" in other.fix
    write(packages, apex__optimizers="", amp_C="")
    assert apex_finding().state == "broken"  # the Python part alone
    write(packages, fused_weight_gradient_mlp_cuda="raise ImportError('undefined symbol: _ZN2at')")
    assert apex_finding().state == "broken"
    write(packages, fused_weight_gradient_mlp_cuda="")
    assert apex_finding().active and apex_finding().provides == ("apex",)


def test_a_package_that_ends_the_process_hides_no_other(packages: Path) -> None:
    write(packages, triton="import os; os.abort()", wandb="print('hello')")
    write(packages, transformer_engine__pytorch="raise ImportError('libcudnn.so.9: cannot open shared object file')")
    write(packages, flash_attn="import a_package_that_nobody_has")
    answers = probe(["Transformer Engine", "Triton", "flash-attn", "wandb", "C extension"])
    assert "ended the process" in answers["Triton"].error and not answers["Triton"].absent
    assert "libcudnn.so.9" in answers["Transformer Engine"].error and not answers["Transformer Engine"].absent
    assert "a_package_that_nobody_has" in answers["flash-attn"].error and not answers["flash-attn"].absent
    assert answers["wandb"].facts is not None


def test_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._slurm().state == "missing"
    for name in SLURM[:-1]:
        command(tmp_path, name, "echo slurm 24.11.5")
    assert doctor._slurm().state == "broken" and SLURM[-1] in doctor._slurm().found
    command(tmp_path, SLURM[-1], "")
    assert doctor._slurm() == Finding("Slurm", "active", "24.11.5", provides=("slurm",))


def test_what_everything_needs_is_always_required() -> None:
    absent: dict[str, Any] = {"state": "broken", "found": "OSError: libtorch.so", "fix": "pip install torch"}
    assert unmet([Finding("torch", **absent), Finding("wandb", "missing", "")], []) == [
        "torch: OSError: libtorch.so. pip install torch"
    ]
