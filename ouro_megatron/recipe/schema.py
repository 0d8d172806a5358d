"""What a recipe may say. Every field is checked; an unknown one is an error.

The schema holds values and single-field limits. Rules that tie fields together live in `validate.py`,
reading files and `extends` in `load.py`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ouro_megatron.recipe.spans import Amount, Span

PositiveInt = Annotated[int, Field(ge=1)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Recompute = Literal["none", "selective", "full"]


class Section(BaseModel):
    """Base of every part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSection(Section):
    """The looped model: `layers` unique layers used `loops` times (arXiv 2510.25741, section 3)."""

    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt | None = None
    """Key/value heads; as many as `heads` when absent (multi-head attention, as in Ouro)."""
    head_dim: PositiveInt | None = None
    """hidden / heads when absent."""
    ffn: PositiveInt
    vocab: PositiveInt
    loops: PositiveInt
    """T, the loops used in training and evaluation; generation may use more."""
    rope_base: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.02
    post_norm_init: PositiveFloat = 1.0
    """Gain that the norms after attention and feed-forward start with. Below 1 each loop starts as a gentle refinement
    of its input, which helps small models over the first few hundred steps."""
    gate_bias_init: float = 0.0
    """Bias that the exit gate starts with: 0 exits half of each loop's tokens at first, below 0 gives more of the
    loss to the last loop, so that early training does not starve the deep ones."""
    implementation: Literal["local", "transformer_engine"] = "local"
    """Layer spec: `local` runs anywhere, `transformer_engine` needs CUDA and the `gpu` extra."""


class BlendEntry(Section):
    """One source of a blend: Megatron's .bin/.idx pair at `path` (without the suffix)."""

    path: Path
    weight: PositiveFloat | None = None
    """Share of the tokens, relative to the others'. Left out in a whole blend: its number of tokens, filled in before
    training."""
    name: str | None = None
    """Shown in logs and reports; the file name when absent."""

    @property
    def share(self) -> float:
        """`weight`, in a recipe that was completed from its data."""
        assert self.weight is not None, f"{self.path} has no weight yet"
        return self.weight


class DataSection(Section):
    sequence_length: PositiveInt
    tokenizer: Path
    """Folder with tokenizer.json, as data preparation wrote it."""
    train: Annotated[list[BlendEntry], Field(min_length=1)]
    validation: list[BlendEntry] = []
    cache: Path | None = None
    """Folder for Megatron's sample indices; beside the run when absent."""
    mask_end_of_document: bool = False
    """Leave the label after an end-of-document token out of the loss."""
    packing: Literal["none", "in_order", "best_fit"] = "none"
    """`none`: documents follow each other and are cut at the sequence's end. `best_fit`: whole documents, put together
    so that little padding is left. `in_order`: whole documents in the order they are stored in."""
    document_mask: bool | None = None
    """Documents in one sequence do not see each other, and positions begin anew; true when absent and `packing` is set.
    """
    long_documents: Literal["truncate", "split", "drop"] | None = None
    """What packing does with documents longer than the sequence; when absent they are an error."""

    @property
    def masks_documents(self) -> bool:
        return self.packing != "none" if self.document_mask is None else self.document_mask


class ObjectiveSection(Section):
    kind: Literal["expected_loss", "last_loop", "gate"] = "expected_loss"
    """`expected_loss`: stage I, all weights learn. `last_loop`: plain cross-entropy after loop T; the gate is left
    alone. `gate`: stage II, only the exit gate learns."""
    prior: Literal["uniform", "geometric"] = "uniform"
    beta: Annotated[float, Field(ge=0.0)] = 0.1
    """Weight of the entropy (uniform prior) or KL (geometric prior) term."""
    eta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Parameter of the geometric prior."""
    gate_slope: PositiveFloat = 50.0
    """k of the stage-II label sigmoid(k (I - gamma))."""
    gate_threshold: float = 0.005
    """gamma of the stage-II label."""
    chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time in the loss head."""


