// layerskip_kernels.native._cuda: what a round of decoding does between its ops.
#include "cuda_bindings.h"

namespace {

Error embed(Address tokens, int64_t tokens_stride, Address table, int64_t table_stride, Address out, int64_t out_stride,
            int64_t n, int64_t c, int dtype, Address stream) {
  py::gil_scoped_release release;
  return error_text(lk::cuda::embed({pointer<int64_t>(tokens), tokens_stride, pointer(table), table_stride, pointer(out),
                                     out_stride, n, c, lk::DType(dtype)},
                                    stream_of(stream)));
}

// repeated: from, to, itemsize of each field.
Error begin_round(Address pending, Address lengths, Address remaining, Address tokens, Address positions,
                  Address step_lengths, Address num_draft, Address next_positions, const std::vector<Ints<3>>& repeated,
                  int64_t b, int64_t t, Address stream) {
  lk::cuda::BeginRoundArgs args{pointer<int64_t>(pending),
                                pointer<int32_t>(lengths),
                                pointer<int32_t>(remaining),
                                pointer<int64_t>(tokens),
                                pointer<int32_t>(positions),
                                pointer<int32_t>(step_lengths),
                                pointer<int32_t>(num_draft),
                                pointer<int64_t>(next_positions),
                                {},
                                int(repeated.size()),
                                b,
                                t};
  if (repeated.size() > lk::cuda::kMaxRepeated) throw py::value_error("too many fields to repeat");
  for (size_t i = 0; i < repeated.size(); ++i)
    args.repeated[i] = {pointer(repeated[i][0]), pointer(repeated[i][1]), repeated[i][2]};
  py::gil_scoped_release release;
  return error_text(lk::cuda::begin_round(args, stream_of(stream)));
}

Error end_round(Address emitted, Address num_emitted, Address remaining, Address pending, int64_t b, int64_t t,
                Address stream) {
  py::gil_scoped_release release;
  return error_text(lk::cuda::end_round({pointer<int64_t>(emitted), pointer<int32_t>(num_emitted),
                                         pointer<int32_t>(remaining), pointer<int64_t>(pending), b, t},
                                        stream_of(stream)));
}

}  // namespace

void bind_round(py::module_& module) {
  module.def("embed", &embed);
  module.def("begin_round", &begin_round);
  module.def("end_round", &end_round);
}
