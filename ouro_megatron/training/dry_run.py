"""A big layout tried on a small machine: each distinct rank is built and runs one step on shapes alone.

Tensors are on the meta device and process groups are fake, so a rank of a 1,024-GPU job needs megabytes. What is real:
the recipe's checks, Megatron's groups, the model's construction, the schedule, every operation's shapes, and each
collective with its group, compared between the ranks that would take part in it.
"""

import multiprocessing
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, replace

from rich.console import Console

from ouro_megatron.data.complete import complete
from ouro_megatron.data.fingerprint import blend_fingerprint
from ouro_megatron.data.tokenizer import load_tokenizer
from ouro_megatron.errors import RecipeError, TrainingError
from ouro_megatron.parallel.collective_log import Call, disagreements
from ouro_megatron.planning.hardware import gpu_named
from ouro_megatron.planning.layout import Layout, layout_of
from ouro_megatron.planning.search import plan_for
from ouro_megatron.planning.show import show_plan
from ouro_megatron.recipe.load import dump_recipe, recipe_from_text
from ouro_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did."""

    rank: int
    role: str
    parameters: int
    calls: list[Call]
    seconds: float


def dry_run(
    recipe: Recipe, world: int, *, gpu: str = "h100", data: bool = True, pool: ProcessPoolExecutor | None = None
) -> None:
    """Tries `recipe` on `world` ranks without starting them, and prints the plan for `gpu`.

    `data` False leaves the data blend unread, for a machine that does not hold it. `pool`: processes for several dry
    runs one after the other, as `rehearsal_pool` makes them. Raises RecipeError for a layout that cannot run, DataError
    for data that cannot be used, TrainingError where ranks would not fit together.
    """
    console = Console(highlight=False, soft_wrap=True)
    layout = layout_of(recipe, world)
    if data:
        recipe = complete(recipe)
        tokenizer = load_tokenizer(recipe.data.tokenizer, model_vocab=recipe.model.vocab)
        for name, entries in (("train", recipe.data.train), ("validation", recipe.data.validation)):
            settings = recipe.data.model_copy(update={"train": entries})
            sources = blend_fingerprint(settings, seed=recipe.training.seed, tokenizer=tokenizer)["sources"]
            tokens = sum(source["tokens"] for source in sources)
            console.print(f"data.{name}: {len(sources)} sources, {tokens:,} tokens")
    started = time.monotonic()
    done = rehearse(recipe, world, ranks_to_try(layout), pool, lambda one: console.print(_line(one, layout)))
    problems = disagreements({one.rank: one.calls for one in done})
    if problems:
        raise TrainingError("ranks of this layout do not fit together:\n" + "\n".join(f"  {line}" for line in problems))
    calls = sum(len(one.calls) for one in done)
    console.print(
        f"{len(done)} ranks of {world} ran a step on shapes in {time.monotonic() - started:.0f} s: "
        f"{calls:,} collectives and messages agree in group, order, shape and type."
    )
    show_plan(plan_for(recipe, world, gpu_named(gpu)), console)


def ranks_to_try(layout: Layout) -> dict[int, str]:
    """Global rank -> role: each pipeline position, and at both ends the last peer in each other dimension as well."""
    tensor, size, data, pipeline = layout.tensor, layout.context, layout.data, layout.pipeline

    def number(pipeline_rank: int, tensor_rank: int = 0, context_rank: int = 0, data_rank: int = 0) -> int:
        return tensor_rank + tensor * (context_rank + size * (data_rank + data * pipeline_rank))

    chosen = {number(rank): f"pipeline {rank}" for rank in range(pipeline)}
    for rank in {0, pipeline - 1}:
        chosen.setdefault(number(rank, tensor_rank=tensor - 1), f"pipeline {rank}, tensor {tensor - 1}")
        chosen.setdefault(number(rank, context_rank=size - 1), f"pipeline {rank}, context {size - 1}")
        chosen.setdefault(number(rank, data_rank=data - 1), f"pipeline {rank}, data {data - 1}")
    return dict(sorted(chosen.items()))


def rehearsal_pool(ranks: int) -> ProcessPoolExecutor:
    """Processes of their own for `ranks` ranks, at most one a core and eight: fake tensors change them for good."""
    count = min(ranks, 8, os.cpu_count() or 1)
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def rehearse(
    recipe: Recipe,
    world: int,
    ranks: dict[int, str],
    pool: ProcessPoolExecutor | None = None,
    report: Callable[[Rehearsal], None] = lambda _: None,
) -> list[Rehearsal]:
    """Runs `rehearse_rank` for each rank in the processes of `pool`, or of one of its own."""
    text = dump_recipe(recipe)
    done = []
    with rehearsal_pool(len(ranks)) if pool is None else nullcontext(pool) as processes:
        pending = [processes.submit(rehearse_rank, text, world, rank, role) for rank, role in ranks.items()]
        try:
            for future in as_completed(pending):
                done.append(future.result())
                report(done[-1])
        except BrokenProcessPool as error:
            raise TrainingError("a process of the dry run was killed (out of memory?)") from error
        finally:
            for future in pending:
                future.cancel()
    return sorted(done, key=lambda one: one.rank)


def rehearse_rank(recipe_text: str, world: int, rank: int, role: str) -> Rehearsal:
    """One rank's step on shapes. Leaves this process unfit for real work.

    Raises TrainingError naming the rank when the model or the schedule does not go together.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    started = time.monotonic()
    recipe = recipe_from_text(recipe_text, "dry run")
    try:
        parameters, calls = _step_on_shapes(recipe, world, rank)
    except (RuntimeError, AssertionError, ValueError) as error:
        first = str(error).strip().splitlines()
        raise TrainingError(f"rank {rank} ({role}) fails: {first[0] if first else type(error).__name__}") from error
    return Rehearsal(rank, role, parameters, calls, time.monotonic() - started)


