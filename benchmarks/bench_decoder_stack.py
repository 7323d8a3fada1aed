import pytest
import torch
from conftest import assert_close, rotated

from layerskip_kernels import reference
from layerskip_kernels.ops import DecoderLayers, LayerWeights, decoder_stack

HEADS, GROUPS, DIM, WIDTH, MLP = 32, 8, 64, 2048, 8192  # one layer of Llama-3.2-1B


def layer(dtype: torch.dtype) -> LayerWeights:
    def weight(n, c):
        return torch.randn(n, c, dtype=dtype) / c**0.5

    kv = GROUPS * DIM
    return LayerWeights(
        attn_norm=torch.ones(WIDTH, dtype=dtype),
        q=weight(HEADS * DIM, WIDTH),
        k=weight(kv, WIDTH),
        v=weight(kv, WIDTH),
        o=weight(WIDTH, HEADS * DIM),
        mlp_norm=torch.ones(WIDTH, dtype=dtype),
        gate=weight(MLP, WIDTH),
        up=weight(MLP, WIDTH),
        down=weight(WIDTH, MLP),
    )


@pytest.mark.parametrize("window", [1, 5, 7])
def bench_decoder_stack(row, backend, window):
    dtype, context, capacity = torch.bfloat16, 128, 256
    size = sum(t.numel() for t in layer(dtype)[:9]) * dtype.itemsize
    layers = rotated(lambda: DecoderLayers([layer(dtype)]), size)
    k, v = (torch.randn(1, 1, GROUPS, capacity, DIM).to(dtype) for _ in "kv")
    hidden = torch.randn(1, window, WIDTH, dtype=dtype)
    lengths = torch.tensor([context], dtype=torch.int32)
    arguments = dict(
        eps=1e-5,
        scale=DIM**-0.5,
        lengths=lengths,
        positions=lengths[:, None] + torch.arange(window, dtype=torch.int32),
        inv_freq=500000.0 ** -(torch.arange(0, DIM, 2) / DIM),
    )
    expected, actual = hidden.clone(), hidden.clone()
    reference.OPS["decoder_stack"](expected, layers[0], k, v, **arguments)
    decoder_stack(actual, layers[0], k, v, **arguments)
    assert_close(actual, expected, dtype)
    work = hidden.clone()

    def call(one: DecoderLayers):
        work.copy_(hidden)
        decoder_stack(work, one, k, v, **arguments)

    row([lambda one=one: call(one) for one in layers], size)
