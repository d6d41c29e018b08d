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
static_assert(STAGES >= 3 && (MT <= 8 || MT % 4 == 0), "the order of what is read and multiplied does not come out even");

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
  const u32 chunks = (K + CHUNK - 1) / CHUNK, all = (N + TILE - 1) / TILE * chunks, blocks = gridDim.x;
  u32 at = all * blockIdx.x / blocks;  // all * blocks is below 2^31
  const u32 end = all * (blockIdx.x + 1) / blocks;
  u32 tile = at / chunks, chunk = at % chunks;

  // What is copied next: where a thread's 16 bytes come from, and how many of its rows there are from there on.
  constexpr int W_STEP = GROUP / 2, X_STEP = GROUP / 8;  // rows between a thread's copies; multiples of 16 and of 2
  const u32 w_to = shared_at + place(own / 2, own % 2), s_to = shared_at + W_BYTES + X_BYTES + own * 16;
  const u32 x_to = shared_at + W_BYTES + own / 8 * 128 + (own % 8 ^ own / 8 & 1) * 16;
  const int x_left = rows - own / 8;
  u32 next = at, next_tile = tile, next_chunk = chunk;
  const u8 *w_from, *x_from;
  const u32 *s_from;
  int w_left, s_left, k_left;
  auto aim = [&] {
    const int n = next_tile * TILE, k = next_chunk * CHUNK + 64 * group;
    w_from = words + (long long)(n + own / 2) * (K / 2) + k / 2 + own % 2 * 16;
    x_from = x + (long long)(own / 8) * (2 * x_row) + 2 * k + own % 8 * 16;
    s_from = scales + (long long)(k / 64) * N + n + 4 * own;
    w_left = N - n - own / 2;
    s_left = own < TILE / 4 ? N - n - 4 * own : 0;
    k_left = K - k;
  };
  auto fetch = [&](int slot) {
    if (next < end) {
      const u32 to = slot * STAGE;
#pragma unroll
      for (int i = 0; i < G; i++)
        copy(w_to + to + i * (W_STEP * 32), w_from + (long long)(K / 2) * (i * W_STEP),
             k_left > 0 && w_left > i * W_STEP ? 16 : 0);
#pragma unroll
      for (int i = 0; i < (ROWS + X_STEP - 1) / X_STEP; i++)
        if (ROWS % X_STEP == 0 || own / 8 + i * X_STEP < ROWS)
          copy(x_to + to + i * (X_STEP * 128), x_from + (long long)(2 * x_row) * (i * X_STEP),
               k_left > 0 && x_left > i * X_STEP ? 16 : 0);
      if (own < TILE / 4) copy(s_to + to, s_from, k_left > 0 && s_left > 0 ? 16 : 0);
      w_from += CHUNK / 2;
      x_from += CHUNK * 2;
      s_from += (long long)KG * N;
      k_left -= CHUNK;
      next++;
      if (++next_chunk == chunks) {
        next_chunk = 0;
        next_tile++;
        aim();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  aim();
#if __CUDA_ARCH__ >= 900  // nothing of a former launch is needed so far: weights come near meanwhile
  for (int slot = 0; slot < STAGES - 1 && at + slot < end && chunk + slot < chunks; slot++)
    for (int i = 0; i < G; i++)
      if (w_left > i * W_STEP && k_left > slot * CHUNK)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(w_from + slot * (CHUNK / 2) + (long long)(K / 2) * (i * W_STEP)));
#endif
  for (int byte = thread; byte < 256; byte += THREADS) {  // a byte's first code is its high half
    const u32 two = CODES[byte / 16] | (u32)CODES[byte % 16] << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) *(uint4 *)(shared + byte * ENTRY + (i + lane) % 8 * 16) = make_uint4(two, two, two, two);
  }
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#pragma unroll 1
  for (int slot = 0; slot < STAGES - 1; slot++) fetch(slot);
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

  // What is read of a stage: a lane's codes and scales of all its outputs, and x at its columns.
  uint2 word[2 * G];
  u32 scale[2 * G];
  constexpr int HELD = MT > 8 ? 4 : MT;  // eights of rows of x that are held: all, or the next few
  uint4 v[HELD];                         // half of the lane's columns: of two products of 16 columns
  u32 a[2][MT > 8 ? G : 1][2][4];        // decoded weights: what is multiplied, and what is decoded meanwhile
  auto read_codes = [&](int slot) {
    const u8 *const from = stages + slot * STAGE;
#pragma unroll
    for (int i = 0; i < 2 * G; i++)
      word[i] = *(const uint2 *)(from + place(along * 16 * G + output(i, r), c / 2) + c % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2 * G; i += 4)
      *(uint4 *)(scale + i) = *(const uint4 *)(from + W_BYTES + X_BYTES + (along * 16 * G + output(i, r)) * 4);
  };
  auto read_x = [&](int slot, int half, int t) {
    v[t % HELD] = *(const uint4 *)(stages + slot * STAGE + W_BYTES + t * 1024 + r * 128 + ((2 * c + half) ^ (r & 1)) * 16);
  };
  auto decode = [&](int half, int g, u32(&to)[2][4]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        const uint2 w = word[2 * g + i];
        to[pair / 2][i + pair % 2 * 2] = decoded(entry(half ? w.y : w.x, pair, lane), scale[2 * g + i]);
      }
  };
  // Multiplies a half of the group's 64 columns, and reads and decodes the next half meanwhile; `here` and `slot` are their stages.
  auto multiply = [&](int half, int here, int slot) {
    const int other = 1 - half;
    if constexpr (MT <= 8) {  // 16 outputs at a time, all rows of x held
#pragma unroll
      for (int g = 0; g < G; g++) {
        if (g + 1 < G) decode(half, g + 1, a[(g + 1) % 2][0]);
        else {
          if (other == 0) read_codes(slot);
          decode(other, 0, a[0][0]);
        }
#pragma unroll
        for (int t = 0; t < MT; t++) mma(sum[g][t], a[g % 2][0][0], v[t].x, v[t].y);
#pragma unroll
        for (int t = 0; t < MT; t++) {
          mma(sum[g][t], a[g % 2][0][1], v[t].z, v[t].w);
          if (g + 1 == G) read_x(slot, other, t);
        }
      }
    } else {  // 16 rows at a time, all weights held
      if (other == 0) read_codes(slot);
#pragma unroll
      for (int g = 0; g < G; g++) decode(other, g, a[other][g]);
#pragma unroll
      for (int t = 0; t < MT; t += 2) {
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
          for (int g = 0; g < G; g++)
#pragma unroll
            for (int u = 0; u < 2; u++) {
              const uint4 x = v[(t + u) % HELD];
              mma(sum[g][t + u], a[half][g][step], step ? x.z : x.x, step ? x.w : x.y);
            }
#pragma unroll
        for (int u = 0; u < 2; u++)
          if (t + u + HELD < MT) read_x(here, half, t + u + HELD);
          else read_x(slot, other, t + u + HELD - MT);
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
    const u32 owner = ((tile * chunks + 1) * blocks - 1) / all;  // of the tile's first chunk
    const int part = blockIdx.x - owner, n0 = tile * TILE + along * 16 * G + 4 * r;
    const long long to = ((long long)part * rows + 2 * c) * N + n0, step = (long long)N;
    if (parts == 1) {
      u16 *y = (u16 *)out + to;
#pragma unroll
      for (int t = 0; t < MT; t++, y += 8 * step)
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int g = 0; g < G; g += 2)
            if (8 * t + 2 * c + e < rows && n0 + 16 * g < N)
              *(uint2 *)(y + e * step + 16 * g) = make_uint2(rounded(sum[g][t][e], sum[g][t][e + 2]),
                                                             rounded(sum[g + 1][t][e], sum[g + 1][t][e + 2]));
    } else {
      float *y = (float *)out + to;
#pragma unroll
      for (int t = 0; t < MT; t++, y += 8 * step)
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int g = 0; g < G; g += 2)
            if (8 * t + 2 * c + e < rows && n0 + 16 * g < N)
              *(float4 *)(y + e * step + 16 * g) = make_float4(sum[g][t][e], sum[g][t][e + 2], sum[g + 1][t][e], sum[g + 1][t][e + 2]);
    }
    for (int empty = part + 1; is_last && empty < parts; empty++)  // parts that this tile has not
      for (int m = c; m < rows; m += 4)
        for (int g = 0; g < G && n0 + 16 * g < N; g += 2)
          *(float4 *)((float *)out + ((long long)empty * rows + m) * N + n0 + 16 * g) = make_float4(0, 0, 0, 0);
  };

  auto arrived = [&] {  // the next stage, for all warps of the group, which are done with the last one
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 3) : "memory");
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
  };
  begin();
  asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
  asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(GROUP) : "memory");
  read_codes(0);
#pragma unroll
  for (int t = 0; t < HELD; t++) read_x(0, 0, t);
#pragma unroll
  for (int g = 0; g < (MT > 8 ? G : 1); g++) decode(0, g, a[0][g]);
  for (int slot = 0; at < end; at++) {
    const int after = slot + 1 == STAGES ? 0 : slot + 1;
    multiply(0, slot, slot);
    arrived();
    fetch(slot == 0 ? STAGES - 1 : slot - 1);
    multiply(1, slot, after);
    slot = after;
    const bool is_last = ++chunk == chunks;
    if (is_last || at + 1 == end) {
      finish(is_last);
      if (is_last) { chunk = 0; tile++; }
      if (at + 1 < end) begin();
    }
  }
}
