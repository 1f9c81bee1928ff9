// Checks and registration of the CPU's attention, on PyTorch's stable ABI; see noise.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <tuple>

#include "attention.h"
#include "isa.h"

namespace encdiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor's rows, if it is (batch, rows, columns) of the first one's dtype.
Rows rows_of(const char* name, const Tensor& x, int64_t batch, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == batch && x.size(1) == rows && x.size(2) == columns, name, " must be (",
                  batch, ", ", rows, ", ", columns, ")");
  STD_TORCH_CHECK(x.scalar_type() == dtype && !x.is_cuda() && x.stride(2) == 1, name,
                  " must be of q's dtype, on the CPU, and contiguous in its last axis");
  return {x.data_ptr(), x.stride(0), x.stride(1)};
}

Attention attention_of(const Tensor& q, const Tensor& k, const Tensor& v, int64_t heads) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, "q must be float32 or bfloat16");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && heads > 0 && q.size(2) % heads == 0,
                  "q and k must be (batch, rows, heads x width)");
  Attention a{};
  a.is_bfloat16 = dtype == ScalarType::BFloat16;
  a.batch = q.size(0), a.heads = heads, a.queries = q.size(1), a.keys = k.size(1), a.width = q.size(2) / heads;
  STD_TORCH_CHECK(a.width <= kMaxWidth, "a head is ", a.width, " wide, at most ", kMaxWidth);
  a.q = rows_of("q", q, a.batch, a.queries, q.size(2), dtype);
  a.k = rows_of("k", k, a.batch, a.keys, q.size(2), dtype);
  a.v = rows_of("v", v, a.batch, a.keys, q.size(2), dtype);
  return a;
}

// Without fma, as in the baseline, the last bits differ.
const AttentionKernels& cpu() { return ENCDIFF_WIDEST(attention); }

using Kernel = void (*)(const Attention&, int64_t, int64_t, float*);

// A thread takes whole heads, at least so many that they have 2^14 pairs of a query and a key.
void run(Kernel kernel, const Attention& a, int64_t scratch) {
  const int64_t grain = (1 << 14) / (a.queries * a.keys + 1) + 1;
  torch::stable::parallel_for(0, a.batch * a.heads, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> memory(new float[scratch]);
    kernel(a, begin, end, memory.get());
  });
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, int64_t heads) {
  Attention a = attention_of(q, k, v, heads);
  Tensor out = torch::stable::new_empty(q, {a.batch, a.queries, q.size(2)});
  Tensor stats = torch::stable::new_empty(q, {a.batch, heads, 2, a.queries}, ScalarType::Float);
  a.out = rows_of("out", out, a.batch, a.queries, q.size(2), q.scalar_type());
  a.stats = static_cast<float*>(stats.data_ptr());
  run(cpu().forward, a, forward_scratch(a));
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
                                                      Tensor stats, int64_t heads) {
  Attention a = attention_of(q, k, v, heads);
  const ScalarType dtype = q.scalar_type();
  const int64_t inner = q.size(2);
  a.grad_out = rows_of("grad_out", grad_out, a.batch, a.queries, inner, dtype);
  a.out = rows_of("out", out, a.batch, a.queries, inner, dtype);
  STD_TORCH_CHECK(stats.scalar_type() == ScalarType::Float && stats.is_contiguous() && !stats.is_cuda() &&
                      stats.numel() == 2 * a.batch * heads * a.queries,
                  "stats must be those of attention");
  a.stats = static_cast<float*>(stats.data_ptr());
  Tensor grad_q = torch::stable::new_empty(q, {a.batch, a.queries, inner});
  Tensor grad_k = torch::stable::new_empty(q, {a.batch, a.keys, inner});
  Tensor grad_v = torch::stable::new_empty(q, {a.batch, a.keys, inner});
  a.grad_q = rows_of("grad_q", grad_q, a.batch, a.queries, inner, dtype);
  a.grad_k = rows_of("grad_k", grad_k, a.batch, a.keys, inner, dtype);
  a.grad_v = rows_of("grad_v", grad_v, a.batch, a.keys, inner, dtype);
  run(cpu().backward, a, backward_scratch(a));
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace encdiff

STABLE_TORCH_LIBRARY_FRAGMENT(encdiff_native, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, int heads) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, int heads) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(encdiff_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&encdiff::attention));
  m.impl("attention_backward", TORCH_BOX(&encdiff::attention_backward));
}
