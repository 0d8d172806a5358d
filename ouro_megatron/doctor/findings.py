"""What a machine has, what it lacks, what each lack costs, and the command that changes it. Imports nothing heavy."""

import json
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Literal

from ouro_megatron.doctor.probe import PROBES

State = Literal["active", "missing", "broken", "unused"]
"""`unused`: there, but of no use on this machine or not what it seems."""
SLURM = ("sbatch", "srun", "squeue", "scontrol", "sacct", "scancel")
APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
_LONGEST = 300.0
"""Seconds that importing all packages may take."""


@dataclass(frozen=True)
class Finding:
    name: str
    state: State
    found: str
    """Version and what matters of it; why it is not active."""
    cost: str = ""
    """What a run goes without, when it is not active."""
    fix: str = ""
    """The command that installs it."""
    provides: tuple[str, ...] = ()
    """Names for `--require` that it satisfies."""

    @property
    def active(self) -> bool:
        return self.state == "active"


@dataclass(frozen=True)
class Answer:
    """One package's answer to the probe."""

    facts: dict[str, Any] | None = None
    error: str = ""
    absent: bool = False


def probe(names: list[str] | None = None) -> dict[str, Answer]:
    """Imports each package in a process of its own. One that ends the process is `broken`; the rest are still asked."""
    waiting, answers = list(names or PROBES), dict[str, Answer]()
    while waiting:
        command = [sys.executable, "-m", "ouro_megatron.doctor.probe", *waiting]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST)
            output, ending = done.stdout, f"importing it ended the process (exit code {done.returncode})"
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            ending = f"importing it took more than {_LONGEST:.0f} seconds"
        begun = ""
        for line in output.splitlines():
            entry = json.loads(line)
            begun = entry.get("begin", begun)
            if "name" in entry:
                answers[entry["name"]] = Answer(entry.get("facts"), entry.get("error", ""), entry.get("absent", False))
        if begun not in answers:
            answers[begun or waiting[0]] = Answer(error=ending)
        waiting = [name for name in waiting if name not in answers]
    return answers


def examine() -> list[Finding]:
    """Everything `ouro doctor` shows, in order."""
    answers = probe()
    torch = answers["torch"].facts or {}
    capability = _capability(torch)
    on_gpu = capability is not None
    return [
        Finding("Python", "active", f"{platform.python_version()} ({sys.executable})"),
        _package(answers, "torch", cost="nothing runs without it", fix="pip install torch==2.13.0"),
        _package(
            answers,
            "megatron-core",
            cost="nothing trains without it",
            fix="pip install megatron-core==0.16.1",
        ),
        *_gpu(torch, capability),
        _transformer_engine(answers, on_gpu),
        _fp8(answers["Transformer Engine"], capability),
        _apex(answers["apex"], on_gpu),
        _package(
            answers,
            "flash-attn",
            cost="Transformer Engine's attention uses cuDNN's kernels, the local layers torch's",
            fix="pip install flash-attn --no-build-isolation",
            gpu_only=not on_gpu,
            provides=("flash-attn",),
        ),
        _package(
            answers,
            "Triton",
            cost="torch.compile cannot make GPU kernels",
            fix="comes with the CUDA build of torch",
            gpu_only=not on_gpu,
            provides=("triton",),
        ),
        _package(
            answers,
            "C extension",
            cost="data preparation tokenises several times slower (the `tokenizers` library does it)",
            fix="install gcc, then: pip install -e .",
            provides=("c-extension",),
        ),
        _slurm(),
        _package(
            answers,
            "wandb",
            cost="no Weights & Biases runs; console, files and reports stay",
            fix="pip install wandb==0.31.0",
            provides=("wandb",),
        ),
    ]


def _package(
    answers: dict[str, Answer],
    name: str,
    *,
    cost: str,
    fix: str,
    provides: tuple[str, ...] = (),
    gpu_only: bool = False,
) -> Finding:
    """`gpu_only`: there is no GPU here, so that its absence costs nothing."""
    answer = answers[name]
    if answer.facts is not None:
        return Finding(name, "active", str(answer.facts["version"]), provides=provides)
    if gpu_only:
        return Finding(name, "unused", "for GPUs, of which there is none here")
    return Finding(name, "missing" if answer.absent else "broken", answer.error, cost, fix)


def _capability(torch: dict[str, Any]) -> tuple[int, int] | None:
    """The lowest compute capability among the GPUs: all ranks run the same kernels."""
    found = [tuple(device["capability"]) for device in torch.get("devices", [])]
    return min(found) if found else None


