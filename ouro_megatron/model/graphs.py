"""CUDA graphs of the layers' visits: the GPU gets all kernels of one loop's pass in one call.

Python and launches take 4 to 6 ms for one layer's visit, forward and backward (docs/results/gpu.md); with small pieces
of work the GPU waits for them, T times as often as in a plain model of the same layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Visit = Callable[[Tensor, int], Tensor]
"""(h [s, b, h], loop from 0) -> [s, b, h]: one pass of this rank's layers."""


class GraphedVisits:
    """A pair of recorded graphs, forward and backward, for each of T loops.

    A graph repeats its kernels on the addresses it was recorded with. So every loop has its own room for activations,
    and work comes in the order of recording: forward 1..T, then backward T..1, for one microbatch after another.
    Weights, gradient buffers and 8-bit copies of weights are used where they lie: values may change, places not.
    """

    def __init__(self, visit: Visit, layers: nn.Module, example_sbh: Tensor, loops: int) -> None:
        """Records on zeros of `example_sbh`'s shape and dtype; nothing is computed but one visit before, which warms
        the capture's stream up and makes the weights' 8-bit copies.

        `layers` is what `visit` runs. Backward adds to the `main_grad` of those of its parameters that want gradients.
        What that one visit leaves there is of no use: clear the buffers afterwards.
        """
        self.shape, self.loops = example_sbh.shape, loops
        # What it holds, angles of rotation for one, is read by every replay: it must not be freed before the graphs.
        self._visit = visit
        self._visits = [_RecordedVisit(example_sbh) for _ in range(loops)]
        with _new_leaves(layers) as leaves:
            self._record(leaves)

    def _record(self, leaves: Sequence[nn.Parameter]) -> None:
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = self._visits[0]
            _gradients(self._visit(first.input_sbh, 0), first.input_sbh, leaves, first.grad_output_sbh)
        torch.cuda.current_stream().wait_stream(stream)
        arguments = {"pool": pool, "stream": stream}
        for loop, recorded in enumerate(self._visits):
            recorded.record_forward(self._visit, loop, arguments)
        for recorded in reversed(self._visits):
            recorded.record_backward(leaves, arguments)

    def __call__(self, h_sbh: Tensor, loop: int) -> Tensor:
        """One visit, with its place in autograd. The result is overwritten by the next microbatch's."""
        result: Tensor = _Replay.apply(h_sbh, self._visits[loop])
        return result


class _RecordedVisit:
    """One loop's pair of graphs and the tensors that stand at their ends."""

    def __init__(self, example_sbh: Tensor) -> None:
        self.input_sbh = torch.zeros_like(example_sbh).requires_grad_()
        self.grad_output_sbh = torch.zeros_like(example_sbh)
        self.output_sbh: Tensor
        self.grad_input_sbh: Tensor
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.awaits_backward = False

    def record_forward(self, visit: Visit, loop: int, arguments: dict[str, Any]) -> None:
        # Other threads (the communication library's, a progress bar's) may go on using CUDA meanwhile.
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local", **arguments):
            self.output_sbh = visit(self.input_sbh, loop)

    def record_backward(self, leaves: Sequence[nn.Parameter], arguments: dict[str, Any]) -> None:
        with torch.cuda.graph(self.backward, capture_error_mode="thread_local", **arguments):
            self.grad_input_sbh = _gradients(self.output_sbh, self.input_sbh, leaves, self.grad_output_sbh)
        self.output_sbh = self.output_sbh.detach()


@contextmanager
def _new_leaves(layers: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Parameters of `layers` are replaced by new ones on the same memory inside; yields those that want gradients.

    Megatron's hooks keep each parameter's accumulation node alive, which belongs to the stream it was made on: backward
    would wait for that stream, and a recording must not. New leaves have nodes of the recording's stream.
    """
    modules = layers.modules()
    places = [(module, name, old) for module in modules for name, old in module.named_parameters(recurse=False)]
    leaves = []
    for module, name, old in places:
        leaf = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
        leaf.__dict__.update(old.__dict__)
        module._parameters[name] = leaf
        if leaf.requires_grad:
            leaves.append(leaf)
    try:
        yield leaves
    finally:
        for module, name, old in places:
            module._parameters[name] = old


def _gradients(output: Tensor, source: Tensor, leaves: Sequence[nn.Parameter], grad_output: Tensor) -> Tensor:
    """The source's gradient; the leaves' are added to their buffers, where products have not done so themselves."""
    found = torch.autograd.grad(output, (source, *leaves), grad_output, allow_unused=True)
    for leaf, gradient in zip(leaves, found[1:], strict=True):
        if gradient is not None:
            leaf.main_grad.add_(gradient)  # type: ignore[attr-defined]
    return found[0]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_sbh: Tensor, recorded: _RecordedVisit) -> Tensor:
        if recorded.awaits_backward:
            raise RuntimeError("CUDA graphs: the activations of a microbatch would be overwritten before its backward")
        recorded.awaits_backward = True
        ctx.recorded = recorded
        recorded.input_sbh.detach().copy_(h_sbh)
        recorded.forward.replay()
        return recorded.output_sbh.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        recorded: _RecordedVisit = ctx.recorded
        recorded.grad_output_sbh.copy_(gradients[0])
        recorded.backward.replay()
        recorded.awaits_backward = False
        return recorded.grad_input_sbh.detach(), None
