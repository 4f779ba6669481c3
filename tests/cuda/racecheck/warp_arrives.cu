// What compute-sanitizer's racecheck says of mbarriers, by kernels without a race: the lanes of a warp write a word
// each and arrive at a barrier, another warp waits for it and reads them, several times over. Either every lane
// arrives, or one does for its warp, after __syncwarp, as warps of attend_main and attend_wide do. Built and run by
// hand:
//   nvcc -arch=sm_90 -o warp_arrives warp_arrives.cu && compute-sanitizer --tool racecheck ./warp_arrives
// docs/notes/cuda.md says which of them it names.
#include <cstdint>
#include <cstdio>

__device__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

__device__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{.reg .pred p;\nagain_%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra again_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Warp 0 writes, warp 1 reads.
template <bool kOneLane>
__global__ void hands_over(int* out) {
  __shared__ int words[32];
  __shared__ __align__(8) std::uint64_t barriers[2];  // written, read
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint32_t written = shared_address(barriers), read = shared_address(barriers + 1);
  if (threadIdx.x == 0)
    for (const std::uint32_t barrier : {written, read})
      asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(kOneLane ? 1 : 32) : "memory");
  __syncthreads();
  const auto pass = [&](std::uint32_t barrier) {
    if constexpr (kOneLane) {
      __syncwarp();
      if (lane == 0) arrive(barrier);
    } else {
      arrive(barrier);
    }
  };
  int sum = 0;
  for (std::uint32_t i = 0; i < 4; ++i) {
    if (warp == 0) {
      wait(read, (i & 1) ^ 1);
      words[lane] = lane + static_cast<int>(i);
      pass(written);
    } else {
      wait(written, i & 1);
      sum += words[(lane + 1) % 32];
      pass(read);
    }
  }
  out[threadIdx.x] = sum;
}

int main() {
  int* out = nullptr;
  if (cudaMalloc(&out, 64 * sizeof(int)) != cudaSuccess) return 1;
  hands_over<false><<<2, 64>>>(out);
  hands_over<true><<<2, 64>>>(out);
  const cudaError_t e = cudaDeviceSynchronize();
  if (e != cudaSuccess) std::printf("%s\n", cudaGetErrorString(e));
  return e == cudaSuccess ? 0 : 1;
}
