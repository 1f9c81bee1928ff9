// Checks and registration, on PyTorch's stable ABI: one build serves every torch from 2.11 on.
//
// The Python side (encdiff/ops) has told the user what is wrong with an input; what is checked here is what memory
// safety needs, for those who call torch.ops.encdiff_native themselves.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <type_traits>

#include "isa.h"
#include "noise.h"

#ifdef ENCDIFF_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default"), used))
#ifdef ENCDIFF_WITH_CUDA
EXPORT const int encdiff_has_cuda = 1;
#endif

namespace encdiff {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: STD_TORCH_CHECK(false, "a tensor must be float32, bfloat16 or float16");
  }
}

bool same_place(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// The data of a tensor that lies beside `like`, or null for none.
void* data_like(const char* name, const MaybeTensor& x, const Tensor& like) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->is_contiguous() && same_place(*x, like), name, " must be contiguous and on the first tensor's device");
  STD_TORCH_CHECK(x->scalar_type() == like.scalar_type() && x->numel() == like.numel(), name, " has ", x->numel(),
                  " elements, must have the first tensor's dtype and ", like.numel(), " elements");
  return x->data_ptr();
}

template <class T>
const T* longs(const char* name, const Tensor& x, int64_t numel, const Tensor& like) {
  STD_TORCH_CHECK(x.is_contiguous() && same_place(x, like) && x.scalar_type() == ScalarType::Long && x.numel() == numel,
                  name, " must be ", numel, " contiguous int64 on the first tensor's device");
  return static_cast<const T*>(x.data_ptr());
}

Table table_of(const char* name, const Tensor& x, const Tensor& like) {
  const bool is_double = x.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK((is_double || x.scalar_type() == ScalarType::Float) && x.is_contiguous() && same_place(x, like) &&
                      (x.dim() == 1 || x.dim() == 2),
                  name, " must be a contiguous table, float32 or float64, on the first tensor's device");
  return {x.data_ptr(), is_double, x.size(0), x.dim() == 2 ? x.size(1) : 1};
}

// One row per sample, or one for all.
Table coefficients_of(const Tensor& x, int64_t columns, const Tensor& like) {
  const Table table = table_of("coefficients", x, like);
  STD_TORCH_CHECK((table.rows == like.size(0) || table.rows == 1) && table.columns >= columns, "coefficients must be (",
                  like.size(0), ", ", columns, ") or (1, ", columns, ")");
  return table;
}

Key key_of(const MaybeTensor& ids, const MaybeTensor& draw_tensor, int64_t draw, int64_t seed, int64_t stream,
           const Tensor& like) {
  const int64_t batch = like.size(0);
  return {ids ? longs<int64_t>("sample_ids", *ids, batch, like) : nullptr,
          draw_tensor ? longs<int64_t>("draw", *draw_tensor, 1, like) : nullptr, draw, seed, stream};
}

void set_shape(const char* name, const Tensor& x, int64_t& batch, int64_t& size) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.is_contiguous(), name, " must be contiguous with a batch axis");
  batch = x.size(0);
  size = batch ? x.numel() / batch : 0;
}

// All instruction sets give the same bits.
const CpuKernels& cpu() { return ENCDIFF_WIDEST(kernels); }

// A thread takes whole tiles, at least 16 (4096 elements), so small tensors stay on one thread.
template <class Args>
void run_cpu(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  const int64_t tiles = tiles_per_sample(args.size);
  const bool by_sample = std::is_same_v<Args, Threshold>;
  const int64_t count = by_sample ? args.batch : args.batch * tiles, grain = by_sample ? (15 + tiles) / tiles : 16;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, const Tensor& like) {
  if (!like.is_cuda()) return run_cpu(kernel, args);
#ifdef ENCDIFF_WITH_CUDA
  // Looked up here, not linked: the same build loads beside a torch without CUDA.
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const auto current_stream = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(current_stream, "this torch has no CUDA streams");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream(like.get_device_index(), &stream));
  if (args.batch * args.size) launch(args, like.get_device_index(), stream);
#else
  STD_TORCH_CHECK(false, "built without CUDA");
#endif
}

void check_timesteps(const QSample& q) {
  for (int64_t b = 0; b < q.batch; ++b) {
    const int64_t t = timestep(q, b);
    STD_TORCH_CHECK(t >= 0 && t < q.schedule.rows, "t is ", t, ", must lie in 0 to ", q.schedule.rows - 1);
  }
}

