// Runs every CPU op in every variant of this machine: with several thread counts, from several callers at once, and in
// the child of a fork. Built with sanitizers by tests/test_sanitizers.py. Exit status 1 when a row depends on its batch.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "check.h"
#include "cpu/cpu_features.h"

namespace {

void check_every_op(int num_threads) {
#define LK_RUN_CHECK(op, Args) check_##op(num_threads);
  LK_CPU_OPS(LK_RUN_CHECK)
}

void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    check_every_op(2);
    _exit(g_failures ? 1 : 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of a fork");
}

}  // namespace

int main() {
  for (const std::string& variant : lk::built_variants()) {
    const std::string reason = lk::why_variant_unsupported(variant);
    std::printf("%s: %s\n", variant.c_str(), reason.empty() ? "running" : reason.c_str());
    std::fflush(stdout);
    if (!reason.empty()) continue;
    lk::set_variant(variant);
    for (int num_threads : {1, 4, 2}) check_every_op(num_threads);
  }
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) callers.emplace_back([i] { check_every_op(i + 1); });
  for (std::thread& caller : callers) caller.join();
  check_fork();
  std::printf("%d failures\n", g_failures.load());
  return g_failures ? 1 : 0;
}
