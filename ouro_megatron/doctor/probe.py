"""Imports one package after the other and says what it found: `python -m ouro_megatron.doctor.probe NAME...`.

A process of its own: a package built for another torch or CUDA may end it, and then only that package's answer is
missing. One JSON object a line: {"begin": name}, then {"name", "facts"} or {"name", "error"}.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

Facts = dict[str, Any]


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _torch() -> Facts:
    import torch

    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            devices.append({"name": facts.name, "bytes": facts.total_memory, "capability": [facts.major, facts.minor]})
    nccl = ""
    if torch.version.cuda and torch.distributed.is_nccl_available():
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or "",
        "cudnn": torch.backends.cudnn.version() or 0,
        "nccl": nccl,
        "devices": devices,
    }


def _transformer_engine() -> Facts:
    importlib.import_module("transformer_engine.pytorch")
    return {"version": _version("transformer_engine", "transformer-engine")}


def _apex() -> Facts:
    """`nvidia` is false for the package that PyPI calls apex, a web toolkit."""
    if importlib.util.find_spec("apex") is None:
        raise ModuleNotFoundError("No module named 'apex'", name="apex")
    is_nvidias = importlib.util.find_spec("apex.optimizers") is not None
    kernels = []
    for name in ("fused_weight_gradient_mlp_cuda", "amp_C"):
        if is_nvidias:
            try:
                importlib.import_module(name)
                kernels.append(name)
            except ImportError:
                continue
    return {"version": _version("apex"), "nvidia": is_nvidias, "kernels": kernels}


def _flash_attention() -> Facts:
    try:
        importlib.import_module("flash_attn_interface")
        return {"version": _version("flash_attn_3", "flash-attn-3") or "3"}
    except ModuleNotFoundError:
        importlib.import_module("flash_attn")
        return {"version": _version("flash_attn", "flash-attn")}


def _plain(module: str, distribution: str) -> Callable[[], Facts]:
    def look() -> Facts:
        importlib.import_module(module)
        return {"version": _version(distribution)}

    return look


PROBES: dict[str, Callable[[], Facts]] = {
    "torch": _torch,
    "megatron-core": _plain("megatron.core", "megatron-core"),
    "Transformer Engine": _transformer_engine,
    "apex": _apex,
    "flash-attn": _flash_attention,
    "Triton": _plain("triton", "triton"),
    "C extension": _plain("data_prep._byte_level", "ouro-megatron"),
    "wandb": _plain("wandb", "wandb"),
}


def main(names: list[str]) -> None:
    """Answers go to what was standard output; whatever packages print goes to standard error."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in names:
        print(json.dumps({"begin": name}), file=answers, flush=True)
        answer: Facts = {"name": name}
        try:
            answer["facts"] = PROBES[name]()
        except ModuleNotFoundError as error:
            # What it needs itself may be missing, too: then it is there, and broken.
            answer["error"], answer["absent"] = str(error), _is_absent(name, error)
        except Exception as error:
            answer["error"], answer["absent"] = f"{type(error).__name__}: {error}", False
        print(json.dumps(answer), file=answers, flush=True)


_ROOTS = {"Transformer Engine": "transformer_engine", "megatron-core": "megatron", "flash-attn": "flash_attn"}


def _is_absent(name: str, error: ModuleNotFoundError) -> bool:
    root = {"C extension": "data_prep._byte_level", "Triton": "triton"}.get(name, _ROOTS.get(name, name))
    return error.name in (root, root.split(".")[0]) or (name == "megatron-core" and error.name == "megatron.core")


if __name__ == "__main__":
    main(sys.argv[1:])
