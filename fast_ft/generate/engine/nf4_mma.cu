// y[m][n] = sum over k of x[m][k] * W[n][k], W in NF4: codes of 4 bits, eight in a word, a scale for each 64 columns.
//
// Tensor cores multiply 16 outputs by 8 rows of x over 16 columns (mma.m16n8k16); W is the first operand, decoded straight
// into registers. A byte, two codes, is looked up in shared memory, where each of the 32 lanes has a table of its own, in
// its own bank. One block a multiprocessor takes an even share of all (tile of outputs, chunk of columns), in order. Where a
// tile is shared, each block writes a part, fp32, which whoever reads the product adds in the parts' order. Equal bytes
// each time: no atomics.
//
// A block is KG groups of NW warps. A group's warps lie side by side along the outputs; groups share a chunk's columns, 64
// each, and meet only where a tile ends, to add up. A warp has 16 G outputs and 8 MT rows. What a group reads is STAGES deep
// on its way through shared memory (cp.async).
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
constexpr int GROUP = 32 * NW, THREADS = GROUP * KG, TILE = 16 * G * NW, CHUNK = 64 * KG, ROWS = 8 * MT;
constexpr int W_BYTES = TILE * 32, X_BYTES = ROWS * 128, S_BYTES = TILE * 4;  // of a group's 64 columns
constexpr int STAGE = W_BYTES + X_BYTES + S_BYTES;
constexpr int TABLE = 256 * ENTRY;  // 128 bytes; where an entry takes 256, groups add their sums up in the rest
constexpr int SUMS = G * MT * 4;                       // of a lane
constexpr int BATCH = SUMS / ((SUMS * NW + 255) / 256);  // sums of a warp that find room in the table's gaps
static_assert(ENTRY == 256 || ENTRY == 128 && KG == 1, "the groups' sums lie between the entries");
static_assert(TILE / 4 <= GROUP, "one copy of scales a thread");
static_assert(SUMS % BATCH == 0 && BATCH * NW <= 256 && G % 2 == 0, "a block's cut does not come out even");

// Copies 16 bytes, or 16 zeros where `size` is 0.
__device__ __forceinline__ void copy(u32 to, const void *from, int size) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two codes, as found at `at` in the table, times the scale's two parts, added first: only the product is rounded.
__device__ __forceinline__ u32 decoded(u32 at, u32 scale) {
  u32 made;
  asm("{.reg .b16 h, l; .reg .b32 high, low, codes, part;\n"
      "ld.shared.b32 codes, [%1 + " BASE "];\n"
      "mov.b32 {h, l}, %2; mov.b32 high, {h, h}; mov.b32 low, {l, l};\n"
      "fma.rn." KIND "x2 part, codes, low, %3;\n"
      "fma.rn." KIND "x2 %0, codes, high, part;}" : "=r"(made) : "r"(at), "r"(scale), "r"(0x80008000u));
  return made;
}
__device__ __forceinline__ u32 rounded(float low, float high) {
  u32 made;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
  return made;
}
// Where the table has a word's byte, for a lane.
__device__ __forceinline__ u32 entry(u32 word, int byte, int lane) {
  if (ENTRY == 256) return __byte_perm(word, lane * 4, 0x5504 | byte << 4);
  return ((byte == 0 ? word << 7 : word >> (8 * byte - 7)) & 0x7f80) | lane * 4;
}
// A warp's output: the i-th of the 2 G that lanes 4 r to 4 r + 3 share. Four in a row, so that they are stored at once.
__device__ __forceinline__ int output(int i, int r) { return i / 4 * 32 + 4 * r + i % 4; }
// Where 16 bytes of a tile's codes lie: lanes that read at once find them in different banks.
__device__ __forceinline__ int place(int row, int piece) { return ((2 * row + piece) ^ (row / 4 % 4 * 2)) * 16; }

__device__ const u16 CODES[16] = {CODE_BITS};