void q_sample_out(Tensor x0, MaybeTensor noise, Tensor t, Tensor schedule, MaybeTensor loss_weights, int64_t kind,
                  MaybeTensor sample_ids, MaybeTensor draw_tensor, int64_t draw, int64_t seed, Tensor x_t,
                  MaybeTensor target, MaybeTensor weight) {
  QSample q{};
  q.dtype = dtype_of(x0);
  set_shape("x0", x0, q.batch, q.size);
  q.x0 = x0.data_ptr();
  q.noise = data_like("noise", noise, x0);
  q.t_is_int64 = t.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK((q.t_is_int64 || t.scalar_type() == ScalarType::Int) && t.is_contiguous() && same_place(t, x0) &&
                      t.numel() == q.batch,
                  "t must be ", q.batch, " contiguous int32 or int64 on x0's device");
  q.t = t.data_ptr();
  q.schedule = table_of("schedule", schedule, x0);
  STD_TORCH_CHECK(q.schedule.columns <= 2 && kind >= kNone && kind <= kFlow, "schedule must have 1 or 2 columns");
  q.kind = static_cast<Target>(kind);
  q.x_t = data_like("x_t", x_t, x0);
  q.target = data_like("target", target, x0);
  STD_TORCH_CHECK(q.kind == kNone || q.target, "target must be given");
  if (loss_weights) {
    q.loss_weights = table_of("loss_weights", *loss_weights, x0);
    STD_TORCH_CHECK(q.loss_weights.rows == q.schedule.rows && q.loss_weights.columns == 1 && weight &&
                        weight->scalar_type() == ScalarType::Float && weight->numel() == q.batch &&
                        weight->is_contiguous() && same_place(*weight, x0),
                    "loss_weights has ", q.loss_weights.rows, " rows, must have the schedule's ", q.schedule.rows);
    q.weight = static_cast<float*>(weight->data_ptr());
  }
  q.key = key_of(sample_ids, draw_tensor, draw, seed, 0, x0);
  STD_TORCH_CHECK(q.noise || q.key.sample_ids, "noise or sample_ids must be given");
  if (!x0.is_cuda()) check_timesteps(q);
  run(cpu().q_sample, q, x0);
}

// Outputs that were not asked for are empty: a schema cannot return an optional tensor to torch.compile.
std::tuple<Tensor, Tensor, Tensor> q_sample(Tensor x0, MaybeTensor noise, Tensor t, Tensor schedule,
                                            MaybeTensor loss_weights, int64_t kind, MaybeTensor sample_ids,
                                            MaybeTensor draw_tensor, int64_t draw, int64_t seed) {
  Tensor x_t = torch::stable::empty_like(x0);
  Tensor target = kind == kNone ? torch::stable::new_empty(x0, {0}) : torch::stable::empty_like(x0);
  Tensor weight = torch::stable::new_empty(x0, {loss_weights ? x0.size(0) : 0}, ScalarType::Float);
  q_sample_out(x0, noise, t, schedule, loss_weights, kind, sample_ids, draw_tensor, draw, seed, x_t,
               kind == kNone ? MaybeTensor() : target, loss_weights ? weight : MaybeTensor());
  return {x_t, target, weight};
}

Tensor threshold(Tensor x, Tensor output, MaybeTensor unconditional, Tensor coefficients, double clip, double guidance,
                 double quantile) {
  Threshold s{};
  s.dtype = dtype_of(x);
  set_shape("x_t", x, s.batch, s.size);
  STD_TORCH_CHECK(s.size > 0 && quantile >= 0 && quantile <= 1, "quantile is ", quantile, " of ", s.size,
                  " elements, must lie in 0 to 1, of at least one");
  s.x = x.data_ptr();
  s.output = data_like("model_output", output, x);
  s.unconditional = data_like("unconditional", unconditional, x);
  s.coefficients = coefficients_of(coefficients, 2, x);
  s.clip = static_cast<float>(clip);
  s.guidance = static_cast<float>(guidance);
  const double position = quantile * static_cast<double>(s.size - 1);
  s.rank = static_cast<int64_t>(position);
  s.weight = static_cast<float>(position - static_cast<double>(s.rank));
  Tensor limits = torch::stable::new_empty(x, {s.batch}, ScalarType::Float);
  s.limits = static_cast<float*>(limits.data_ptr());
  run(cpu().threshold, s, x);
  return limits;
}

