// lk::<op> calls the active variant's kernel.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/cpu_features.h"
#include "cpu/ops.h"

namespace lk {
namespace {

struct Variant {
  const char* name;
#define LK_MEMBER(op, Args) void (*op)(const Args&);
  LK_CPU_OPS(LK_MEMBER)
};

#define LK_SCALAR(op, Args) scalar::op,
#define LK_AVX2(op, Args) avx2::op,
#define LK_AVX512(op, Args) avx512::op,
#define LK_AVX512_BF16(op, Args) avx512_bf16::op,
#define LK_AVX512_AMX(op, Args) avx512_amx::op,
#define LK_NEON(op, Args) neon::op,
#define LK_NEON_BF16(op, Args) neon_bf16::op,

const Variant kVariants[] = {
    {"scalar", LK_CPU_OPS(LK_SCALAR)},
#if defined(LK_HAVE_AVX2)
    {"avx2", LK_CPU_OPS(LK_AVX2)},
#endif
#if defined(LK_HAVE_AVX512)
    {"avx512", LK_CPU_OPS(LK_AVX512)},
#endif
#if defined(LK_HAVE_AVX512_BF16)
    {"avx512_bf16", LK_CPU_OPS(LK_AVX512_BF16)},
#endif
#if defined(LK_HAVE_AVX512_AMX)
    {"avx512_amx", LK_CPU_OPS(LK_AVX512_AMX)},
#endif
#if defined(LK_HAVE_NEON)
    {"neon", LK_CPU_OPS(LK_NEON)},
#endif
#if defined(LK_HAVE_NEON_BF16)
    {"neon_bf16", LK_CPU_OPS(LK_NEON_BF16)},
#endif
};

const Variant& find(const std::string& name, const std::string& argument) {
  std::string choices;
  for (const Variant& variant : kVariants) {
    if (variant.name == name) {
      const std::string reason = why_variant_unsupported(name);
      if (!reason.empty()) throw std::invalid_argument(argument + "='" + name + "': " + reason);
      return variant;
    }
    choices += (choices.empty() ? "" : ", ") + std::string(variant.name);
  }
  throw std::invalid_argument(argument + "='" + name + "': choose one of " + choices);
}

const Variant& choose() {
  const char* named = std::getenv("LAYERSKIP_CPU_VARIANT");
  if (named && *named) return find(named, "LAYERSKIP_CPU_VARIANT");
  const Variant* best = &kVariants[0];
  for (const Variant& variant : kVariants)
    if (why_variant_unsupported(variant.name).empty()) best = &variant;
  return *best;
}

std::atomic<const Variant*> g_active{nullptr};

const Variant& active() {
  const Variant* variant = g_active.load(std::memory_order_acquire);
  if (!variant) {
    variant = &choose();
    g_active.store(variant, std::memory_order_release);
  }
  return *variant;
}

}  // namespace

std::string active_variant() { return active().name; }

void set_variant(const std::string& variant) { g_active.store(&find(variant, "variant"), std::memory_order_release); }

#define LK_CALL(op, Args) \
  void op(const Args& args) { active().op(args); }
LK_CPU_OPS(LK_CALL)

}  // namespace lk
