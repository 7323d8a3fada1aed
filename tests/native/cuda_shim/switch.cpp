// lk_shim_switch(save, load): leaves the registers a call must keep on this stack, its address in *save, and goes on from
// the stack `load` that was left the same way.
#if defined(__x86_64__) && !defined(LK_SHIM_THREADS)
asm(R"(
.text
.globl lk_shim_switch
.type lk_shim_switch, @function
lk_shim_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.section .note.GNU-stack,"",@progbits
)");
#endif
