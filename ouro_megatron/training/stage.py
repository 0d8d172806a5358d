"""One training stage on one rank: from a recipe to a trained checkpoint. All ranks run it together."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ouro_megatron.checkpoint.load import load_run
from ouro_megatron.checkpoint.state import RunState, StageRecord, history_with, read_state
from ouro_megatron.data.dataset import SampleDataset, build_dataset
from ouro_megatron.data.fingerprint import blend_fingerprint, check_fingerprint
from ouro_megatron.data.indexed import read_manifest
from ouro_megatron.data.ranks import from_rank_zero
from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from ouro_megatron.errors import TrainingError
from ouro_megatron.model.fused import fused_pieces
from ouro_megatron.model.looplm import LoopLM, initialise
from ouro_megatron.parallel.context import ParallelContext, context_for
from ouro_megatron.parallel.position import Position
from ouro_megatron.parallel.watchdog import Watchdog
from ouro_megatron.planning.flops import flops_per_token, parameter_counts, peak_flops
from ouro_megatron.recipe.layers import balanced_layers
from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schedule import BatchPlan, LoopPlan
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.recipe.validate import check_recipe
from ouro_megatron.telemetry.git_state import git_state
from ouro_megatron.telemetry.setup import standard_sinks
from ouro_megatron.telemetry.sink import RunInfo, Sinks, pipeline_of
from ouro_megatron.training.callbacks import Evaluation, Records
from ouro_megatron.training.checkpoints import Checkpoints
from ouro_megatron.training.consistency import Consistency
from ouro_megatron.training.data_stream import DataStream
from ouro_megatron.training.engine import Engine
from ouro_megatron.training.failure import report
from ouro_megatron.training.health import Health
from ouro_megatron.training.progress import Progress, health_values
from ouro_megatron.training.rollback import Rollback, Rollbacks, forget_ledger, known_rollbacks, left_out
from ouro_megatron.training.signals import StopSignals
from ouro_megatron.training.spikes import SpikeGuard
from ouro_megatron.training.spread import Stragglers
from ouro_megatron.training.start import Start, verified_start
from ouro_megatron.training.stopping import Stopping
from ouro_megatron.training.timelines import Timelines
from ouro_megatron.training.trainer import Trainer, naming_the_place


def run_stage(recipe: Recipe, signals: StopSignals) -> bool:
    """Trains the stage to its end (True) or to a stop signal (False), resuming where the run folder left off.

    Raises an OuroError for everything a user can act on; the process must end then, other ranks wait for it. When
    another rank stalls, one of them says why and this process ends without returning.
    """
    check_recipe(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    context = context_for(recipe)
    try:
        lock = _lock(recipe.run_folder) if context.rank == 0 else None
        position = Position(stage=recipe.name)
        try:
            with (
                Watchdog(context, position, recipe.parallel.timeout_seconds, report) as watchdog,
                watchdog.explaining(),
            ):
                return _run(recipe, context, signals, position, watchdog)
        finally:
            if lock is not None:
                os.close(lock)
    finally:
        context.close()


def _run(
    recipe: Recipe, context: ParallelContext, signals: StopSignals, position: Position, watchdog: Watchdog
) -> bool:
    plan = BatchPlan(recipe)
    position.phase = "choosing where to start"
    start = verified_start(recipe, plan, context)
    position.phase = "opening the data"
    tokenizer = load_tokenizer(recipe.data.tokenizer, model_vocab=recipe.model.vocab)
    fingerprint = from_rank_zero(lambda: _fingerprint(recipe, tokenizer))
    rollbacks = from_rank_zero(lambda: _rollbacks(recipe, start))
    data = DataStream(
        lambda samples: _reader(recipe, context, _dataset(recipe, tokenizer, "train", samples)),
        start.first_sample,
        plan.total_samples,
        left_out(rollbacks),
    )
    held_out = None
    if recipe.data.validation:
        samples = plan.at(0).samples * recipe.evaluation.batches
        held_out = _reader(recipe, context, _dataset(recipe, tokenizer, "validation", samples))
    position.phase = "building the model"
    dtype = torch.bfloat16 if recipe.precision.compute == "bf16" else torch.float32
    layers = recipe.parallel.layers or balanced_layers(recipe.model, context.pipeline_size, recipe.data.sequence_length)
    lm = LoopLM(
        recipe.model,
        context,
        dtype=dtype,
        recompute=recipe.training.recompute,
        recompute_loops=recipe.training.recompute_loops,
        layers_by_rank=layers,
        fp8=recipe.precision.fp8,
    )
    if start.folder is None:
        initialise(lm, recipe.training.seed)
    loops = LoopPlan(recipe, plan).at(0)
    engine = Engine(
        lm,
        context,
        recipe.objective,
        recipe.optimizer,
        loops=loops,
        position=position,
        overlap=recipe.parallel.overlap,
        cuda_graphs=recipe.training.cuda_graphs,
    )
    guard = SpikeGuard(recipe.health, context)
    progress, history = Progress(), list[StageRecord]()
    with naming_the_place(engine):
        if start.folder is not None:
            progress, history = _load(recipe, engine, start, guard, fingerprint)
        else:
            engine.adopt_weights()
    with _sinks(recipe, context, plan, progress, start, history) as sinks, watchdog.explaining():
        if sinks is not None:
            watchdog.last_words = sinks.last_words
            for name, report in data.packing().items():
                sinks.notify("packing", f"{name}: {report.describe(recipe.data.long_documents)}")
        returns = Rollbacks(
            recipe.run_folder, lambda folder: load_run(engine, folder, recipe, optimizer=True), rollbacks
        )
        stopping = Stopping(signals, sinks)
        checkpoints = Checkpoints(
            recipe.run_folder / "checkpoints",
            lambda trainer: _state(trainer, guard, returns, fingerprint, history),
            sinks,
            stopping,
            saved=progress,
        )
        trainer = Trainer(
            recipe,
            engine,
            data,
            plan,
            progress,
            [
                stopping,
                Records(sinks, partial(_flops, recipe), _peak(recipe, context), returns),
                Stragglers(sinks),
                Timelines(recipe.logging.timeline_step, sinks),
                Health(recipe, sinks, guard, returns, checkpoints.settle, checkpoints.rolled_back),
                Evaluation(held_out, sinks, stopping),
                Consistency(recipe.training.check_every),
                checkpoints,
            ],
            guard.judge,
        )
        trainer.fit()
    data.close()
    if held_out is not None:
        held_out.close()
    return trainer.is_done and not progress.pending_evaluation


def _rollbacks(recipe: Recipe, start: Start) -> list[Rollback]:
    """Rank 0: what the run left out so far; a run that begins anew forgets what an older one of its name did."""
    if start.resumed and start.folder is not None:
        return known_rollbacks(recipe.run_folder, read_state(start.folder))
    forget_ledger(recipe.run_folder)
    return []


def _load(
    recipe: Recipe, engine: Engine, start: Start, guard: SpikeGuard, fingerprint: dict[str, Any]
) -> tuple[Progress, list[StageRecord]]:
    assert start.folder is not None
    state = load_run(engine, start.folder, recipe, optimizer=start.resumed or recipe.init.optimizer)
    if start.resumed:
        check_fingerprint(state.fingerprint, fingerprint)
        guard.restore(state.health.get("window", {}))
        progress = Progress()
        progress.take(state)
        return progress, list(state.history)
    if recipe.init.data_position:
        check_fingerprint(state.fingerprint, fingerprint)
    updates = state.optimizer_steps if recipe.init.optimizer else 0
    return Progress(optimizer_steps=updates, first_sample=start.first_sample), history_with(state, start.folder)


def _state(
    trainer: Trainer,
    guard: SpikeGuard,
    returns: Rollbacks,
    fingerprint: dict[str, Any],
    history: list[StageRecord],
) -> RunState:
    progress = trainer.progress
    here = trainer.plan.at(progress.step)
    return RunState(
        step=progress.step,
        tokens=here.consumed_tokens,
        samples=here.consumed_samples,
        optimizer_steps=progress.optimizer_steps,
        skipped_steps=progress.skipped_steps,
        seconds=progress.seconds,
        world=trainer.context.describe(),
        recipe=trainer.recipe.model_dump(mode="json"),
        fingerprint=fingerprint,
        first_sample=progress.first_sample,
        history=history,
        health=health_values(progress, guard.state(), returns.values()),
        pending_evaluation=progress.pending_evaluation,
    )


def _fingerprint(recipe: Recipe, tokenizer: TextTokenizer) -> dict[str, Any]:
    return blend_fingerprint(recipe.data, seed=recipe.training.seed, tokenizer=tokenizer)


def _dataset(recipe: Recipe, tokenizer: TextTokenizer, split: str, samples: int) -> SampleDataset:
    return build_dataset(
        recipe.data,
        samples=samples,
        seed=recipe.training.seed,
        tokenizer=tokenizer,
        cache=recipe.data.cache or recipe.run_folder / "cache",
        split_name=split,
    )


def _reader(recipe: Recipe, context: ParallelContext, dataset: SampleDataset) -> MicrobatchReader:
    sampler = GlobalBatchSampler(recipe.batch.microbatch, context.data_rank, context.data_size)
    return MicrobatchReader(dataset, sampler, context.device)


def _flops(recipe: Recipe, loops: int) -> float:
    model = recipe.model.model_copy(update={"loops": loops})
    return flops_per_token(model, recipe.data.sequence_length)


def _peak(recipe: Recipe, context: ParallelContext) -> float | None:
    if context.platform.is_cpu:
        return None
    return peak_flops(torch.cuda.get_device_name(context.device), recipe.precision.compute)


def _lock(folder: Path) -> int:
    """Keeps a second job out of the run folder; the lock goes away with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.read(handle, 200).decode(errors="replace")
        os.close(handle)
        raise TrainingError(
            f"{folder} is in use by another job ({owner}); wait for it or choose another name"
        ) from error
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


