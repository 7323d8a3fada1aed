// Every op is compiled once per instruction set, each time into its own namespace lk::<variant>.
// The build defines LK_VARIANT (the namespace) and one LK_VARIANT_<NAME>; without them this is the scalar variant.
#pragma once

#ifndef LK_VARIANT
#define LK_VARIANT scalar
#define LK_VARIANT_SCALAR 1
#endif

#if defined(LK_VARIANT_AVX512_AMX)
#define LK_VARIANT_AVX512_BF16 1
#endif
#if defined(LK_VARIANT_AVX512_BF16)
#define LK_VARIANT_AVX512 1
#endif
#if defined(LK_VARIANT_NEON_BF16)
#define LK_VARIANT_NEON 1
#endif
