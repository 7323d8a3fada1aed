from triton_compile import Case

from layerskip_kernels.triton.verify_rejection import CHUNK, WARPS, decide_kernel, weigh_kernel

KINDS = {
    "*fp32": ("q_ptr", "p_ptr", "u_ptr"),
    "*i64": ("draft_ptr", "eos_ptr", "tokens_out_ptr"),
    "*i32": ("num_draft_ptr", "remaining_ptr", "emitted_out_ptr", "accepted_out_ptr"),
    "*i1": ("finished_ptr", "finished_out_ptr"),
    "*fp64": ("sums_ptr",),
}


def case(fn, block, vocab, drafts):
    signature = {n: kind for kind, names in KINDS.items() for n in names if n in fn.arg_names}
    numbers = [n for n in fn.arg_names if n.startswith("stride") or n in ("vocab", "num_eos")]
    chunks = -(-vocab // CHUNK)
    constexprs = dict(
        BLOCK_METHOD=block,
        CHUNK=CHUNK,
        NUM_CHUNKS=chunks,
        BLOCK_CHUNKS=1 << (chunks - 1).bit_length(),
        WIDTH=drafts + 1,
        BLOCK_WIDTH=1 << drafts.bit_length(),
    )
    return Case(
        name=f"{fn.__name__} {'block' if block else 'standard'} V={vocab} K={drafts}",
        fn=fn,
        signature=signature | dict.fromkeys(numbers, "i32"),
        constexprs={n: v for n, v in constexprs.items() if n in fn.arg_names},
        divisible=tuple(signature),
        num_warps=WARPS,
    )


CASES = [case(fn, block, 128256, 6) for fn in (weigh_kernel, decide_kernel) for block in (False, True)]
