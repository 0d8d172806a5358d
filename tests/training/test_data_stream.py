"""Which samples a step reads, and from which sources, when some are left out."""

from collections import Counter

import torch

from ouro_megatron.data.sampler import GlobalBatchSampler, MicrobatchReader
from ouro_megatron.data.skipping import Window
from ouro_megatron.recipe.schedule import BatchPoint
from ouro_megatron.training.data_stream import DataStream


class Numbers(torch.utils.data.Dataset):
    """Sample k is the number k; every third one is of source "b"."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        value = torch.tensor([k])
        return {"tokens": value, "labels": value, "loss_mask": torch.ones(1)}

    def source_counts(self, start: int, end: int) -> dict[str, int]:
        return dict(Counter("b" if k % 3 == 2 else "a" for k in range(start, end)))


def stream(first: int, samples: int, windows: tuple[Window, ...] = ()) -> DataStream:
    def open_reader(needed: int) -> MicrobatchReader:
        return MicrobatchReader(Numbers(needed), GlobalBatchSampler(2), torch.device("cpu"))

    return DataStream(open_reader, first, samples, windows)


def numbers(data: DataStream, consumed: int, samples: int) -> list[int]:
    point = BatchPoint(0, consumed, consumed, samples, samples)
    return [int(k) for batch in data.step(point) for k in batch.tokens_bs.flatten()]


def test_steps_go_round_the_windows_and_to_the_end() -> None:
    data = stream(10, 12, (Window(14, 20),))
    assert numbers(data, 0, 4) == [10, 11, 12, 13]
    assert numbers(data, 4, 4) == [20, 21, 22, 23]
    assert numbers(data, 8, 4) == [24, 25, 26, 27]
    data.close()


def test_a_window_added_later_reaches_further_into_the_data() -> None:
    data = stream(0, 8)
    assert numbers(data, 4, 4) == [4, 5, 6, 7]
    data.leave_out((Window(4, 8),))
    assert numbers(data, 4, 4) == [8, 9, 10, 11]
    data.close()


def test_sources_are_counted_without_what_was_left_out() -> None:
    windows = (Window(3, 7), Window(10, 11))
    data = stream(1, 20, windows)
    for consumed, samples in ((0, 12), (1, 1), (2, 5), (7, 9)):
        left = [k for k in range(1, 60) if not any(window.start <= k < window.end for window in windows)]
        read = left[consumed : consumed + samples]
        assert data.source_counts(consumed, samples) == dict(Counter("b" if k % 3 == 2 else "a" for k in read))
    data.close()
