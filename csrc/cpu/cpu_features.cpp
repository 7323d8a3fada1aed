#include "cpu/cpu_features.h"

#include <cstdint>
#include <initializer_list>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lk {
namespace {

#if defined(__x86_64__)
struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Cpuid(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

// The register state the operating system saves on a context switch (XCR0); without it the registers can't be used.
uint64_t saved_state() {
  if (!(Cpuid(1, 0).c >> 27 & 1)) return 0;  // OSXSAVE
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux lets a process use the tile registers, 8 KB a thread to save, once it has asked. Asked for again, it does no harm.
bool allowed_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#elif defined(__aarch64__) && defined(__linux__)
bool has_dot_products() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_int8_matrices() { return getauxval(AT_HWCAP2) >> 13 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#elif defined(__aarch64__) && defined(__APPLE__)
bool system_says(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot_products() { return system_says("hw.optional.arm.FEAT_DotProd"); }
bool has_int8_matrices() { return system_says("hw.optional.arm.FEAT_I8MM"); }
bool has_bf16() { return system_says("hw.optional.arm.FEAT_BF16"); }
#elif defined(__aarch64__)
bool has_dot_products() { return false; }
bool has_int8_matrices() { return false; }
bool has_bf16() { return false; }
#endif

struct Feature {
  const char* name;
  bool present;
};

[[maybe_unused]] std::string missing(std::initializer_list<Feature> features) {
  std::string names;
  for (const Feature& feature : features)
    if (!feature.present) names += (names.empty() ? "" : ", ") + std::string(feature.name);
  return names.empty() ? "" : "the processor or its operating system lacks " + names;
}

}  // namespace

std::vector<std::string> built_variants() {
  return {
      "scalar",
#if defined(LK_HAVE_AVX2)
      "avx2",
#endif
#if defined(LK_HAVE_AVX512)
      "avx512",
#endif
#if defined(LK_HAVE_AVX512_BF16)
      "avx512_bf16",
#endif
#if defined(LK_HAVE_AVX512_AMX)
      "avx512_amx",
#endif
#if defined(LK_HAVE_NEON)
      "neon",
#endif
#if defined(LK_HAVE_NEON_BF16)
      "neon_bf16",
#endif
  };
}

std::string why_variant_unsupported(const std::string& variant) {
#if defined(__x86_64__)
  const Cpuid one(1, 0), seven(7, 0), seven_one(7, 1);
  const uint64_t state = saved_state();
  const bool ymm = (state & 0x06) == 0x06, zmm = (state & 0xe6) == 0xe6;
  const Feature avx2[] = {{"AVX2", bool(seven.b >> 5 & 1)},
                          {"FMA", bool(one.c >> 12 & 1)},
                          {"F16C", bool(one.c >> 29 & 1)},
                          {"the saved YMM state", ymm}};
#if defined(LK_EMULATED)
  if (variant != "scalar") return missing({avx2[0], avx2[1], avx2[2], avx2[3]});
#endif
  const Feature avx512[] = {{"AVX512F", bool(seven.b >> 16 & 1)},
                            {"AVX512DQ", bool(seven.b >> 17 & 1)},
                            {"AVX512BW", bool(seven.b >> 30 & 1)},
                            {"AVX512VL", bool(seven.b >> 31 & 1)},
                            {"the saved ZMM state", zmm}};
  const bool amx = variant == "avx512_amx", bf16 = amx || variant == "avx512_bf16";
  const bool tiles = (state & 0x60000) == 0x60000 && (seven.d >> 22 & 13) == 13;
  if (variant == "avx2") return missing({avx2[0], avx2[1], avx2[2], avx2[3]});
  if (variant == "avx512" || bf16)
    return missing({avx2[0], avx2[1], avx2[2], avx2[3], avx512[0], avx512[1], avx512[2], avx512[3], avx512[4],
                    {"AVX512_BF16", !bf16 || bool(seven_one.a >> 5 & 1)},
                    {"AVX512_VNNI", !bf16 || bool(seven.c >> 11 & 1)},
                    {"AMX", !amx || (tiles && allowed_tiles())}});
#elif defined(__aarch64__)
  if (variant == "neon") return "";
  if (variant == "neon_bf16")
    return missing({{"DotProd", has_dot_products()}, {"I8MM", has_int8_matrices()}, {"BF16", has_bf16()}});
#endif
  return variant == "scalar" ? "" : "not built for this processor";
}

}  // namespace lk
