// What the checks (attention.cpp) hand to the kernels (attention_cpu.cpp): plain pointers and numbers.
#pragma once

#include "philox.h"

namespace encdiff {

// (batch, rows, heads x width), the last axis contiguous; strides in elements.
struct Rows {
  void* data;
  int64_t batch_stride, row_stride;
};

// out = softmax(q k^T / sqrt(width)) v in each head, or its gradient.
struct Attention {
  bool is_bfloat16;  // else float32; arithmetic is float32
  int64_t batch, heads, queries, keys, width;
  Rows q, k, v, out;
  float* stats;  // (batch, heads, 2, queries): the largest logit, in units of log 2, and 1 / sum exp(logit - largest)
  Rows grad_out, grad_q, grad_k, grad_v;  // backward only
};

constexpr int64_t kMaxWidth = 64;  // the side of a product that is spread over lanes lies on the stack

// The other side is copied to float32 rows, their width filled up to a multiple of 4.
ENCDIFF_FN int64_t padded(int64_t width) { return (width + 3) / 4 * 4; }
ENCDIFF_FN int64_t forward_scratch(const Attention& a) { return (2 * a.keys + a.queries) * padded(a.width); }
ENCDIFF_FN int64_t backward_scratch(const Attention& a) {
  return 2 * (a.keys + a.queries) * padded(a.width) + a.queries;
}

// Over [begin, end) of the batch x heads, with a scratch of as many floats for each call.
struct AttentionKernels {
  void (*forward)(const Attention&, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const Attention&, int64_t begin, int64_t end, float* scratch);
};
namespace baseline {
extern const AttentionKernels attention;
}
namespace avx2 {
extern const AttentionKernels attention;
}
namespace avx512 {
extern const AttentionKernels attention;
}

}  // namespace encdiff
