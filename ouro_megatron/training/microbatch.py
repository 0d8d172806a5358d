"""What a rank computes on in one forward pass: whole sequences as they are read, and a context-parallel rank's part."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ouro_megatron.model.context_attention import ContextPart
from ouro_megatron.model.documents import DocumentBounds
from ouro_megatron.parallel.context import ParallelContext


@dataclass(frozen=True)
class Microbatch:
    """One data-parallel rank's share of one forward pass, on the device: whole sequences.

    The engine takes a context-parallel rank's tokens out of it.
    """

    tokens_bs: Tensor
    labels_bs: Tensor
    mask_bs: Tensor
    documents: DocumentBounds | None = None
    """Bounds of documents that must not see each other; None: each row is one."""

    def part(self, context: ParallelContext, rows_part: ContextPart | None) -> "OwnTokens":
        """What `context`'s rank computes on; `rows_part` where each row is one document."""
        documents: DocumentBounds | ContextPart | None = self.documents
        rows, length = self.tokens_bs.shape
        if context.context_size > 1:
            documents = rows_part
            if self.documents is not None:
                documents = context_part(self.documents.lengths, rows, length, context)
        return OwnTokens(
            context.own_tokens(self.tokens_bs),
            context.own_tokens(self.labels_bs),
            context.own_tokens(self.mask_bs),
            length,
            documents,
            packed=self.documents is not None,
        )

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> "Microbatch":
        """From what a MicrobatchReader yields."""
        tokens_bs = batch["tokens_bs"]
        documents = DocumentBounds.of_batch(batch, tokens_bs.device)
        return cls(tokens_bs, batch["labels_bs"], batch["loss_mask_bs"], documents)


def context_part(documents: Sequence[int], rows: int, length: int, context: ParallelContext) -> ContextPart:
    """`context`'s rank's part of rows that hold documents of these lengths."""
    return ContextPart.of(documents, rows, length, context.context_rank, context.context_size, context.device)


@dataclass(frozen=True)
class OwnTokens:
    """A rank's tokens of one microbatch: all, or under context parallelism [b, s / context_size] of them."""

    tokens_bs: Tensor
    labels_bs: Tensor
    mask_bs: Tensor
    length: int
    """Tokens of a whole sequence."""
    documents: DocumentBounds | ContextPart | None
    packed: bool
    """Whether rows hold several documents."""
