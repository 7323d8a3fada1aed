from triton_compile import Case

from layerskip_kernels.triton.verify_tokens import verify_tokens_kernel

SIGNATURE = (
    dict.fromkeys(("draft_ptr", "target_ptr", "eos_ptr", "tokens_out_ptr"), "*i64")
    | dict.fromkeys(("num_draft_ptr", "remaining_ptr", "emitted_out_ptr", "accepted_out_ptr"), "*i32")
    | dict.fromkeys(("finished_ptr", "finished_out_ptr"), "*i1")
    | dict.fromkeys(("batch", "num_eos", "stride_draft", "stride_target", "stride_out"), "i32")
)

CASES = [
    Case(
        name=f"K={width - 1}",
        fn=verify_tokens_kernel,
        signature=SIGNATURE,
        constexprs=dict(WIDTH=width, BLOCK_ROWS=256 // block_width, BLOCK_WIDTH=block_width),
        divisible=tuple(n for n, kind in SIGNATURE.items() if kind.startswith("*")),
        num_warps=1,
    )
    for width, block_width in ((1, 1), (7, 8), (64, 64))
]
