from triton_compile import Case

from layerskip_kernels.triton.swiglu import BLOCK, swiglu_kernel

CASES = [
    Case(
        name=kind,
        fn=swiglu_kernel,
        signature=dict(gate_ptr=f"*{kind}", up_ptr=f"*{kind}", out_ptr=f"*{kind}")
        | dict.fromkeys(("stride_gate", "stride_up", "stride_out", "columns"), "i32"),
        constexprs=dict(ALIGNED=True, BLOCK=BLOCK),
        divisible=("gate_ptr", "up_ptr", "out_ptr", "columns"),
        wide=True,
    )
    for kind in ("bf16", "fp16", "fp32")
]
