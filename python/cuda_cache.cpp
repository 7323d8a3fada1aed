// Bindings of the ops on the key/value cache. Strides come as tuples, as tensor.stride() gives them.
#include "cuda_bindings.h"

namespace {

// sizes: b, t, h, g, d.
Error rope_append(Address q, const Ints<4>& q_stride, Address k, const Ints<4>& k_stride, Address v,
                  const Ints<4>& v_stride, Address k_cache, const Ints<4>& k_cache_stride, Address v_cache,
                  const Ints<4>& v_cache_stride, Address lengths, Address positions, int64_t positions_stride,
                  Address inv_freq, const Ints<2>& inv_freq_stride, float attention_factor, Address slot_ids,
                  Address num_queries, const Ints<5>& sizes, int dtype, Address stream) {
  lk::cuda::RopeAppendArgs args{};
  args.q = pointer(q);
  copy_outer(q_stride, args.q_stride);
  args.k = pointer(k);
  copy_outer(k_stride, args.k_stride);
  args.v = pointer(v);
  copy_outer(v_stride, args.v_stride);
  args.k_cache = pointer(k_cache);
  copy_outer(k_cache_stride, args.k_cache_stride);
  args.v_cache = pointer(v_cache);
  copy_outer(v_cache_stride, args.v_cache_stride);
  args.lengths = pointer<int32_t>(lengths);
  args.positions = pointer<int32_t>(positions);
  args.positions_stride = positions_stride;
  args.inv_freq = pointer<float>(inv_freq);
  args.inv_freq_stride[0] = inv_freq_stride[0];
  args.inv_freq_stride[1] = inv_freq_stride[1];
  args.attention_factor = attention_factor;
  args.slot_ids = pointer<int32_t>(slot_ids);
  args.num_queries = pointer<int32_t>(num_queries);
  args.b = sizes[0], args.t = sizes[1], args.h = sizes[2], args.g = sizes[3], args.d = sizes[4];
  args.dtype = lk::DType(dtype);
  py::gil_scoped_release release;
  return error_text(lk::cuda::rope_append(args, stream_of(stream)));
}

// sizes: layers, b, g, d.
Error kv_rollback(Address k_cache, const Ints<5>& k_cache_stride, Address v_cache, const Ints<5>& v_cache_stride,
                  Address lengths, Address keep, Address slot_ids, Address path, int64_t path_stride, int64_t window,
                  bool scrub, const Ints<4>& sizes, int dtype, Address stream) {
  lk::cuda::KvRollbackArgs args{};
  args.k_cache = pointer(k_cache);
  copy_outer(k_cache_stride, args.k_cache_stride);
  args.v_cache = pointer(v_cache);
  copy_outer(v_cache_stride, args.v_cache_stride);
  args.lengths = pointer<int32_t>(lengths);
  args.keep = pointer<int32_t>(keep);
  args.slot_ids = pointer<int32_t>(slot_ids);
  args.path = pointer<int32_t>(path);
  args.path_stride = path_stride;
  args.window = window;
  args.scrub = scrub;
  args.layers = sizes[0], args.b = sizes[1], args.g = sizes[2], args.d = sizes[3];
  args.dtype = lk::DType(dtype);
  py::gil_scoped_release release;
  return error_text(lk::cuda::kv_rollback(args, stream_of(stream)));
}

// sizes: b, t, h, g, d, capacity.
Error verify_attention(Address q, const Ints<4>& q_stride, Address k_cache, const Ints<4>& k_cache_stride,
                       Address v_cache, const Ints<4>& v_cache_stride, Address out, const Ints<4>& out_stride,
                       Address lengths, Address slot_ids, Address num_queries, Address tree_mask,
                       int64_t tree_mask_stride, int64_t sliding_window, float scale, const Ints<6>& sizes, int dtype,
                       Address scratch, Address stream) {
  lk::cuda::VerifyAttentionArgs args{};
  args.q = pointer(q);
  copy_outer(q_stride, args.q_stride);
  args.k_cache = pointer(k_cache);
  copy_outer(k_cache_stride, args.k_cache_stride);
  args.v_cache = pointer(v_cache);
  copy_outer(v_cache_stride, args.v_cache_stride);
  args.out = pointer(out);
  copy_outer(out_stride, args.out_stride);
  args.lengths = pointer<int32_t>(lengths);
  args.slot_ids = pointer<int32_t>(slot_ids);
  args.num_queries = pointer<int32_t>(num_queries);
  args.tree_mask = pointer<bool>(tree_mask);
  args.tree_mask_stride = tree_mask_stride;
  args.sliding_window = sliding_window;
  args.scale = scale;
  args.b = sizes[0], args.t = sizes[1], args.h = sizes[2], args.g = sizes[3], args.d = sizes[4];
  args.capacity = sizes[5];
  args.dtype = lk::DType(dtype);
  args.scratch = pointer<float>(scratch);
  py::gil_scoped_release release;
  return error_text(lk::cuda::verify_attention(args, stream_of(stream)));
}

int64_t verify_attention_scratch(const Ints<6>& sizes) {
  return lk::cuda::verify_attention_scratch(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]);
}

}  // namespace

void bind_cache(py::module_& module) {
  module.def("rope_append", &rope_append);
  module.def("kv_rollback", &kv_rollback);
  module.def("verify_attention", &verify_attention);
  module.def("verify_attention_scratch", &verify_attention_scratch);
  module.attr("ROLLBACK_MAX_WINDOW") = lk::cuda::kRollbackMaxWindow;
}