def _gpu(torch: dict[str, Any], capability: tuple[int, int] | None) -> list[Finding]:
    cost = "training runs on CPU ranks (gloo): right numbers, thousands of times slower"
    driver = driver_version()
    if not torch.get("cuda"):
        fix = "pip install torch --index-url https://download.pytorch.org/whl/cu130" if driver else ""
        state = "this torch is built without CUDA" + (
            f", though driver {driver} is there" if driver else "; no GPU driver is there either"
        )
        return [Finding("CUDA", "missing", state, cost, fix or "a machine with an NVIDIA GPU and its driver")]
    cudnn = torch["cudnn"]
    found = [
        Finding("CUDA", "active" if capability else "unused", f"{torch['cuda']}, driver {driver or 'unknown'}"),
        Finding("cuDNN", "active", f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}")
        if cudnn
        else Finding("cuDNN", "missing", "not found", "no fused attention kernels", "pip install nvidia-cudnn-cu13"),
        Finding("NCCL", "active", torch["nccl"])
        if torch["nccl"]
        else Finding("NCCL", "missing", "not in this torch", "no training on several GPUs", "a CUDA build of torch"),
    ]
    if capability is None:
        hint = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
        return [*found, Finding("GPU", "missing", "torch sees none", cost, hint)]
    for index, device in enumerate(torch["devices"]):
        text = (
            f"{device['name']}, {device['bytes'] / 2**30:.0f} GiB, compute capability {_dotted(device['capability'])}"
        )
        found.append(Finding(f"GPU {index}", "active", text, provides=("gpu",)))
    return found


def _dotted(capability: Any) -> str:
    return ".".join(str(part) for part in capability)


def driver_version() -> str | None:
    """The GPU driver's, from nvidia-smi; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def _transformer_engine(answers: dict[str, Answer], on_gpu: bool) -> Finding:
    return _package(
        answers,
        "Transformer Engine",
        cost="no FP8, no fused norms, attention or Adam, no context-parallel attention on the GPU",
        fix="pip install --no-build-isolation -e '.[gpu]' (docs/gpu.md)",
        provides=("transformer-engine",),
        gpu_only=not on_gpu and answers["Transformer Engine"].absent,
    )


def _fp8(engine: Answer, capability: tuple[int, int] | None) -> Finding:
    emulated = "precision.fp8.emulate=true gives its numbers, not its speed"
    if capability is None:
        return Finding("FP8", "missing", "no GPU here", emulated, "a GPU of compute capability 8.9 or more")
    if capability < (8, 9):
        why = f"compute capability {_dotted(capability)}"
        return Finding(
            "FP8", "missing", why, emulated, "a GPU of compute capability 8.9 or more (Ada, Hopper, Blackwell)"
        )
    if engine.facts is None:
        return Finding("FP8", "missing", "needs Transformer Engine", emulated, "see Transformer Engine")
    recipes = ["current", "delayed"] + ["blockwise"] * (capability >= (9, 0)) + ["mxfp8"] * (capability >= (10, 0))
    provides = ("fp8", "mxfp8") if "mxfp8" in recipes else ("fp8",)
    return Finding("FP8", "active", f"recipes {', '.join(recipes)}", provides=provides)


def _apex(answer: Answer, on_gpu: bool) -> Finding:
    cost = "the local layers add weight gradients in a pass of their own; with Transformer Engine nothing is lost"
    if answer.facts is None:
        if not on_gpu and answer.absent:
            return Finding("apex", "unused", "for GPUs, of which there is none here")
        return Finding("apex", "missing" if answer.absent else "broken", answer.error, cost, APEX)
    if not answer.facts["nvidia"]:
        found = f"{answer.facts['version']}: not NVIDIA's, but PyPI's unrelated package of that name"
        return Finding("apex", "unused", found, cost, f"pip uninstall apex, then: {APEX}")
    kernels = answer.facts["kernels"]
    if "fused_weight_gradient_mlp_cuda" not in kernels:
        found = f"{answer.facts['version']}, built without its CUDA kernels or for another torch"
        return Finding("apex", "broken", found, cost, APEX)
    return Finding("apex", "active", f"{answer.facts['version']}: {', '.join(kernels)}", provides=("apex",))


def _slurm() -> Finding:
    there = [name for name in SLURM if shutil.which(name)]
    lacking = [name for name in SLURM if name not in there]
    cost = "`ouro submit` cannot queue jobs here; `ouro submit --local` runs a pipeline on this machine"
    if not there:
        return Finding(
            "Slurm", "missing", "no Slurm command", cost, "apt install slurm-client, with the site's slurm.conf"
        )
    if lacking:
        return Finding("Slurm", "broken", f"{', '.join(lacking)} not found", cost, "apt install slurm-client")
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Slurm", "broken", f"sbatch does not start: {error}", cost, "check slurm.conf and munge")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Finding("Slurm", "broken", f"sbatch: {said[-1]}", cost, "check slurm.conf and munge")
    return Finding("Slurm", "active", done.stdout.strip().removeprefix("slurm "), provides=("slurm",))