void step_out(Tensor x, Tensor output, MaybeTensor unconditional, Tensor coefficients, MaybeTensor limits, MaybeTensor noise,
              MaybeTensor history0, MaybeTensor history1, MaybeTensor history2, MaybeTensor sample_ids, MaybeTensor draw_tensor,
              int64_t draw, int64_t seed, double clip, double guidance, Tensor x_prev, MaybeTensor x0) {
  Step s{};
  s.dtype = dtype_of(x);
  set_shape("x_t", x, s.batch, s.size);
  s.x = x.data_ptr();
  s.output = data_like("model_output", output, x);
  s.unconditional = data_like("unconditional", unconditional, x);
  s.noise = data_like("noise", noise, x);
  int64_t columns = 5;
  for (const MaybeTensor* history : {&history0, &history1, &history2}) {
    if (!*history) break;
    s.history[columns++ - 5] = data_like("history", *history, x);
  }
  s.coefficients = coefficients_of(coefficients, columns, x);
  STD_TORCH_CHECK(s.coefficients.columns == columns, "coefficients has ", s.coefficients.columns, " columns, must have ",
                  columns);
  if (limits) {
    const bool fits = limits->scalar_type() == ScalarType::Float && limits->numel() == s.batch;
    STD_TORCH_CHECK(fits && limits->is_contiguous() && same_place(*limits, x), "limits must be ", s.batch,
                    " contiguous float32 on the first tensor's device");
    s.limits = static_cast<const float*>(limits->data_ptr());
  }
  s.clip = static_cast<float>(clip);
  s.guidance = static_cast<float>(guidance);
  s.x_prev = data_like("x_prev", x_prev, x);
  s.x0 = data_like("x0", x0, x);
  s.key = key_of(sample_ids, draw_tensor, draw, seed, 0, x);
  run(cpu().step, s, x);
}

std::tuple<Tensor, Tensor> step(Tensor x, Tensor output, MaybeTensor unconditional, Tensor coefficients,
                                MaybeTensor limits, MaybeTensor noise, MaybeTensor history0, MaybeTensor history1, MaybeTensor history2, MaybeTensor sample_ids,
                                MaybeTensor draw_tensor, int64_t draw, int64_t seed, double clip, double guidance,
                                bool want_x0) {
  Tensor x_prev = torch::stable::empty_like(x);
  Tensor x0 = want_x0 ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  step_out(x, output, unconditional, coefficients, limits, noise, history0, history1, history2, sample_ids, draw_tensor, draw, seed, clip,
           guidance, x_prev, want_x0 ? x0 : MaybeTensor());
  return {x_prev, x0};
}

void random_out(int64_t kind, Tensor sample_ids, MaybeTensor draw_tensor, int64_t draw, int64_t seed, int64_t stream,
                Tensor out) {
  Draw d{};
  d.dtype = dtype_of(out);
  set_shape("out", out, d.batch, d.size);
  d.kind = static_cast<Random>(kind);
  d.out = out.data_ptr();
  d.key = key_of(sample_ids, draw_tensor, draw, seed, stream, out);
  run(cpu().draw, d, out);
}

}  // namespace
}  // namespace encdiff

#define Q_SAMPLE_IN                                                                                             \
  "Tensor x0, Tensor? noise, Tensor t, Tensor schedule, Tensor? loss_weights, int kind, Tensor? sample_ids, "   \
  "Tensor? draw_tensor, int draw, int seed"
#define STEP_IN                                                                                                 \
  "Tensor x, Tensor output, Tensor? unconditional, Tensor coefficients, Tensor? limits, Tensor? noise, Tensor? history0, " \
  "Tensor? history1, Tensor? history2, Tensor? sample_ids, Tensor? draw_tensor, int draw, int seed, float clip, float guidance"

STABLE_TORCH_LIBRARY(encdiff_native, m) {
  m.def("q_sample(" Q_SAMPLE_IN ") -> (Tensor, Tensor, Tensor)");
  m.def("q_sample_out(" Q_SAMPLE_IN ", Tensor(a!) x_t, Tensor(b!)? target, Tensor(c!)? weight) -> ()");
  m.def("step(" STEP_IN ", bool want_x0) -> (Tensor, Tensor)");
  m.def("step_out(" STEP_IN ", Tensor(a!) x_prev, Tensor(b!)? x0) -> ()");
  m.def(
      "threshold(Tensor x, Tensor output, Tensor? unconditional, Tensor coefficients, float clip, float guidance, "
      "float quantile) -> Tensor");
  m.def("random_out(int kind, Tensor sample_ids, Tensor? draw_tensor, int draw, int seed, int stream, Tensor(a!) out) -> ()");
}

#define IMPLEMENT(m)                                   \
  m.impl("q_sample", TORCH_BOX(&encdiff::q_sample));   \
  m.impl("q_sample_out", TORCH_BOX(&encdiff::q_sample_out)); \
  m.impl("step", TORCH_BOX(&encdiff::step));           \
  m.impl("step_out", TORCH_BOX(&encdiff::step_out));   \
  m.impl("threshold", TORCH_BOX(&encdiff::threshold)); \
  m.impl("random_out", TORCH_BOX(&encdiff::random_out))

STABLE_TORCH_LIBRARY_IMPL(encdiff_native, CPU, m) { IMPLEMENT(m); }
#ifdef ENCDIFF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(encdiff_native, CUDA, m) { IMPLEMENT(m); }
#endif
