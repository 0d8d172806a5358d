"""Weights & Biases, offline by default. Whatever goes wrong there is one warning, never the end of a run."""

import threading
import uuid
from pathlib import Path
from typing import Any

from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.records import EvalRecord, LoopStats, Record, StepRecord
from ouro_megatron.telemetry.sink import Notify, RunInfo

_ID_FILE = "wandb-id.txt"
_START_SECONDS = 30.0
_FINISH_SECONDS = 60.0


def metrics_of(record: Record) -> dict[str, float]:
    """Grouped metric names of a record; empty for events."""
    if isinstance(record, StepRecord):
        values = {
            "loss/total": record.loss,
            **_loops(record.loops, "loss"),
            "optim/lr": record.lr,
            "optim/grad_norm": record.grad_norm,
            "optim/skipped_steps": record.skipped_steps,
            "perf/tokens_per_second": record.tokens_per_second,
            "perf/step_seconds": record.seconds,
            "progress/tokens": record.tokens,
            "progress/global_tokens": record.global_tokens,
        }
        if record.mfu is not None:
            values["perf/mfu"] = record.mfu
        return values
    if isinstance(record, EvalRecord):
        return {"held_out/total": record.loss, **_loops(record.loops, "held_out"), "progress/tokens": record.tokens}
    return {}


def _loops(loops: LoopStats, group: str) -> dict[str, float]:
    exits = "exit" if group == "loss" else "held_out_exit"
    return {
        **{f"{group}/loop_{t}": value for t, value in enumerate(loops.ce, start=1)},
        **{f"{exits}/p_{t}": value for t, value in enumerate(loops.exit_probability, start=1)},
        f"{exits}/entropy": loops.entropy,
        f"{exits}/expected_depth": loops.expected_depth,
    }


class WandbSink:
    """Logs under step as the x axis; a resumed run keeps its id, stored in the run folder."""

    def __init__(self, settings: WandbSection, notify: Notify) -> None:
        self._settings = settings
        self._notify = notify
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        if self._settings.mode == "disabled":
            return
        box: list[Any] = []
        # wandb may wait for its service or server for minutes; training must not.
        thread = threading.Thread(target=self._connect, args=(run, box), daemon=True)
        thread.start()
        thread.join(_START_SECONDS)
        if not box:
            self._give_up(f"no answer within {_START_SECONDS:.0f} seconds")
        elif isinstance(box[0], BaseException):
            self._give_up(str(box[0]) or type(box[0]).__name__)
        else:
            self._run = box[0]

    def _connect(self, run: RunInfo, box: list[Any]) -> None:
        try:
            import wandb

            box.append(
                wandb.init(
                    mode=self._settings.mode,
                    project=self._settings.project,
                    entity=self._settings.entity,
                    tags=self._settings.tags,
                    name=run.name,
                    id=_run_id(run),
                    resume="allow" if self._settings.mode == "online" else None,
                    dir=str(run.run_folder),
                    config=run.config,
                    settings=wandb.Settings(
                        silent=True,
                        console="off",
                        init_timeout=_START_SECONDS - 5,
                        login_timeout=5,
                        disable_git=True,
                        disable_code=True,
                    ),
                )
            )
        except BaseException as error:  # wandb ends with SystemExit and errors of its own alike
            box.append(error)

    def write(self, record: Record) -> None:
        values = metrics_of(record)
        if self._run is None or not values:
            return
        try:
            self._run.log(values, step=record.step)
        except Exception as error:
            self._give_up(str(error))

    def close(self, summary: str | None) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        thread = threading.Thread(target=_finish, args=(run,), daemon=True)
        thread.start()
        thread.join(_FINISH_SECONDS)

    def _give_up(self, why: str) -> None:
        self._run = None
        reason = " ".join(why.split())
        self._notify("warning", f"Weights & Biases is off for this run: {reason}; metrics.jsonl and the report go on")


def _finish(run: Any) -> None:
    # Nothing is left to tell: the run's other records are complete, and offline files are on disk.
    try:
        run.finish()
    except Exception as error:
        print(f"warning: Weights & Biases did not close cleanly: {error}", flush=True)


def _run_id(run: RunInfo) -> str:
    file: Path = run.run_folder / _ID_FILE
    if run.resumed and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    identity = uuid.uuid4().hex[:8]
    file.write_text(identity + "\n", encoding="utf-8")
    return identity