@contextmanager
def _sinks(
    recipe: Recipe,
    context: ParallelContext,
    plan: BatchPlan,
    progress: Progress,
    start: Start,
    history: list[StageRecord],
) -> Iterator[Sinks | None]:
    """Rank 0's sinks, started, closed whatever happens; None on the other ranks."""
    if context.rank != 0:
        yield None
        return
    folder = recipe.run_folder
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    _write_data_facts(recipe)
    lineage = [asdict(record) for record in history]
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=1), encoding="utf-8")
    sinks = standard_sinks(recipe.logging)
    sinks.start(
        RunInfo(
            name=recipe.name,
            run_folder=folder,
            config=recipe.model_dump(mode="json"),
            world=context.describe(),
            parameters=parameter_counts(recipe.model).total,
            start_step=progress.step,
            total_steps=plan.total_steps,
            resumed=start.resumed,
            pipeline=pipeline_of(recipe),
            lineage=lineage,
            git=git_state(),
        )
    )
    try:
        if start.folder is not None:
            sinks.notify("resume" if start.resumed else "start", f"loaded {start.folder}")
        if not context.platform.is_cpu:
            sinks.notify("fused", fused_pieces(recipe.model.implementation, context.device).describe())
        for line in start.handover:
            sinks.notify("handover", line)
        for note in start.notes:
            sinks.notify("warning", note)
        yield sinks
    except BaseException as error:
        sinks.notify("failure", str(error).splitlines()[0] if str(error) else type(error).__name__)
        raise
    finally:
        sinks.close()


def _write_data_facts(recipe: Recipe) -> None:
    """data.json for the report: the validation blend's unigram entropy, where its manifests know it."""
    known = [(entry.share, read_manifest(entry.path)) for entry in recipe.data.validation]
    if not known or any(manifest is None or "unigram_entropy" not in manifest for _, manifest in known):
        return
    total = sum(weight for weight, _ in known)
    entropy = sum(weight * manifest["unigram_entropy"] for weight, manifest in known if manifest) / total
    path = recipe.run_folder / "data.json"
    path.write_text(json.dumps({"unigram_entropy": entropy}), encoding="utf-8")