// `words` (N, K / 8), `scales` (K / 64, N): high and low part; `xa` (rows, R), `b` (N, R): a LoRA's, R a multiple of 16. N is one of 4.
// `out`: (parts, rows, N) in fp32, or (rows, N) in the weights' kind if `parts` is 1.
extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    const u8 *__restrict__ x, const u8 *__restrict__ words, const u32 *__restrict__ scales, const u8 *__restrict__ xa,
    const u8 *__restrict__ b, void *__restrict__ out, int rows, int N, int K, int x_row, int xa_row, int R, int parts) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, c = lane % 4, r = lane / 4;
  const int along = warp % NW, group = warp / NW, own = thread % GROUP;
  u8 *const stages = shared + TABLE + group * (STAGES * STAGE);  // each group's own
  const u32 shared_at = (u32)__cvta_generic_to_shared(stages);
  const int chunks = (K + CHUNK - 1) / CHUNK, all = (N + TILE - 1) / TILE * chunks, blocks = gridDim.x;
  int at = (int)((long long)all * blockIdx.x / blocks);
  const int end = (int)((long long)all * (blockIdx.x + 1) / blocks);
  int tile = at / chunks, chunk = at % chunks;
  int next = at, next_tile = tile, next_chunk = chunk;

  auto fetch = [&](int slot) {
    if (next < end) {
      const int n0 = next_tile * TILE, k0 = next_chunk * CHUNK + 64 * group, size = k0 < K ? 16 : 0;
      const u32 to = shared_at + slot * STAGE;
      {
        constexpr int STEP = GROUP / 2;  // a multiple of 16: all rows of a thread are placed alike
        const int row = own / 2, piece = own % 2;
        const u8 *const from = words + k0 / 2 + 16 * piece;
#pragma unroll
        for (int i = 0; i < G; i++)
          copy(to + place(row, piece) + i * (STEP * 32), from + (long long)min(n0 + row + i * STEP, N - 1) * (K / 2), size);
      }
      {
        constexpr int STEP = GROUP / 8;
        const int row = own / 8, piece = own % 8;
        const u8 *const from = x + 2 * k0 + 16 * piece;
#pragma unroll
        for (int i = 0; i < (ROWS + STEP - 1) / STEP; i++)
          if (ROWS % STEP == 0 || row + i * STEP < ROWS)
            copy(to + W_BYTES + (row + i * STEP) * 128 + (piece ^ (row & 1)) * 16,
                 from + (long long)min(row + i * STEP, rows - 1) * (2 * x_row), size);
      }
      if (own < TILE / 4)
        copy(to + W_BYTES + X_BYTES + 16 * own, scales + (long long)(k0 / 64) * N + min(n0 + 4 * own, N - 4), size);
      next++;
      if (++next_chunk == chunks) { next_chunk = 0; next_tile++; }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

#pragma unroll
  for (int slot = 0; slot < STAGES - 1; slot++) fetch(slot);
  for (int byte = thread; byte < 256; byte += THREADS) {  // a byte's first code is its high half
    const u32 two = CODES[byte / 16] | (u32)CODES[byte % 16] << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) *(uint4 *)(shared + byte * ENTRY + (i + lane) % 8 * 16) = make_uint4(two, two, two, two);
  }
  __syncthreads();

  float sum[G][MT][4];
  auto begin = [&] {  // a LoRA's share goes to a tile's first part
#pragma unroll
    for (int g = 0; g < G; g++)
#pragma unroll
      for (int t = 0; t < MT; t++)
#pragma unroll
        for (int e = 0; e < 4; e++) sum[g][t][e] = 0;
    if (chunk != 0 || group != 0) return;
    for (int rank = 2 * c; rank < R; rank += 16) {
      u32 a[G][4];
#pragma unroll
      for (int g = 0; g < G; g++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int n = min(tile * TILE + along * 16 * G + output(2 * g + e % 2, r), N - 1);
          a[g][e] = *(const u32 *)(b + ((long long)n * R + rank + e / 2 * 8) * 2);
        }
#pragma unroll
      for (int t = 0; t < MT; t++) {
        const int m = min(8 * t + r, rows - 1);
        const u32 b0 = *(const u32 *)(xa + ((long long)m * xa_row + rank) * 2);
        const u32 b1 = *(const u32 *)(xa + ((long long)m * xa_row + rank + 8) * 2);
#pragma unroll
        for (int g = 0; g < G; g++) mma(sum[g][t], a[g], b0, b1);
      }
    }
  };

  auto multiply = [&](int slot) {
    const u8 *const from = stages + slot * STAGE;
    const u8 *const x_at = from + W_BYTES + r * 128;
    uint2 word[2 * G];
    u32 scale[2 * G];
#pragma unroll
    for (int i = 0; i < 2 * G; i++)
      word[i] = *(const uint2 *)(from + place(along * 16 * G + output(i, r), c / 2) + c % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2 * G; i += 4)
      *(uint4 *)(scale + i) = *(const uint4 *)(from + W_BYTES + X_BYTES + (along * 16 * G + output(i, r)) * 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 a[2][G][4];  // of two steps of 16 columns
#pragma unroll
      for (int i = 0; i < 2 * G; i++) {
        const u32 w = half ? word[i].y : word[i].x;
#pragma unroll
        for (int pair = 0; pair < 4; pair++)
          a[pair / 2][i / 2][i % 2 + pair % 2 * 2] = decoded(entry(w, pair, lane), scale[i]);
      }
#pragma unroll
      for (int t = 0; t < MT; t++) {
        const uint4 v = *(const uint4 *)(x_at + t * 1024 + ((2 * c + half) ^ (r & 1)) * 16);
#pragma unroll
        for (int g = 0; g < G; g++) mma(sum[g][t], a[0][g], v.x, v.y);
#pragma unroll
        for (int g = 0; g < G; g++) mma(sum[g][t], a[1][g], v.z, v.w);
      }
    }
  };

  auto finish = [&](bool is_last) {
    float *const flat = &sum[0][0][0];
    float *const gap = (float *)(shared + 128 + lane * 4) + along * BATCH * 64;
#pragma unroll
    for (int other = 1; other < KG; other++)  // the groups' sums, in the groups' order
#pragma unroll
      for (int first = 0; first < SUMS; first += BATCH) {
        __syncthreads();
        if (group == other)
#pragma unroll
          for (int i = 0; i < BATCH; i++) gap[i * 64] = flat[first + i];
        __syncthreads();
        if (group == 0)
#pragma unroll
          for (int i = 0; i < BATCH; i++) flat[first + i] += gap[i * 64];
      }
    if (group != 0) return;
    const int owner = (int)(((long long)tile * chunks + 1) * blocks - 1) / all;  // of the tile's first chunk
    const int part = blockIdx.x - owner, n0 = tile * TILE + along * 16 * G + 4 * r;
#pragma unroll
    for (int t = 0; t < MT; t++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int m = 8 * t + 2 * c + e;
        const long long to = ((long long)part * rows + m) * N + n0;
#pragma unroll
        for (int g = 0; g < G; g += 2) {
          if (m >= rows || n0 + 16 * g >= N) continue;
          const float a = sum[g][t][e], b = sum[g][t][e + 2], c = sum[g + 1][t][e], d = sum[g + 1][t][e + 2];
          if (parts == 1) *(uint2 *)((u16 *)out + to + 16 * g) = make_uint2(rounded(a, b), rounded(c, d));
          else *(float4 *)((float *)out + to + 16 * g) = make_float4(a, b, c, d);
        }
      }
    for (int empty = part + 1; is_last && empty < parts; empty++)  // parts that this tile has not
      for (int m = c; m < rows; m += 4)
        for (int g = 0; g < G && n0 + 16 * g < N; g += 2)
          *(float4 *)((float *)out + ((long long)empty * rows + m) * N + n0 + 16 * g) = make_float4(0, 0, 0, 0);
  };

  begin();
  for (int slot = 0; at < end; at++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
    fetch(slot == 0 ? STAGES - 1 : slot - 1);
    multiply(slot);
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    const bool is_last = ++chunk == chunks;
    if (is_last || at + 1 == end) {
      finish(is_last);
      if (is_last) { chunk = 0; tile++; }
      if (at + 1 < end) begin();
    }
  }
}