class OptimizerSection(Section):
    lr: PositiveFloat
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    clip: Annotated[float, Field(ge=0.0)] = 1.0
    """Global gradient norm; 0 switches clipping off."""


class ScheduleSection(Section):
    kind: Literal["constant", "cosine", "wsd"] = "constant"
    warmup: Span = Span(tokens=0)
    decay: Span | None = None
    """Length of the final decay of `wsd`; refused for the others."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """LR at the end of `cosine` and `wsd`."""


class EarlyLoops(Section):
    loops: PositiveInt
    until: Span
    """Position in this stage from which the next entry, or `model.loops`, holds."""


class RampPoint(Section):
    after: Span
    """Position in this stage from which `global_tokens` holds."""
    global_tokens: Amount


class BatchSection(Section):
    global_tokens: Amount
    """Tokens of one optimizer step over all ranks: a multiple of the sequence length."""
    microbatch: PositiveInt = 1
    """Sequences a data-parallel rank handles at one time."""
    ramp: list[RampPoint] = []
    """Later batch sizes, in order: the batch changes between steps once `after` is reached."""


class BudgetSection(Section):
    total: Span | None = None
    """Length of this stage: "3T", "20B tokens" or "1000 steps"."""
    epochs: PositiveFloat | None = None
    """Passes over all tokens of `data.train`, in place of `total`, which is filled in before training."""


class ParallelSection(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    """Context-parallel size: ranks that share one sample's tokens, for sequences whose activations fill one GPU."""
    sequence: bool = False
    """Sequence parallelism inside the tensor-parallel group."""
    layers: list[PositiveInt] | None = None
    """Layers of each pipeline rank, in order; when absent, balanced by FLOPs with the loss heads on the last rank."""
    data: PositiveInt | None = None
    """Data-parallel size; from the number of ranks when absent, checked against it when given."""
    overlap: bool = False
    """Reduce gradients while backward still runs and gather weights while the next forward does, over the data-parallel
    group. The gate stage and one-loop models have nothing to hide and ignore it."""
    timeout_seconds: PositiveFloat = 600.0
    """The longest wait for another rank; then the job ends with a message that names it."""


class Fp8Section(Section):
    """Matrix products of the layers in 8-bit floats; loss head, gate, norms and attention stay as `compute` says."""

    recipe: Literal["current", "blockwise", "delayed", "mxfp8"] = "current"
    """How tensors are scaled: `current` by their own maximum, `blockwise` in tiles of 1 x 128 and 128 x 128 (Hopper),
    `delayed` by the maxima of earlier visits (of all loops together), `mxfp8` in blocks of 32 (Blackwell)."""
    first_layers_bf16: Annotated[int, Field(ge=0)] = 0
    """The model's first layers, of `model.layers`, that stay in bf16, on every visit."""
    last_layers_bf16: Annotated[int, Field(ge=0)] = 0
    amax_history: PositiveInt = 16
    """Visits that `delayed` looks back on."""
    parameters: bool = False
    """Keep the layers' weights in 8 bits and gather those over the data-parallel group."""
    emulate: bool = False
    """Round to 8 bits and back in plain torch, on any device: the numbers without the speed. For `model.implementation:
    local`."""


class PrecisionSection(Section):
    compute: Literal["fp32", "bf16"] = "bf16"
    """dtype of weights and activations; the optimizer keeps fp32 copies, gradients are reduced in fp32."""
    fp8: Fp8Section | None = None


