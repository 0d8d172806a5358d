"""Real ranks under the real launcher, one of which stalls at a chosen place. Imported by the ranks themselves."""

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ouro_megatron.recipe.load import dump_recipe
from ouro_megatron.recipe.schema import Recipe
from ouro_megatron.training.launch import RankProcess, Ranks
from tests.distributed.ranks import preloaded_forkserver
from tests.faults.forked import ForkedRank

STEP, LOOP, MICROBATCH = 3, 2, 3
SLOW_SECONDS = 0.12
BEATS_SECONDS = 1.0
"""A rank stands at its place so long before it freezes: the others know what it last said."""


class StallingRanks(Ranks):
    """The launcher, with ranks forked from a server that has imported everything; rank `victim` does `what`."""

    def __init__(self, recipe: Recipe, folder: Path, ranks: int, what: str, victim: int) -> None:
        folder.mkdir(parents=True)
        file = folder / "recipe.yaml"
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        failures = folder / "failures"
        failures.mkdir()
        super().__init__(recipe, file, ranks, failures)
        self.fired = folder / "fired"
        self._what, self._victim = what, victim

    def _spawn(self, rank: int, environment: dict[str, str], log: Path) -> RankProcess:
        what = self._what if rank == self._victim else ""
        arguments = (environment, str(log), str(self._file), what, str(self.fired))
        process = preloaded_forkserver().Process(target=rank_main, args=arguments)
        process.start()
        return ForkedRank(process)


def rank_main(environment: dict[str, str], log: str, recipe_file: str, what: str, fired: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from ouro_megatron.training.worker import run_worker

    if what:
        _install(what, Path(fired))
    status = run_worker(Path(recipe_file))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _install(what: str, fired: Path) -> None:
    """`what`: "freeze in forward", "freeze in data", "hang in data", "freeze in optimizer", "tamper", "slow"."""
    import ouro_megatron.training.stage as stage_module
    from ouro_megatron.model.looplm import LoopLM
    from ouro_megatron.parallel.position import Position
    from ouro_megatron.training.data_stream import DataStream
    from ouro_megatron.training.engine import Engine

    places: list[Position] = []
    engines: list[Engine] = []

    class Seen(Position):
        def __init__(self, stage: str) -> None:
            super().__init__(stage=stage)
            places.append(self)

    class Built(Engine):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            engines.append(self)

    stage_module.Position = Seen  # type: ignore[misc, assignment]
    stage_module.Engine = Built  # type: ignore[misc]

    def freeze() -> None:
        fired.touch()
        time.sleep(BEATS_SECONDS)
        os.kill(os.getpid(), signal.SIGSTOP)

    def hang() -> None:
        fired.touch()
        time.sleep(600)

    def at_step() -> bool:
        return bool(places) and places[0].step == STEP

    act = hang if what.startswith("hang") else freeze
    if what.endswith("data"):
        _before(DataStream, "step", at_step, act)
    elif what.endswith("forward"):
        _before(
            LoopLM,
            "run_layers",
            lambda: at_step() and (places[0].loop, places[0].microbatch) == (LOOP, MICROBATCH),
            act,
        )
    elif what.endswith("optimizer"):
        _before(dist, "all_reduce", lambda: at_step() and places[0].phase == "optimizer step", act)
    elif what == "tamper":
        _before(Engine, "accumulate", at_step, lambda: _flip_a_bit(engines[0]))
    else:
        _before(LoopLM, "run_layers", lambda: True, lambda: time.sleep(SLOW_SECONDS))


def _flip_a_bit(engine: Any) -> None:
    """In the final norm, before a forward: two steps later nothing that is copied is equal any more."""
    weight = dict(engine.lm.named_global_parameters())["decoder.final_layernorm.weight"].detach().view(torch.int32)
    weight[0] ^= 1 << 12


def _before(owner: Any, name: str, condition: Callable[[], bool], act: Callable[[], None]) -> None:
    function = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if condition():
            act()
        return function(*args, **kwargs)

    setattr(owner, name, wrapped)
