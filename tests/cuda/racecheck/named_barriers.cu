// What compute-sanitizer's racecheck says of named barriers, by kernels without a race: a warp writes a word, all
// reading warps meet, the next warp reads it, twice over. Built and run by hand:
//   nvcc -arch=sm_90 -o named_barriers named_barriers.cu && compute-sanitizer --tool racecheck ./named_barriers
// docs/notes/cuda.md says which of them it names.
#include <cstdio>

enum class Teams { none, by_constant, by_register };

template <int kWarps>
__device__ void meet(int id) {
  if (id == 1) asm volatile("bar.sync 1, %0;" ::"n"(kWarps * 32) : "memory");
  else asm volatile("bar.sync 4, %0;" ::"n"(kWarps * 32) : "memory");
}

// kWarps of the CTA's kWarps + 1 read; kTeams: they have met in fours before, at barriers 1 to 3. kArrives: the last
// warp has them wait for it once.
template <int kWarps, int kId, Teams kTeams, bool kArrives>
__global__ void meets(int* out) {
  __shared__ int words[16], team_words[16];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, team = warp / 4;
  if (warp == kWarps) {
    if constexpr (kArrives) asm volatile("bar.arrive 5, %0;" ::"n"(kWarps * 32 + 32) : "memory");
    return;
  }
  int sum = 0;
  if constexpr (kTeams != Teams::none) {
    for (int i = 0; i < 4; ++i) {
      if (lane == 0) team_words[warp] = warp + i;
      for (int twice = 0; twice < 2; ++twice) {
        if constexpr (kTeams == Teams::by_register) {
          asm volatile("bar.sync %0, 128;" ::"r"(team + 1) : "memory");
        } else {
          if (team == 0) asm volatile("bar.sync 1, 128;" ::: "memory");
          else if (team == 1) asm volatile("bar.sync 2, 128;" ::: "memory");
          else asm volatile("bar.sync 3, 128;" ::: "memory");
        }
        if (twice == 0) sum += team_words[team * 4 + (warp + 1) % 4];
      }
    }
  }
  if constexpr (kArrives) asm volatile("bar.sync 5, %0;" ::"n"(kWarps * 32 + 32) : "memory");
  for (int i = 0; i < 4; ++i) {
    if (lane == 0) words[warp] = warp + i;
    meet<kWarps>(kId);
    sum += words[(warp + 1) % kWarps];
    meet<kWarps>(kId);
  }
  out[threadIdx.x] = sum;
}

template <int kWarps, int kId, Teams kTeams, bool kArrives>
int run(int* out) {
  meets<kWarps, kId, kTeams, kArrives><<<2, kWarps * 32 + 32>>>(out);
  const cudaError_t e = cudaDeviceSynchronize();
  if (e != cudaSuccess) std::printf("%s\n", cudaGetErrorString(e));
  return e == cudaSuccess ? 0 : 1;
}

int main() {
  int* out = nullptr;
  if (cudaMalloc(&out, 1024 * sizeof(int)) != cudaSuccess) return 1;
  return run<8, 1, Teams::none, false>(out) + run<12, 1, Teams::none, false>(out) +
         run<12, 4, Teams::none, false>(out) + run<8, 4, Teams::by_constant, false>(out) +
         run<12, 4, Teams::by_constant, false>(out) + run<8, 4, Teams::by_register, false>(out) +
         run<12, 4, Teams::by_register, false>(out) + run<12, 4, Teams::none, true>(out) +
         run<12, 4, Teams::by_register, true>(out);
}
