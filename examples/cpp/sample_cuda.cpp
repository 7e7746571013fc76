// Draws one token from each of four rows of logits on a GPU: sample.cpp with other pointers and a stream.
#include <cuda_runtime_api.h>
#include <fastdecode/sample/sample.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace fastdecode;

void check(cudaError_t error) {
  if (error != cudaSuccess) std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error)), std::exit(1);
}

void* allocate(size_t bytes) {
  void* pointer = nullptr;
  check(cudaMalloc(&pointer, bytes));
  return pointer;
}

template <class T>
T* to_gpu(const std::vector<T>& values) {
  void* pointer = allocate(values.size() * sizeof(T));
  check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(pointer);
}

int main() {
  const int64_t batch = 4, vocab_size = 32000;
  std::vector<float> logits(batch * vocab_size);  // your model's output
  for (int64_t i = 0; i < batch * vocab_size; ++i) logits[i] = static_cast<float>(i * i % 10007) / 1024;

  Exec exec;  // outcomes do not depend on num_sms, speed does
  check(cudaDeviceGetAttribute(&exec.num_sms, cudaDevAttrMultiProcessorCount, 0));
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  exec.stream = stream;

  SampleArgs draw{.logits = to_gpu(logits),
                  .filters = {.temperature = to_gpu(std::vector(batch, 0.8f)),
                              .top_k = to_gpu(std::vector<int32_t>(batch, 50)),
                              .top_p = to_gpu(std::vector(batch, 0.9f))},
                  .random = {.seed = to_gpu<int64_t>({1, 2, 3, 4}), .offset = to_gpu<int64_t>({17, 0, 5, 128})},
                  .tokens = static_cast<int64_t*>(allocate(batch * sizeof(int64_t))),
                  .status = static_cast<int32_t*>(allocate(batch * sizeof(int32_t))),
                  .batch = batch,
                  .vocab_size = vocab_size,
                  .batch_stride = vocab_size,
                  .dtype = DType::kFloat32};
  draw.scratch = allocate(cuda::sample_scratch_bytes(draw, exec));
  cuda::sample(draw, exec);  // launches on the stream and returns
  check(cudaGetLastError());

  std::vector<int64_t> tokens(batch);
  check(cudaMemcpyAsync(tokens.data(), draw.tokens, batch * sizeof(int64_t), cudaMemcpyDeviceToHost, stream));
  check(cudaStreamSynchronize(stream));
  for (int64_t b = 0; b < batch; ++b) std::printf("row %d: drew %d\n", int(b), int(tokens[b]));
}