class TrainingSection(Section):
    seed: int = 1234
    recompute: Recompute = "none"
    """`selective`: results of norms and SwiGLU are made again in backward, about a fifth of the activations at almost
    no cost. `full`: only each layer's input is kept, a third more work."""
    recompute_loops: PositiveInt | None = None
    """Recompute in loops 1 to this one only; in all loops when absent."""
    deterministic: bool = False
    """The same numbers in every run on the same layout: slower kernels on a GPU where need be. A CPU always is."""
    cuda_graphs: bool = False
    """Give the GPU each loop's pass over the layers in one call (CUDA graphs): where Python holds it up, with little
    work a visit. For data-parallel ranks alone and rows without document masks. The gate stage ignores it."""
    check_every: Span | None = Span(steps=100)
    """How often copies of weights are compared between ranks; null: never."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    early_loops: list[EarlyLoops] = []
    """Loops used before `model.loops`, in order: T changes between steps once `until` is reached."""
    max_skipped_steps: PositiveInt = 10
    """Stop after this many consecutive steps whose loss or gradient was not finite."""


class HealthSection(Section):
    """What happens when loss or gradient norm jump; steps that are not finite are skipped in any case."""

    skip_spikes: bool = False
    """Leave out the update of a step whose loss or gradient norm is an outlier among the last ones."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps that a new one is compared with."""
    min_steps: Annotated[int, Field(ge=4)] = 32
    """Nothing is an outlier before so many steps are known."""
    loss_deviations: PositiveFloat | None = 8.0
    """Robust standard deviations (1.4826 x the median absolute deviation) above the median; None: not looked at."""
    grad_norm_deviations: PositiveFloat | None = 20.0
    rollback_after: PositiveInt | None = None
    """After so many skipped updates in a row, go back to the last checkpoint and leave out the data since then."""
    max_rollbacks: PositiveInt = 10
    """Rollbacks in one stage before the run gives up."""


class InitSection(Section):
    """What this stage takes over. Without `checkpoint` and `stage` the weights are drawn from `training.seed`.

    Weights and the history of stages always carry over; the schedule always begins afresh, as everything else that the
    recipe states (loops, RoPE base, sequence length, beta, blend).
    """

    checkpoint: Path | None = None
    """A checkpoint folder, or a folder of checkpoints (the newest complete one is taken)."""
    stage: str | None = Field(default=None, pattern=_NAME)
    """A stage by name: its run folder beside this one's. It must be finished, unlike a `checkpoint`."""
    optimizer: bool = False
    """Carry Adam's moments and its count of updates over."""
    data_position: bool = False
    """Go on in the same blend after the last sample that was read, instead of at its first."""

    @property
    def is_set(self) -> bool:
        return self.checkpoint is not None or self.stage is not None


class CheckpointSection(Section):
    every: Span = Span(steps=1000)
    keep_last: PositiveInt = 3
    permanent_every: Span | None = None
    """Checkpoints at these points are never deleted."""
    asynchronous: bool = False
    """Copy to host memory, then write while training goes on; the host holds one more copy of weights and moments."""
    verify: bool = True
    """Read a checkpoint's files against their hashes before they are loaded."""


class EvaluationSection(Section):
    every: Span | None = None
    """None: only at the end of the stage, when there is validation data."""
    batches: PositiveInt = 20
    """Global batches of validation data."""


class WandbSection(Section):
    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "ouro-megatron"
    entity: str | None = None
    tags: list[str] = []
    group: str | None = None
    """Name of the pipeline that the run belongs to; the last part of run_dir when absent."""


class LoggingSection(Section):
    every: PositiveInt = 1
    """Steps between lines."""
    wandb: WandbSection = WandbSection()
    timeline_step: PositiveInt | None = None
    """Draw when each pipeline rank ran which task in this step: timeline.png and timeline.json (a Chrome trace) in the
    run folder."""
    tensorboard: bool = False
    """Also write TensorBoard event files; needs the `tensorboard` extra."""


class Recipe(Section):
    """One training stage."""

    name: str = Field(pattern=_NAME)
    run_dir: Path = Path("runs")
    """The run lives in run_dir/name."""
    model: ModelSection
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection
    budget: BudgetSection
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    training: TrainingSection = TrainingSection()
    health: HealthSection = HealthSection()
    init: InitSection = InitSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()

    @property
    def run_folder(self) -> Path:
        return self.run_dir / self.name

    @property
    def init_path(self) -> Path | None:
        """Where `init` takes the weights from; None for new ones."""
        return self.run_dir / self.init.stage if self.init.stage is not None else self.init.checkpoint
