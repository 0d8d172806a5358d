"""What a pipeline file, a cluster file and a twin file may say. Every field is checked; an unknown one is an error."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from ouro_megatron.errors import ClusterError
from ouro_megatron.recipe.schema import PositiveInt, Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
TimeLimit = Annotated[str, Field(pattern=r"^(\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d(:\d\d)?)?)$")]
"""As sbatch takes it: minutes, hours:minutes:seconds, days-hours ..."""


def seconds_of(time: str) -> int:
    """A time limit in seconds. Raises ClusterError for what sbatch would not understand.

    sbatch's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    """
    try:
        limit = TypeAdapter(TimeLimit).validate_python(time)
    except ValidationError as error:
        raise ClusterError(
            f"time limit {time!r}: write hours:minutes:seconds, such as 4:00:00, or days-hours"
        ) from error
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


class Container(Section):
    """An image that pyxis/enroot starts the ranks in."""

    image: str
    """A .sqsh file or an image's address, as srun's --container-image takes it."""

    mounts: list[str] = Field(default_factory=list)
    """"/data:/data" and the like; the project's folder is always mounted."""

    def image_file(self, project: Path) -> Path | None:
        """The image, absolute, where it is a file: pyxis takes a name without a leading / or . for a registry's."""
        return project / self.image if self.image.endswith((".sqsh", ".sqfs", ".squashfs")) else None


class Cluster(Section):
    """How jobs look on one kind of node."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    """0 asks for none: ranks on the CPU."""
    tasks_per_node: PositiveInt | None = None
    """Ranks a node; one a GPU when absent."""
    cpus_per_task: PositiveInt = 1
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    exclusive: bool = True
    """Nobody else's job on the nodes."""
    grace_seconds: PositiveInt = 300
    """How long before the time limit the ranks are told to save. A save must fit, and a step."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Failures in a row without a new checkpoint after which a stage gives up."""
    sbatch: list[str] = Field(default_factory=list)
    """More options of sbatch, such as "--constraint=ib"."""
    srun: list[str] = Field(default_factory=list)
    """More options of srun, such as "--cpu-bind=none"."""
    setup: list[str] = Field(default_factory=list)
    """Shell lines run on the first node before the ranks start: modules, ulimits."""
    environment: dict[str, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(default_factory=dict)
    """Variables of all ranks, such as NCCL's; numbers need no quotes."""
    container: Container | None = None
    command: str = ".venv/bin/ouro"
    """The `ouro` of the ranks, from the project's folder or inside the container."""

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)


class Upcycle(Section):
    """A deeper model from a stage's checkpoint, as `ouro upcycle` makes it."""

    source: Name
    layers: PositiveInt
    map: Literal["stack", "interleave"] = "stack"
    optimizer: bool = True
    residual_scale: Annotated[float, Field(gt=0.0)] = 1.0
    sequences: PositiveInt = 4
    """Held-out sequences for the losses before and after."""


class Average(Section):
    """The mean of a stage's last checkpoints, as `ouro checkpoint average` makes it."""

    source: Name
    last: Annotated[int, Field(ge=2)]


class Step(Section):
    """One job of a pipeline: a stage to train, or a checkpoint to make from another."""

    recipe: Path | None = None
    """Relative to the pipeline's file."""
    upcycle: Upcycle | None = None
    average: Average | None = None
    name: Name | None = None
    """Of an upcycling or averaging: later stages say `init.stage: NAME`. A stage has its recipe's name."""
    nodes: PositiveInt = 1
    time: TimeLimit = "24:00:00"
    """Of one job; a stage that needs longer goes on in further ones."""
    partition: str | None = None
    """Instead of the cluster's."""
    after: list[Name] = Field(default_factory=list)
    """Steps to wait for beside those its `init.stage` or `source` names."""


class PipelineFile(Section):
    name: Name
    run_dir: Path | None = None
    """All run folders lie here, whatever the recipes say."""
    cluster: Path | None = None
    """Cluster file, relative to this one; `--cluster` names another."""
    twin: Path | None = None
    """Twin file for `--twin`, relative to this one."""
    include: list[Path] = Field(default_factory=list)
    """Other pipelines' steps. A step that several have is one step."""
    steps: list[Step] = Field(default_factory=list)


class Divide(Section):
    """A smaller copy that keeps the proportions between stages."""

    layers: PositiveInt = 1
    sequence_length: PositiveInt = 1
    batch_tokens: PositiveInt = 1
    tokens: PositiveInt = 1
    """Divides every length in tokens: budgets, warmups, where a ramp begins."""


class Twin(Section):
    """Changes to every stage of a pipeline that make it small enough to rehearse."""

    run_dir: Path
    divide: Divide = Divide()
    epoch_tokens: PositiveInt = 2048
    """Tokens that stand for an epoch where a recipe counts its budget in epochs."""
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Merged over every recipe, after the division."""
    nodes: PositiveInt | None = None
    time: TimeLimit | None = None
