"""A measured step as a timeline: what each rank's clock recorded, put beside the schedule's order of tasks."""

from collections.abc import Sequence

from ouro_megatron.planning.schedule import Event, Timeline, rank_order


def measured_timeline(
    recorded: Sequence[Sequence[tuple[str, float, float]]], loops: int, microbatches: int
) -> Timeline:
    """`recorded`: by pipeline rank, its tasks as (kind, start, end) in the order they ran, in seconds of one clock.

    Without a pipeline a task runs all loops of a microbatch. Raises ValueError when the tasks are not the schedule's.
    """
    pipeline = len(recorded)
    if pipeline == 1:
        loops = 1
    begin = min(start for tasks in recorded for _, start, _ in tasks)
    events = []
    for rank, tasks in enumerate(recorded):
        order = rank_order(pipeline, rank, loops, microbatches)
        if [kind for kind, _, _ in tasks] != [task.kind for task in order]:
            raise ValueError(
                f"pipeline rank {rank} ran {len(tasks)} tasks, the schedule has {len(order)} in another order"
            )
        events += [
            Event(rank, task, start - begin, end - begin) for task, (_, start, end) in zip(order, tasks, strict=True)
        ]
    return Timeline(events, pipeline)
