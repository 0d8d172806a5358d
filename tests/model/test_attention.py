"""Which attention kernels torch is asked for."""

from torch.nn.attention import SDPBackend

from ouro_megatron.model.attention import kernel_order


def test_cudnn_comes_first_where_its_blocks_are_full() -> None:
    assert kernel_order(4096)[0] == kernel_order(64)[0] == SDPBackend.CUDNN_ATTENTION
    for length in (1, 32, 96, 4095):
        assert SDPBackend.CUDNN_ATTENTION not in kernel_order(length) and len(kernel_order(length)) == 3
