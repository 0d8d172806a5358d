"""TensorBoard event files, on request. A full disk or a missing package is one warning."""

import math
from typing import Any

from ouro_megatron.telemetry.metric_names import metrics_of
from ouro_megatron.telemetry.records import EventRecord, Record
from ouro_megatron.telemetry.sink import Notify, RunInfo


class TensorboardSink:
    """Scalars over tokens in RUN/tensorboard/attempt-N: `tensorboard --logdir RUN` shows attempts as runs."""

    def __init__(self, notify: Notify) -> None:
        self._notify = notify
        self._writer: Any = None

    def start(self, run: RunInfo) -> None:
        try:
            # TensorBoard's own writer: the one of torch would bring torch into this package.
            from tensorboard.summary import Writer

            root = run.run_folder / "tensorboard"
            number = 1 + sum(1 for child in root.glob("attempt-*")) if root.is_dir() else 1
            self._writer = Writer(str(root / f"attempt-{number}"))
        except ImportError:
            self._give_up("the package is missing: pip install 'ouro-megatron[tensorboard]'")
        except Exception as error:
            self._give_up(str(error))

    def write(self, record: Record) -> None:
        if self._writer is None or isinstance(record, EventRecord):
            return
        try:
            for name, value in metrics_of(record).items():
                if math.isfinite(value):
                    self._writer.add_scalar(name, value, record.tokens)
        except Exception as error:
            self._give_up(str(error))

    def close(self, summary: str | None) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        try:
            writer.close()
        except Exception as error:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        self._writer = None
        self._notify("warning", f"TensorBoard is off for this run: {' '.join(why.split())}")
