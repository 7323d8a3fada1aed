from triton_compile import Case

from layerskip_kernels.triton.rope_append import _VARYING, rope_append_kernel

CACHES = ("q_ptr", "k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr")
INDICES = ("lengths_ptr", "positions_ptr", "slot_ids_ptr", "num_queries_ptr")


def case(kind, dim, *, ragged=True, aligned=True):
    block_half = 1 << (dim // 2 - 1).bit_length()
    absent = {} if ragged else dict(slot_ids_ptr=None, num_queries_ptr=None)
    return Case(
        name=f"{kind} D={dim}{'' if ragged else ' whole'}{'' if aligned else ' unaligned'}",
        fn=rope_append_kernel,
        signature=dict.fromkeys(CACHES, f"*{kind}")
        | dict(inv_freq_ptr="*fp32", attention_factor="fp32")
        | {n: "*i32" if n in INDICES else "i32" for n in _VARYING if n not in absent},
        constexprs=dict(HALF=dim // 2, ALIGNED=aligned, BLOCK_HEADS=512 // block_half, BLOCK_HALF=block_half) | absent,
        divisible=(*CACHES, "inv_freq_ptr") if aligned else (),
        num_warps=2,
        wide=aligned and dim >= 16,
    )


CASES = [
    case("bf16", 64),
    case("bf16", 128, ragged=False),
    case("fp16", 128),
    case("fp32", 80),
    case("bf16", 256),
    case("bf16", 96, aligned=False),
]
