// y[m][n] = sum over k of x[m][k] * W[n][k], W in NF4, for compute capability 9.0 alone: its tensor cores multiply 64
// outputs by all rows of x over 16 columns at once (wgmma), while the warps that started them decode the next weights.
//
// W is the first operand, decoded straight into registers. Of 128 columns a lane takes 16 neighbouring bytes of codes, 32
// columns, of 2 MG outputs, two bytes for each 16 columns that are multiplied; the order of the columns of x matches that
// (nf4.to_pieces). A byte, two codes, is looked up in shared memory, where each of the 32 lanes has a table of its own, in
// its own bank. x is the second operand, read by the tensor cores from shared memory, which it enters as it lies: a
// chunk of 128 columns, all rows, is one copy. Codes enter by a tensor map (TMA), 64 bytes of TILE outputs: the lanes'
// first outputs, then their second ones and so on, so that lanes that read at once find them in different banks.
//
// One block a multiprocessor takes an even share of all (tile of outputs, chunk of columns), in order. Where a tile is
// shared, each block writes a part, fp32, which whoever reads the product adds in the parts' order: the same bytes each
// time. A block is WG times four warps that multiply, MG times 64 outputs for each four, and four of which one lane
// copies, up to STAGES chunks ahead: a barrier a stage says when it is there, another when it was read.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;
constexpr int WORKERS = 128 * WG, THREADS = WORKERS + 128, TILE = 64 * MG * WG, ROWS = 8 * MT, EACH = 2 * MG;
constexpr int W_BYTES = TILE * 64, X_BYTES = ROWS * 256, S_BYTES = TILE * 8, STAGE = W_BYTES + X_BYTES + S_BYTES;
constexpr int ENTRY = 256, TABLE = 256 * ENTRY;  // an entry takes 128 bytes; 256 make its address one permutation
constexpr int FEWER = WG == 2 ? 40 : 32, MORE = WG == 2 ? 232 : WG == 3 ? 160 : 112;  // registers of copiers and workers
static_assert(MG <= 2 && 2 <= WG && WG <= 4, "a lane stores two or four outputs at once, and registers are dealt out");

struct __align__(64) Map { u8 bytes[128]; };

__device__ __forceinline__ void expect(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_with(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await(u32 barrier, u32 phase) {
  asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra again;}"
               ::"r"(barrier), "r"(phase) : "memory");
}
__device__ __forceinline__ void copy(u32 to, const void *from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
constexpr u64 ONCE = 0x12F0000000000000;  // the L2 policy for what is read once: it goes first
__device__ __forceinline__ void copy_once(u32 to, const void *from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(ONCE) : "memory");
}
__device__ __forceinline__ void copy_codes(u32 to, const Map *map, int byte, int n, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%2, %3, %4}], [%5], %6;"
               ::"r"(to), "l"(map), "r"(byte), "r"(n / EACH), "r"(0), "r"(barrier), "l"(ONCE) : "memory");
}
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Two codes, as found at `at` in the table, times the scale's two parts: only the product is rounded.
__device__ __forceinline__ u32 decoded(u32 at, u32 high, u32 low) {
  u32 made;
  asm("{.reg .b32 codes, part;\n"
      "ld.shared.b32 codes, [%1 + " BASE "];\n"
      "mul.rn." KIND "x2 part, codes, %3;\n"
      "fma.rn." KIND "x2 %0, codes, %2, part;}" : "=r"(made) : "r"(at), "r"(high), "r"(low));
  return made;
}
__device__ __forceinline__ u32 rounded(float low, float high) {
  u32 made;
  asm("cvt.rn." KIND "x2.f32 %0, %1, %2;" : "=r"(made) : "f"(high), "f"(low));
  return made;
}
// A code's number, from constants: a load would delay each launch.
__device__ __forceinline__ u32 number(u32 code) {
  constexpr u64 bits[16] = {CODE_BITS};
  constexpr u64 a = bits[0] | bits[1] << 16 | bits[2] << 32 | bits[3] << 48;
  constexpr u64 b = bits[4] | bits[5] << 16 | bits[6] << 32 | bits[7] << 48;
  constexpr u64 c = bits[8] | bits[9] << 16 | bits[10] << 32 | bits[11] << 48;
  constexpr u64 d = bits[12] | bits[13] << 16 | bits[14] << 32 | bits[15] << 48;
  return (u32)((code < 8 ? code < 4 ? a : b : code < 12 ? c : d) >> code % 4 * 16) & 0xffff;
}

