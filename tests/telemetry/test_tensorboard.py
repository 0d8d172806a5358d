"""TensorBoard event files: what is written can be read back by TensorBoard."""

import math
import subprocess
import sys
from pathlib import Path

from ouro_megatron.recipe.schema import LoggingSection, WandbSection
from ouro_megatron.telemetry.records import EventRecord
from ouro_megatron.telemetry.setup import standard_sinks
from ouro_megatron.telemetry.tensorboard_sink import TensorboardSink
from tests.telemetry.test_metrics_file import evaluation, info, step


def test_scalars_over_tokens_an_attempt_a_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    for _ in range(2):
        sink = TensorboardSink(notify=lambda name, message: said.append(message))
        sink.start(info(tmp_path))
        sink.write(EventRecord(0, "start", "nothing to draw"))
        sink.write(step(1, loss=math.nan))
        sink.write(step(2))
        sink.write(evaluation(2))
        sink.close(None)
    assert said == []
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["attempt-1", "attempt-2"]
    events = EventAccumulator(str(tmp_path / "tensorboard" / "attempt-2"))
    events.Reload()
    tensors = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("loss/loop_3")]
    assert tensors == [(1000, 4.25), (2000, 4.25)]
    assert [event.step for event in events.Tensors("loss/total")] == [2000]  # NaN cannot be drawn
    assert events.Tensors("held_out/loop_1")


def test_it_is_off_unless_asked_for() -> None:
    for wanted in (False, True):
        sinks = standard_sinks(LoggingSection(tensorboard=wanted, wandb=WandbSection(mode="disabled")))
        assert any(isinstance(sink, TensorboardSink) for sink in sinks.members) == wanted


def test_package_missing_is_one_warning(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["tensorboard"] = None
from pathlib import Path
from ouro_megatron.telemetry.tensorboard_sink import TensorboardSink
from tests.telemetry.test_metrics_file import info, step
sink = TensorboardSink(notify=lambda name, message: print(name, message))
sink.start(info(Path({str(tmp_path)!r})))
sink.write(step(1))
sink.close(None)
"""
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert result.stdout.splitlines() == [
        "warning TensorBoard is off for this run: the package is missing: pip install 'ouro-megatron[tensorboard]'"
    ], result.stderr
