// Which variants this processor and its operating system can run.
#pragma once

#include <string>
#include <vector>

namespace lk {

// Names of the variants compiled in, slowest first.
std::vector<std::string> built_variants();

// Empty when `variant` (a built one) runs here, else what is missing.
std::string why_variant_unsupported(const std::string& variant);

// The active variant: LAYERSKIP_CPU_VARIANT, else the fastest that runs here.
// Throws std::invalid_argument when the variable names an unknown or unsupported variant.
std::string active_variant();

// Changes the active variant, for tests. Throws std::invalid_argument. Not while an op runs.
void set_variant(const std::string& variant);

}  // namespace lk
