"""`ouro doctor`."""

from typing import Annotated

import typer


def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 1 unless this is active: gpu, fp8, mxfp8, transformer-engine, apex, flash-attn, triton, "
            "c-extension, slurm, wandb. Several times for several.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """What this machine has for training: packages, GPUs, Slurm; what each missing piece costs and what installs it.

    Examples:

        ouro doctor

        ouro doctor --require gpu --require fp8     # in a job's prologue

        ouro doctor --json
    """
    from rich.console import Console

    from ouro_megatron.doctor import show
    from ouro_megatron.doctor.findings import examine
    from ouro_megatron.errors import DoctorError

    required = require or []
    show.check_names(required)
    findings = examine()
    if as_json:
        typer.echo(show.as_json(findings, required))
    else:
        show.show_table(findings, Console(highlight=False, soft_wrap=True))
    lines = show.unmet(findings, required)
    if lines:
        raise DoctorError("this machine is not ready:\n" + "\n".join(f"  {line}" for line in lines))
