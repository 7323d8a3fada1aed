// A small thread pool. Workers spin briefly after a job, because the next op of a decode step comes microseconds later,
// then sleep.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace lk {

using TaskFunction = void (*)(void* context, int64_t task);

// Calls function(context, task) for every task in [0, num_tasks), on up to num_threads threads, the caller among them.
// Which thread runs a task is not defined, so tasks may not depend on it; most of the time the next task is the same
// thread's. Called from inside a task, or while another
// thread's call is running, it runs everything on the calling thread. Tasks throw nothing.
void parallel_for_raw(int num_threads, int64_t num_tasks, TaskFunction function, void* context);

// Same for a callable; the lambda's own type keeps the instance inside its variant's namespace.
template <class Function>
LK_INLINE void parallel_for(int num_threads, int64_t num_tasks, Function& function) {
  parallel_for_raw(
      num_threads, num_tasks, [](void* context, int64_t task) { (*static_cast<Function*>(context))(task); }, &function);
}

// Worker threads started so far.
int pool_size();

}  // namespace lk
