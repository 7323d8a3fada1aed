#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

namespace lk {
namespace {

struct Buffer {
  void* data = nullptr;
  size_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer t_buffers[int(Workspace::count)];

}  // namespace

void* workspace(Workspace use, size_t bytes) {
  Buffer& buffer = t_buffers[int(use)];
  if (buffer.size < bytes) {
    const size_t size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(4096, size);
    if (!data) throw std::bad_alloc();
    std::free(buffer.data);
    buffer.data = data;
    buffer.size = size;
  }
  return buffer.data;
}

size_t workspace_bytes() {
  size_t total = 0;
  for (const Buffer& buffer : t_buffers) total += buffer.size;
  return total;
}

}  // namespace lk