def _step_on_shapes(recipe: Recipe, world: int, rank: int) -> tuple[int, list[Call]]:
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ouro_megatron.model.looplm import LoopLM
    from ouro_megatron.parallel.collective_log import CollectiveLog
    from ouro_megatron.parallel.context import create_context
    from ouro_megatron.parallel.platform import Platform, activate_cpu
    from ouro_megatron.training.engine import Engine, Microbatch

    meta = torch.device("meta")
    activate_cpu(meta)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    context = replace(create_context(recipe.parallel, "cpu"), platform=Platform(meta, "gloo"))
    layout = layout_of(recipe, world)
    try:
        with meta, CollectiveLog() as log:
            lm = LoopLM(
                recipe.model,
                context,
                dtype=torch.bfloat16 if layout.bytes_per_value == 2 else torch.float32,
                recompute=layout.recompute,
                recompute_loops=layout.recompute_loops,
                layers_by_rank=layout.layers,
            )
            engine = Engine(lm, context, recipe.objective, None, loops=layout.loops)
            tokens_bs = torch.zeros(layout.microbatch, layout.sequence, dtype=torch.int64)
            batch = Microbatch(tokens_bs, tokens_bs, torch.ones(layout.microbatch, layout.sequence))
            engine.trace([batch] * layout.pipeline)
        return sum(parameter.numel() for parameter in lm.parameters()), log.calls
    finally:
        context.close()


def _line(one: Rehearsal, layout: Layout) -> str:
    return (
        f"  rank {one.rank} ({one.role}): {one.parameters / 1e6:.1f}M parameters, {len(one.calls):,} collectives "
        f"and messages, {one.seconds:.1f} s"
    )


def check_dry_run_options(world: int | None, nproc: int | None) -> int:
    """The world size of a dry run. Raises RecipeError when it is not said, or said twice."""
    if world is None:
        raise RecipeError("--dry-run needs --world N, the number of ranks to try, for example --world 1024")
    if nproc is not None:
        raise RecipeError("--nproc starts ranks, --dry-run starts none: leave --nproc out")
    return world
