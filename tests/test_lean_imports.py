"""Imports of torch and Megatron-Core without what they only might use."""

import functools
import subprocess
import sys

import pytest
import torch

from ouro_megatron.lean_imports import compiled_when_called


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_rank_starts_without_the_compiler_and_wandb() -> None:
    said = python(
        "import gc, sys\n"
        "import ouro_megatron.training.stage, megatron.core.fusions.fused_bias_swiglu as fused, torch\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'wandb'} & sys.modules.keys()))\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "print(torch.compile.__module__, fused.swiglu.__wrapped__.__name__)\n"
        "import wandb, megatron.core as core\n"
        "print(callable(wandb.init), [m.__spec__.loader.path == m.__file__ for m in (torch, core)])\n"
    )
    assert said.splitlines() == ["[]", "True True", "torch swiglu", "True [True, True]"]


def test_imported_modules_stay_as_they_are() -> None:
    said = python(
        "import torch, megatron.core, wandb\n"
        "before = torch.compile\n"
        "import ouro_megatron.training.stage, sys\n"
        "print(torch.compile is before, sys.modules['wandb'] is wandb)\n"
    )
    assert said.splitlines() == ["True True"]


def test_compiled_at_the_first_call() -> None:
    compiled: list[str] = []

    def compile_now(function: object, **options: object) -> object:
        compiled.append(f"{function.__name__} {options}")  # type: ignore[attr-defined]
        return torch.compile(function, backend="eager")  # type: ignore[call-overload]

    later = functools.partial(compiled_when_called, compile_now)

    @later
    def double(x: torch.Tensor) -> torch.Tensor:
        """Twice."""
        return 2 * x

    @later(dynamic=True)
    def quadruple(x: torch.Tensor, *, times: int = 1) -> torch.Tensor:
        return double(double(x)) * times

    assert compiled == [] and double.__doc__ == "Twice."
    x = torch.arange(3.0)
    torch.testing.assert_close(quadruple(x, times=2), 8 * x)
    torch.testing.assert_close(quadruple(x), 4 * x)
    assert compiled == ["quadruple {'dynamic': True}"]  # what it calls is compiled as a part of it
    torch.testing.assert_close(double(x), 2 * x)
    assert compiled == ["quadruple {'dynamic': True}", "double {}"]


def test_a_failing_import_is_as_it_was() -> None:
    with pytest.raises(AssertionError, match="No module named 'torch'"):
        python(
            "import sys, importlib.abc\n"
            "class Missing(importlib.abc.MetaPathFinder):\n"
            "    def find_spec(self, name, path, target=None):\n"
            "        if name == 'torch':\n"
            "            raise ModuleNotFoundError(\"No module named 'torch'\")\n"
            "import ouro_megatron\n"
            "sys.meta_path.insert(0, Missing())\n"
            "import torch\n"
        )