// `map`: of the codes (N, K / 2), as (EACH, N / EACH, K / 2). `scales` (K / 64, N): high and low part; `xa` (rows, R), `b`
// (N, R): a LoRA's, R a multiple of 16. N is one of 4, K of 128. `out`: (parts, rows, N) in fp32, or (rows, N) in the
// weights' kind if `parts` is 1.
extern "C" __global__ void __launch_bounds__(THREADS, 1) product(
    const __grid_constant__ Map map, const u8 *__restrict__ x, const u32 *__restrict__ scales, const u8 *__restrict__ xa,
    const u8 *__restrict__ b, void *__restrict__ out, int rows, int N, int K, int xa_row, int R, int parts) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(~0u, thread / 32, 0), c = lane % 4, r = lane / 4;
  const u32 stages = (u32)__cvta_generic_to_shared(shared) + TABLE;
  const u32 there = stages + STAGES * STAGE, was_read = there + 8 * STAGES;  // barriers of each stage
  const u32 chunks = K / 128, all = (N + TILE - 1) / TILE * chunks, blocks = gridDim.x;
  u32 at = all * blockIdx.x / blocks;  // all * blocks is below 2^31
  const u32 end = all * (blockIdx.x + 1) / blocks, ahead = min(end - at, (u32)STAGES);
  u32 tile = at / chunks, chunk = at % chunks;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // What the lane that copies does. It takes the weights of the first chunks before the launch before this one has ended.
  auto copy_weights = [&](u32 slot, u32 tile, u32 chunk) {
    const u32 to = stages + slot * STAGE, barrier = there + 8 * slot, n = tile * TILE, count = min(TILE, N - n);
    arrive_with(barrier, W_BYTES + 8 * count + 256 * rows);
    copy_codes(to, &map, chunk * 64, n, barrier);
    for (int i = 0; i < 2; i++)
      copy_once(to + W_BYTES + X_BYTES + i * TILE * 4, scales + (u64)(2 * chunk + i) * N + n, 4 * count, barrier);
  };
  auto copy_x = [&](u32 slot, u32 chunk) {
    copy(stages + slot * STAGE + W_BYTES, x + (u64)chunk * rows * 256, rows * 256, there + 8 * slot);
  };
  auto step = [&](u32 &tile, u32 &chunk) {
    if (++chunk == chunks) {
      chunk = 0;
      tile++;
    }
  };
  u32 next_tile = tile, next_chunk = chunk;
  const bool copies = thread == WORKERS;
  if (copies) {
    for (int slot = 0; slot < STAGES; slot++) {
      expect(there + 8 * slot, 1);
      expect(was_read + 8 * slot, 4 * WG);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    for (u32 slot = 0; slot < ahead; slot++) {
      copy_weights(slot, next_tile, next_chunk);
      step(next_tile, next_chunk);
    }
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 x_tile = tile, x_chunk = chunk;
    for (u32 slot = 0; slot < ahead; slot++) {
      copy_x(slot, x_chunk);
      step(x_tile, x_chunk);
    }
  }
  __syncwarp();
  for (int byte = thread; byte < 256 && warp < 4 * WG; byte += WORKERS) {  // a byte's first code is its high half
    const u32 two = number(byte / 16) | number(byte % 16) << 16;
#pragma unroll
    for (int i = 0; i < 8; i++) *(uint4 *)(shared + byte * ENTRY + (i + lane) % 8 * 16) = make_uint4(two, two, two, two);
  }
  __syncthreads();

  if (warp >= 4 * WG) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(FEWER));
    u32 slot = 0, phase = 0;
    for (u32 next = at + ahead; copies && next < end; next++) {
      await(was_read + 8 * slot, phase);
      copy_weights(slot, next_tile, next_chunk);
      copy_x(slot, next_chunk);
      step(next_tile, next_chunk);
      if (++slot == STAGES) { slot = 0; phase ^= 1; }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MORE));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const int first = warp * 16 * MG + EACH * r;  // a lane's first output in the tile; the others follow it
    float sum[MG][MT][4];
    auto begin = [&] {
#pragma unroll
      for (int g = 0; g < MG; g++)
#pragma unroll
        for (int t = 0; t < MT; t++)
#pragma unroll
          for (int e = 0; e < 4; e++) sum[g][t][e] = 0;
      for (int i = c; i < EACH && chunk == 0 && R; i += 4)  // what add_lora will read
        asm volatile("prefetch.global.L2 [%0];" ::"l"(b + (u64)min((int)tile * TILE + first + i, N - 1) * R * 2));
    };
    auto add_lora = [&] {
      for (int rank = 2 * c; rank < R; rank += 16) {
        u32 a[MG][4];
#pragma unroll
        for (int g = 0; g < MG; g++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            const int n = min((int)tile * TILE + first + 2 * g + e % 2, N - 1);
            a[g][e] = *(const u32 *)(b + ((u64)n * R + rank + e / 2 * 8) * 2);
          }
#pragma unroll
        for (int t = 0; t < MT; t++) {
          const int m = min(8 * t + r, rows - 1);
          const u32 b0 = *(const u32 *)(xa + ((u64)m * xa_row + rank) * 2);
          const u32 b1 = *(const u32 *)(xa + ((u64)m * xa_row + rank + 8) * 2);
#pragma unroll
          for (int g = 0; g < MG; g++) mma(sum[g][t], a[g], b0, b1);
        }
      }
    };
    auto store = [&](bool is_last) {
      const u32 owner = ((tile * chunks + 1) * blocks - 1) / all;  // of the tile's first chunk
      const int part = blockIdx.x - owner, n = tile * TILE + first;
      if (n >= N) return;
#pragma unroll
      for (int t = 0; t < MT; t++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int m = 8 * t + 2 * c + e;
          if (m >= rows) continue;
          const float *const p = sum[0][t] + e, *const q = sum[MG - 1][t] + e;
          const u64 to = ((u64)part * rows + m) * N + n;
          if (parts == 1) {
            if (MG == 2) *(uint2 *)((u16 *)out + to) = make_uint2(rounded(p[0], p[2]), rounded(q[0], q[2]));
            else *(u32 *)((u16 *)out + to) = rounded(p[0], p[2]);
          } else {
            if (MG == 2) *(float4 *)((float *)out + to) = make_float4(p[0], p[2], q[0], q[2]);
            else *(float2 *)((float *)out + to) = make_float2(p[0], p[2]);
          }
        }
      for (int empty = part + 1; is_last && empty < parts; empty++)  // parts that this tile has not
        for (int m = c; m < rows; m += 4)
          for (int i = 0; i < EACH; i += 2)
            *(float2 *)((float *)out + ((u64)empty * rows + m) * N + n + i) = make_float2(0, 0);
    };
    // Decodes and multiplies a chunk. Up to four steps of 16 columns are multiplied while the next four are decoded.
    auto multiply = [&](u32 slot, auto before_is_read) {
      const u8 *const from = shared + TABLE + slot * STAGE;
      // where x lies, and how far apart eights of columns; eights of rows are 128 bytes apart (the upper half)
      const u32 x_at = (stages + slot * STAGE + W_BYTES) >> 4 | rows << 16;
      const u32 *const scale = (const u32 *)(from + W_BYTES + X_BYTES) + c / 2 * TILE + first;
#pragma unroll
      for (int g = 0; g < MG; g++) {
        u32 word[2][4], high[2], low[2];
        const uint2 two = *(const uint2 *)(scale + 2 * g);
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 w = *(const uint4 *)(from + ((2 * g + h) * (TILE / EACH) + warp * 8 + r) * 64 + c * 16);
          word[h][0] = w.x; word[h][1] = w.y; word[h][2] = w.z; word[h][3] = w.w;
          high[h] = __byte_perm(h ? two.y : two.x, 0, 0x1010);
          low[h] = __byte_perm(h ? two.y : two.x, 0, 0x3232);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
          u32 a[4][4];
#pragma unroll
          for (int s = 0; s < 4; s++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int h = e % 2, byte = 8 * half + 2 * s + e / 2;
              a[s][e] = decoded(__byte_perm(word[h][byte / 4], lane * 4, 0x5504 | byte % 4 << 4), high[h], low[h]);
            }
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int s = 0; s < 4; s++) wgmma(sum[g], a[s], x_at + (4 * half + s) * 2 * rows);
          asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;" ::: "memory");
          if (g == 0 && half == 0) before_is_read();
        }
      }
    };

    u32 slot = 0, phase = 0, before = STAGES;
    while (at < end) {
      const u32 count = min(chunks - chunk, end - at);
      begin();
      u32 i = 0;
#pragma unroll 1
      do {
        await(there + 8 * slot, phase);
        multiply(slot, [&] { if (before < STAGES && lane == 0) arrive(was_read + 8 * before); });
        before = slot;
        if (++slot == STAGES) { slot = 0; phase ^= 1; }
      } while (++i < count);
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
      if (chunk == 0) add_lora();
      at += count;
      chunk += count;
      const bool is_last = chunk == chunks;
      store(is_last);
      if (is_last) { chunk = 0; tile++; }
    }
  }
}
