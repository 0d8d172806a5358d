"""Tasks by name."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ouro_megatron.errors import RecipeError
from ouro_megatron.experiments.tasks.addition import Addition
from ouro_megatron.experiments.tasks.capo import Capo
from ouro_megatron.experiments.tasks.mano import Mano
from ouro_megatron.experiments.tasks.multihop import MultiHop
from ouro_megatron.experiments.tasks.phop import PHop
from ouro_megatron.experiments.tasks.task import Task

TASKS: dict[str, type[Task]] = {
    "addition": Addition,
    "phop": PHop,
    "mano": Mano,
    "multihop": MultiHop,
    "capo": Capo,
}


def make_task(values: Mapping[str, Any], origin: str) -> Task:
    """The task that `values` describe: `kind` and its own settings. Raises RecipeError naming `origin` and field."""
    settings = dict(values)
    kind = settings.pop("kind", None)
    if kind not in TASKS:
        raise RecipeError(f"{origin}: task.kind {kind!r}: known here: {', '.join(TASKS)}")
    try:
        return TASKS[kind].model_validate(settings)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            where = ".".join(["task", *(str(part) for part in item["loc"])])
            lines.append(f"{origin}: {where}: {item['msg'].removeprefix('Value error, ')}")
        raise RecipeError("\n".join(lines)) from error
