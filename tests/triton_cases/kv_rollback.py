from triton_compile import Case

from layerskip_kernels.triton.kv_rollback import _VARYING, kv_rollback_kernel


def case(kind, window, dim, *, path=True, scrub=False, aligned=True):
    block_window = 1 << (window - 1).bit_length()
    absent = dict(slot_ids_ptr=None) | ({} if path else dict(path_ptr=None))
    indices = ("lengths_ptr", "keep_ptr", "path_ptr")
    return Case(
        name=f"{kind} T={window} D={dim}{' path' * path}{' scrub' * scrub}{'' if aligned else ' unaligned'}",
        fn=kv_rollback_kernel,
        signature=dict(k_ptr=f"*{kind}", v_ptr=f"*{kind}")
        | dict.fromkeys((n for n in indices if n not in absent), "*i32")
        | dict.fromkeys(_VARYING, "i32"),
        constexprs=dict(
            WINDOW=window,
            DIM=dim,
            SCRUB=scrub,
            ALIGNED=aligned,
            BLOCK_WINDOW=block_window,
            BLOCK_DIM=min(1 << (dim - 1).bit_length(), max(16, 4096 // block_window)),
        )
        | absent,
        divisible=("k_ptr", "v_ptr") if aligned else (),
        wide=path and aligned and window * dim >= 1024,
    )


CASES = [
    case("bf16", 16, 128),
    case("bf16", 64, 128, scrub=True),
    case("fp32", 64, 256, scrub=True),
    case("fp16", 5, 80, path=False, scrub=True),
    case("bf16", 9, 96, aligned=False),
]
