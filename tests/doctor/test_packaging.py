"""What is installed where: GPU packages stay out of the default, and the doctor's advice agrees with the pins."""

import re
import tomllib
from pathlib import Path

from ouro_megatron.doctor import findings

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def everything(extra: str) -> list[str]:
    """Requirements of an extra, those of extras it names included."""
    found = []
    for requirement in EXTRAS[extra]:
        named = re.fullmatch(r"ouro-megatron\[(.+)\]", requirement)
        found += [inner for name in named.group(1).split(",") for inner in everything(name)] if named else [requirement]
    return found


def test_make_setup_installs_nothing_for_gpus() -> None:
    setup = re.search(r'-e "\.\[(.+)\]"', (ROOT / "Makefile").read_text())
    assert setup is not None
    installed = [line for extra in setup.group(1).split(",") for line in everything(extra)]
    assert len(installed) > 20
    wrong = [line for line in installed + PROJECT["dependencies"] if re.search("transformer.engine|apex|flash", line)]
    assert wrong == [] and any("transformer-engine" in line for line in everything("gpu"))
    assert not any(re.match("apex", line) for extra in EXTRAS for line in everything(extra))


def test_the_image_installs_extras_that_exist() -> None:
    installed = re.search(r'-e "\.\[(.+)\]"', (ROOT / "slurm" / "Dockerfile").read_text())
    assert installed is not None
    names = installed.group(1).split(",")
    assert set(names) <= set(EXTRAS)
    assert "gpu" not in names and "cpu" not in names, "the base image brings torch and Transformer Engine"


def test_the_doctor_advises_the_pinned_versions() -> None:
    source = Path(findings.__file__).read_text()
    pins = re.findall(r"([a-z-]+)==([0-9.]+)", source)
    assert {name for name, _ in pins} == {"torch", "megatron-core", "wandb"}
    declared = PROJECT["dependencies"] + EXTRAS["cpu"]
    for name, version in pins:
        assert f"{name}=={version}" in declared
