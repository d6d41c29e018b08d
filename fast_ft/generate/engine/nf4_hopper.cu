// y[m][n] = sum over k of x[m][k] * W[n][k], W in NF4: codes of 4 bits, eight in a word, a scale for each 64 columns.
//
// For compute capability 9.0 alone: tensor cores multiply 64 outputs by all rows of x over 16 columns (wgmma). W is the first
// operand, decoded straight into registers; x is the second, in shared memory, its columns in the order of a lane's weights. A byte, two codes, is looked up in shared memory, where each of the 32 lanes has a table of its own, in
// its own bank. One block a multiprocessor takes an even share of all (tile of outputs, chunk of columns), in order. Where a
// tile is shared, each block writes a part, fp32, which whoever reads the product adds in the parts' order. Equal bytes
// each time: no atomics.
//
// A block is KG groups of NW warps. A group's warps lie side by side along the outputs; groups share a chunk's columns, 64
// each, and meet only where a tile ends, to add up. A warp has 16 G outputs and 8 MT rows. What a group reads is STAGES deep
// on its way through shared memory (cp.async): COPIERS warps do nothing but copy it, and a barrier a stage says when it is
// there, another when it was read.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
constexpr int GROUP = 32 * NW, WORKERS = GROUP * KG, THREADS = WORKERS + 32 * COPIERS, TILE = 16 * G * NW, CHUNK = 64 * KG, ROWS = 8 * MT;
constexpr int W_BYTES = TILE * 32, X_BYTES = ROWS * 128, S_BYTES = TILE * 4;  // of a group's 64 columns
constexpr int STAGE = (W_BYTES + X_BYTES + S_BYTES + 1023) / 1024 * 1024;
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
__device__ __forceinline__ void copy4(u32 to, const void *from, int size) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void expect(u32 at, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void arrive(u32 at) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(at) : "memory");
}
__device__ __forceinline__ void arrive_when_copied(u32 at) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(at) : "memory");
}
__device__ __forceinline__ void await(u32 at, u32 phase) {
  u32 done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(at), "r"(phase) : "memory");
  } while (!done);
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
  const int along = warp % NW, group = warp / NW;
  u8 *const stages = shared + TABLE + group * (STAGES * STAGE);  // each group's own
  const u32 shared_at = (u32)__cvta_generic_to_shared(shared) + TABLE;
  const u32 chunks = (K + CHUNK - 1) / CHUNK, all = (N + TILE - 1) / TILE * chunks, blocks = gridDim.x;
  u32 at = all * blockIdx.x / blocks;  // all * blocks is below 2^31
  const u32 end = all * (blockIdx.x + 1) / blocks;
  u32 tile = at / chunks, chunk = at % chunks;
  const u32 there = shared_at + KG * STAGES * STAGE, was_read = there + 8 * STAGES;  // barriers of each stage
  if (thread == 0)
    for (int i = 0; i < STAGES; i++) {
      expect(there + 8 * i, 32 * COPIERS);
      expect(was_read + 8 * i, NW * KG);
    }
  for (int byte = thread; byte < 256; byte += THREADS) {  // a byte's first code is its high half
    const u32 two = CODES[byte / 16] | (u32)CODES[byte % 16] << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) *(uint4 *)(shared + byte * ENTRY + (i + lane) % 8 * 16) = make_uint4(two, two, two, two);
  }
  __syncthreads();

  if (warp >= NW * KG) {  // warps that copy
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    const int own = thread - WORKERS;
    constexpr int COPY = 32 * COPIERS, W_STEP = COPY / (2 * KG), PITCH = STAGES * STAGE;
    const int w_row = own / (2 * KG), w_piece = own % (2 * KG);
    const u32 w_base = shared_at + w_piece / 2 * PITCH + X_BYTES;
    constexpr int LAG = 2;
    u32 slot = 0, phase = 1;
    int count = 0;
    for (; at < end; at++) {
      const int n = tile * TILE, k = chunk * CHUNK;
      await(was_read + 8 * slot, phase);
      const u32 to = slot * STAGE;
      const u8 *const w_from = words + k / 2 + w_piece * 16;
      const int w_size = k + 32 * w_piece < K ? 16 : 0;
#pragma unroll 4
      for (int row = w_row; row < TILE; row += W_STEP)
        copy(w_base + to + place(row, w_piece % 2), w_from + (long long)min(n + row, N - 1) * (K / 2), w_size);
      for (int g = 0; g < KG; g++) {
        const u8 *const x_from = x + 2 * (k + 64 * g) + 4 * lane;
        const u32 x_to = shared_at + g * PITCH + to + lane / 8 * 4;
        const int size = k + 64 * g < K ? 4 : 0;
#pragma unroll 4
        for (int row = own / 32; row < ROWS; row += COPIERS)
          copy4(x_to + row * 128 + (lane % 8 ^ row & 7) * 16, x_from + (long long)min(row, rows - 1) * (2 * x_row), size);
      }
      for (int i = own; i < KG * TILE / 4; i += COPY) {
        const int g = i / (TILE / 4), four = i % (TILE / 4) * 4, block = k / 64 + g;
        copy(shared_at + g * PITCH + to + W_BYTES + X_BYTES + four * 4, scales + (long long)block * N + min(n + four, N - 4), block < K / 64 ? 16 : 0);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (count >= LAG) {
        asm volatile("cp.async.wait_group %0;" ::"n"(LAG) : "memory");
        asm volatile("fence.proxy.async;" ::: "memory");
        arrive(there + 8 * ((slot + STAGES - LAG) % STAGES));
      }
      count++;
      if (++slot == STAGES) { slot = 0; phase ^= 1; }
      if (++chunk == chunks) { chunk = 0; tile++; }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    asm volatile("fence.proxy.async;" ::: "memory");
    for (int i = min(count, LAG); i > 0; i--) arrive(there + 8 * ((slot + STAGES - i) % STAGES));
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");

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

  const unsigned long long base = 1ull << 62 | 64ull << 32 | 1ull << 16;
  uint2 word[2 * G];
  u32 scale[2 * G];
  u32 a[2][2][4];
  auto read_codes = [&](int slot) {
    const u8 *const from = stages + slot * STAGE + X_BYTES;
#pragma unroll
    for (int i = 0; i < 2 * G; i++)
      word[i] = *(const uint2 *)(from + place(along * 16 * G + output(i, r), c / 2) + c % 2 * 8);
#pragma unroll
    for (int i = 0; i < 2 * G; i += 4)
      *(uint4 *)(scale + i) = *(const uint4 *)(from + W_BYTES + (along * 16 * G + output(i, r)) * 4);
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
  auto start = [&](int half, int here, int g, u32(&from)[2][4]) {
    const unsigned long long desc = base | (u32)((shared_at + group * (STAGES * STAGE) + here * STAGE) >> 4) + 4 * half;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    wgmma(sum[g], from[0], desc);
    wgmma(sum[g], from[1], desc + 2);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };

  auto finish = [&](bool is_last) {
    float *const flat = &sum[0][0][0];
    float *const gap = (float *)(shared + 128 + lane * 4) + along * BATCH * 64;
#pragma unroll
    for (int other = 1; other < KG; other++)  // the groups' sums, in the groups' order
#pragma unroll
      for (int first = 0; first < SUMS; first += BATCH) {
        asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
        if (group == other)
#pragma unroll
          for (int i = 0; i < BATCH; i++) gap[i * 64] = flat[first + i];
        asm volatile("bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
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

  u32 slot = 0, phase = 0;
  while (at < end) {
    const int count = min(chunks - chunk, end - at);
    begin();
    for (int i = 0; i < count; i++) {
      await(there + 8 * slot, phase);
      read_codes(slot);
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int g = 0; g < G; g++) {
          decode(half, g, a[g % 2]);
          start(half, slot, g, a[g % 2]);
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (lane == 0) arrive(was_read + 8 * slot);
      if (++slot == STAGES) { slot = 0; phase ^= 1; }
    }
    at += count;
    chunk += count;
    const bool is_last = chunk == chunks;
    finish(is_last);
    if (is_last) { chunk = 0; tile++; }
  }
}
