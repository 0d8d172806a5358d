"""Weights & Biases, offline by default. Whatever goes wrong there is one warning, never the end or a stall of a run."""

import json
import queue
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

from ouro_megatron.recipe.schema import WandbSection
from ouro_megatron.telemetry.metric_names import X_AXIS, metrics_of
from ouro_megatron.telemetry.records import Record
from ouro_megatron.telemetry.sink import Notify, RunInfo

_ATTEMPTS = "wandb-attempts.json"
_START_SECONDS = 30.0
_FINISH_SECONDS = 60.0
_WAITING = 1000
"""Records that may wait for wandb. More means that it has stopped taking them."""


class WandbSink:
    """One W&B run for each attempt at a stage, all attempts in the group PIPELINE/STAGE.

    wandb is called from a thread of its own: a service that is gone or hangs cannot hold training up.
    """

    def __init__(self, settings: WandbSection, notify: Notify) -> None:
        self._settings = settings
        self._notify = notify
        self._records: queue.Queue[dict[str, float] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._failure = ""

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
            self._thread = threading.Thread(target=self._feed, args=(box[0],), daemon=True, name="wandb")
            self._thread.start()

    def _connect(self, run: RunInfo, box: list[Any]) -> None:
        try:
            import wandb

            number, identity = _new_attempt(run)
            opened = wandb.init(
                mode=self._settings.mode,
                project=self._settings.project,
                entity=self._settings.entity,
                tags=self._settings.tags,
                group=run.group,
                job_type=run.name,
                name=f"{run.name} attempt {number}",
                id=identity,
                dir=str(run.run_folder),
                config=_config(run, number),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    init_timeout=_START_SECONDS - 5,
                    login_timeout=5,
                    disable_git=True,
                    disable_code=True,
                ),
            )
            opened.define_metric(X_AXIS)
            opened.define_metric("*", step_metric=X_AXIS)
            for name in ("recipe.yaml", "lineage.json"):
                if (run.run_folder / name).is_file():
                    # A copy: saved from elsewhere it is a link, and a later sync sends what a later attempt wrote.
                    copied = shutil.copy(run.run_folder / name, opened.dir)
                    opened.save(str(copied), base_path=opened.dir, policy="now")
            box.append(opened)
        except BaseException as error:  # wandb ends with SystemExit and errors of its own alike
            box.append(error)

    def write(self, record: Record) -> None:
        if self._thread is None:
            return
        if self._failure:
            self._give_up(self._failure)
            return
        values = metrics_of(record)
        if values:
            try:
                self._records.put_nowait(values)
            except queue.Full:
                self._give_up(f"{_WAITING} records wait for it")

    def _feed(self, run: Any) -> None:
        """Hands records on until None comes. W&B counts its own steps: after a rollback ours go backwards."""
        try:
            while (values := self._records.get()) is not None:
                run.log(values)
            run.finish()
        except BaseException as error:
            self._failure = str(error) or type(error).__name__

    def close(self, summary: str | None) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._records.put(None, timeout=_FINISH_SECONDS)
        except queue.Full:
            self._failure = f"{_WAITING} records wait for it"
        else:
            thread.join(_FINISH_SECONDS)
        if self._failure:
            self._give_up(self._failure)

    def _give_up(self, why: str) -> None:
        self._thread = None
        reason = " ".join(why.split())
        self._notify("warning", f"Weights & Biases is off for this run: {reason}; metrics.jsonl and the report go on")


def _config(run: RunInfo, attempt: int) -> dict[str, Any]:
    """The recipe's values at the top level, and what else tells this run from others."""
    return {
        **run.config,
        "pipeline": run.pipeline,
        "attempt": attempt,
        "start_step": run.start_step,
        "world": run.world,
        "parameters": run.parameters,
        "lineage": list(run.lineage),
        "git": dict(run.git),
    }


def _new_attempt(run: RunInfo) -> tuple[int, str]:
    """Number and W&B id of this attempt; a stage that begins anew counts from 1 again."""
    file: Path = run.run_folder / _ATTEMPTS
    try:
        attempts = json.loads(file.read_text(encoding="utf-8")) if run.resumed else []
    except (OSError, ValueError):  # ids are for people: a lost list only makes the count begin again
        attempts = []
    identity = uuid.uuid4().hex[:8]
    attempts.append({"id": identity, "start_step": run.start_step})
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(attempts, indent=1), encoding="utf-8")
    partial.replace(file)
    return len(attempts), identity
