"""The sinks of a normal run."""

from ouro_megatron.recipe.schema import LoggingSection
from ouro_megatron.telemetry.console import ConsoleSink
from ouro_megatron.telemetry.metrics_file import MetricsFile
from ouro_megatron.telemetry.sink import Sinks
from ouro_megatron.telemetry.tensorboard_sink import TensorboardSink
from ouro_megatron.telemetry.wandb_sink import WandbSink


def standard_sinks(logging: LoggingSection) -> Sinks:
    """metrics.jsonl, the console, Weights & Biases, on request TensorBoard: for rank 0 of a run; not started yet."""
    sinks = Sinks()
    sinks.add(
        MetricsFile(notify=sinks.notify),
        ConsoleSink(every=logging.every),
        WandbSink(logging.wandb, notify=sinks.notify),
    )
    if logging.tensorboard:
        sinks.add(TensorboardSink(notify=sinks.notify))
    return sinks
