#include "sample/sample.h"

#include "core/cpu/draw.h"
#include "core/rows.h"

namespace fastdecode::FD_ISA {
namespace {

template <class T, class C = Compute<T>>
void run(const SampleArgs& a, const Exec& ex) {
  const int64_t V = a.vocab_size;
  const RandomArgs& random = a.random;
  for_each_row(ex, a.batch, V, a.scratch, row_scratch_bytes<C>(V), [&](int64_t b, void* buffer) {
    a.tokens[b] = -1;
    a.status[b] = 0;
    if (a.active && !a.active[b]) return;
    const RowScratch<C> s = row_scratch<C>(buffer, V);
    const T* logits = static_cast<const T*>(a.logits) + b * a.batch_stride;
    std::optional<double> uniform;
    if (random.uniforms) uniform = random.uniforms[b * random.uniform_stride];
    const Noise noise(random.seed ? random.seed[b] : 0, random.offset ? random.offset[b] : 0, a.stream, a.node);
    a.status[b] = with_law(logits, V, row_filter(a.filters, b, 0, b), s,
                           [&](auto& law) { a.tokens[b] = draw(law, uniform, noise); });
  });
}

}  // namespace

void sample(const SampleArgs& a, const Exec& ex) {
  dispatch_logits(a.dtype, [&](auto tag) { run<typename decltype(tag)::type>(a, ex); });
}

}  // namespace fastdecode::FD_ISA

#if FD_CPU_LEVEL == 1
int64_t fastdecode::cpu::sample_scratch_bytes(const SampleArgs& a, const Exec& ex) {
  return FD_ISA::num_slots(a.batch, a.vocab_size, ex) * FD_ISA::row_scratch_bytes(a.vocab_size, a.dtype);
}
#endif
FD_CPU_OP(sample, SampleArgs)
