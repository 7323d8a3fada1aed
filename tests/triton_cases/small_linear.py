import torch
from triton_compile import Case

from layerskip_kernels.triton.linear_tile import MAX_TILES, tile_config
from layerskip_kernels.triton.small_linear import RUNTIME, small_linear_kernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = (
    *("x_ptr", "w0_ptr", "w1_ptr", "w2_ptr", "bias0_ptr", "bias1_ptr", "bias2_ptr"),
    *("residual_ptr", "out0_ptr", "out1_ptr", "out2_ptr"),
)
SHAPES = {  # weights of a launch, all their columns, C
    "q, k, v of 8B": (3, 6144, 4096),
    "gate, up of 8B": (2, 28672, 4096),
    "down of 1B": (1, 2048, 8192),
    "odd": (1, 769, 5125),
}


def case(kind: str, shape: str, tiles: int) -> Case:
    count, columns, width = SHAPES[shape]
    config = tile_config(columns, width, DTYPES[kind], 132, tiles)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    unit = 1 if shape == "odd" else 16 // DTYPES[kind].itemsize
    switches = dict(COUNT=count, BIASES=int(shape == "odd"), HAS_RESIDUAL=count == 1, TILES=tiles, UNIT=unit)
    return Case(
        name=f"{kind}, {shape}, {tiles} products",
        fn=small_linear_kernel,
        signature=dict.fromkeys(POINTERS, f"*{kind}") | dict.fromkeys(RUNTIME, "i32"),
        constexprs=dict(C=width, **switches, **config),
        divisible=POINTERS,
        mma=kind != "fp32",
        wide=shape != "odd",
        stack=8 if tiles == MAX_TILES else 0,  # Triton 3.6
        **options,
    )


CASES = [
    *(case("bf16", shape, tiles) for shape in SHAPES for tiles in ((1,) if shape == "odd" else (1, MAX_TILES))),
    case("fp16", "down of 1B", 1),
    case("fp32", "q, k, v of 8B", 1),
    case("fp32", "q, k, v of 8B", MAX_TILES),
    case("fp32", "odd", 1),
]
