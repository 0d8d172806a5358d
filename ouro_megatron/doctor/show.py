"""`ouro doctor`: findings as a table or JSON, and whether what was asked for is there."""

import json
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ouro_megatron.doctor.findings import Finding
from ouro_megatron.errors import DoctorError

REQUIREMENTS = (
    "gpu",
    "fp8",
    "mxfp8",
    "transformer-engine",
    "apex",
    "flash-attn",
    "triton",
    "c-extension",
    "slurm",
    "wandb",
)
_ALWAYS = ("torch", "megatron-core")
_COLOURS = {"active": "green", "missing": "yellow", "broken": "red", "unused": "dim"}


def check_names(required: list[str]) -> None:
    """Raises DoctorError for a requirement that does not exist."""
    unknown = [name for name in required if name not in REQUIREMENTS]
    if unknown:
        raise DoctorError(f"--require {unknown[0]} is not known; choose from {', '.join(REQUIREMENTS)}")


def unmet(findings: list[Finding], required: list[str]) -> list[str]:
    """One line for each requirement, or package that everything needs, that is not active."""
    provided = {name for finding in findings for name in finding.provides}
    lines = []
    for finding in findings:
        if finding.name in _ALWAYS and not finding.active:
            lines.append(f"{finding.name}: {finding.found}. {finding.fix}")
    for name in required:
        if name not in provided:
            lines.append(f"{name} is required (--require) and not active here")
    return lines


def show_table(findings: list[Finding], console: Console) -> None:
    """What is there first, then what each missing piece costs and the command that installs it."""
    table = Table("", "state", "found", box=SIMPLE)
    for finding in findings:
        colour = _COLOURS[finding.state]
        table.add_row(finding.name, f"[{colour}]{finding.state}[/]", escape(finding.found))
    console.print(table)
    for finding in findings:
        if finding.cost:
            console.print(f"[bold]{finding.name}[/] {finding.state}: {escape(finding.cost)}")
            if finding.fix:
                console.print(f"    {escape(finding.fix)}")


def as_json(findings: list[Finding], required: list[str]) -> str:
    """The same as one object; `unmet` is what makes the exit code 1."""
    listed = [{**asdict(finding), "provides": list(finding.provides)} for finding in findings]
    return json.dumps({"findings": listed, "required": required, "unmet": unmet(findings, required)}, indent=1)
