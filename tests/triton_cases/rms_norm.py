from triton_compile import Case

from layerskip_kernels.triton.rms_norm import rms_norm_kernel, whole_block
from layerskip_kernels.triton.sums import norm_block


def case(kind, columns, *, residual=False, aligned=True):
    pointers = ("x_ptr", "weight_ptr", "out_ptr", *(("residual_ptr",) if residual else ()))
    return Case(
        name=f"{kind} C={columns}{' residual' * residual}{'' if aligned else ' unaligned'}",
        fn=rms_norm_kernel,
        signature=dict.fromkeys(pointers, f"*{kind}")
        | dict(stride_x="i32", stride_residual="i32", stride_out="i32", eps="fp32"),
        constexprs=dict(
            COLUMNS=columns,
            HAS_RESIDUAL=residual,
            ALIGNED=aligned,
            BLOCK=norm_block(columns),
            WHOLE=whole_block(columns),
        )
        | ({} if residual else dict(residual_ptr=None)),
        divisible=pointers if aligned else (),
        num_warps=max(1, norm_block(columns) // 256),
        wide=aligned and columns >= 1024,
        without=r"div\.(approx|full)\S*",
    )


CASES = [
    case("bf16", 4096),
    case("fp16", 2048, residual=True),
    case("fp32", 8192, residual=True),
    case("bf16", 128),  # per head
    case("bf16", 5125, aligned=False),
]
