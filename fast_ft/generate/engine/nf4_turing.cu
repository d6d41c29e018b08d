// out[part][m][n] = sum over k of x[m][k] * W[n][k], W in NF4: codes of 4 bits, eight in a word, a scale for each 64 columns.
//
// For compute capability 7.5, which has no cp.async and multiplies 16 outputs by 8 rows over 8 columns (mma.m16n8k8). W is
// the first operand: a lane holds words 2 c and 2 c + 1 of rows r, r + 8, r + 16 and r + 24 (c = lane % 4, r = lane / 4) and
// decodes them by byte permutation. A word's four pairs are the first operand of four products; 16 bytes of x, at the same
// 8 columns, are their second.
//
// A block is four warps of 32 outputs each, and 8 TILES rows; blocks with the same x take the columns in parts.
typedef unsigned int u32;
struct __align__(16) Four { u32 a, b, c, d; };

__device__ __forceinline__ void decode(u32 word, u32 scale, u32 &p0, u32 &p1, u32 &p2, u32 &p3) {
  asm(DECODER : "=r"(p0), "=r"(p1), "=r"(p2), "=r"(p3) : "r"(word), "r"(scale));
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b));
}

// `words` (N, K / 8), `scales` (K / 64, N): high and low part; `out` (parts, rows, N). K is a multiple of 64.
extern "C" __global__ void __launch_bounds__(128, TILES == 8 ? 3 : 4) product(
    const Four *__restrict__ x, const uint2 *__restrict__ words, const u32 *__restrict__ scales, float *__restrict__ out,
    int rows, int N, int K) {
  __shared__ Four held[2][TILES * 8][8];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4, r = lane / 4;
  const int n0 = blockIdx.x * 128 + warp * 32, blocks = K / 64;
  const int first = blocks * blockIdx.y / gridDim.y, last = blocks * (blockIdx.y + 1) / gridDim.y;
  float sum[2][TILES][4] = {};
  uint2 word[4];
  u32 scale[4];
  Four ahead[TILES / 2];

  auto fetch = [&](int block) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int n = min(n0 + r + 8 * i, N - 1);
      word[i] = words[((long long)n * (K / 8) + block * 8) / 2 + c];
      scale[i] = scales[(long long)block * N + n];
    }
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
      const int at = threadIdx.x + 128 * i;
      ahead[i] = x[(long long)min(at / 8, rows - 1) * (K / 8) + block * 8 + at % 8];
    }
  };
  auto put = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
      const int at = threadIdx.x + 128 * i, m = at / 8;
      held[buffer][m][at % 8 ^ m & 1] = ahead[i];
    }
  };

  if (first < last) {
    fetch(first);
    put(0);
  }
  __syncthreads();
  for (int block = first; block < last; block++) {
    uint2 now[4];
    u32 by[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      now[i] = word[i];
      by[i] = scale[i];
    }
    if (block + 1 < last) fetch(block + 1);  // under way while this one is multiplied
    const int buffer = (block - first) & 1;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) decode(half ? now[i].y : now[i].x, by[i], a[i][0], a[i][1], a[i][2], a[i][3]);
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        const Four v = held[buffer][t * 8 + r][(2 * c + half) ^ (r & 1)];
        const u32 b[4] = {v.a, v.b, v.c, v.d};
#pragma unroll
        for (int j = 0; j < 4; j++) {
          mma(sum[0][t], a[0][j], a[1][j], b[j]);
          mma(sum[1][t], a[2][j], a[3][j], b[j]);
        }
      }
    }
    if (block + 1 < last) put(buffer ^ 1);
    __syncthreads();
  }
#pragma unroll
  for (int g = 0; g < 2; g++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int m = t * 8 + 2 * c + e % 2, n = n0 + 16 * g + r + e / 2 * 8;
        if (m < rows && n < N) out[((long long)blockIdx.y * rows + m) * N + n] = sum[g][t][e];
      }
}
