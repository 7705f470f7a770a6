// Attention of a few query tokens a row over keys and values that lie in pages, on the CPU.
//
//   out[t, h] = Σ_k softmax_k(cap(scale · q[t, h] · key[k, h'])) · value[k, h']        h' = h / (H / H')
//
// over the keys k that token t sees: those up to its own position, the last `window` of them. Key k of a row is at slot
// page_table[k / page_size] · page_size + k % page_size. Nothing else of a page is read, so what an earlier owner left
// there cannot get in. Called by csrc/binding.
// Source: PagedAttention, arXiv 2309.06180, section 4.1.
#pragma once

#include <cstdint>

#include "core/scalar.h"

namespace mote {

// One request's part of a flat batch.
struct PagedRow {
  int64_t table;  // its row of page_tables
  int64_t begin;  // its first query token
  int64_t count;  // query tokens; the last one is its last key
  int64_t length;
};

struct PagedAttentionParams {
  const float* queries;  // [T, H, D], unit stride along D
  int64_t query_token_stride;
  int64_t query_head_stride;
  const void* keys;            // [slots, H', D] dtype, contiguous
  const void* values;          // [slots, H', D'] dtype, contiguous
  const int32_t* page_tables;  // [·, table_width]
  const PagedRow* rows;        // [num_rows]
  float* out;                  // [T, H, D'], contiguous
  int64_t table_width;
  int64_t num_rows;
  int64_t num_heads;      // H
  int64_t num_key_heads;  // H'
  int64_t key_size;       // D
  int64_t value_size;     // D'
  int64_t page_size;
  int64_t window;  // 0: none
  float scale;
  float softcap;  // cap(s) = softcap · tanh(s / softcap); 0: none
  DType dtype;    // of keys and values: kF32, kF16 or kBF16
};

void paged_attention(const PagedAttentionParams& params);

struct KeyHeads {
  int64_t begin;
  int64_t end;
};

// One query token of one row and the query heads of some key heads; for each instruction set.
using PagedToken = void (*)(const PagedAttentionParams&, const PagedRow&, int64_t token, KeyHeads key_heads);

namespace baseline {
PagedToken paged_token(DType dtype);
}
namespace avx2 {
PagedToken paged_token(DType dtype);
}
namespace avx512 {
PagedToken paged_token(DType dtype);
}
namespace avx512_bf16 {
PagedToken paged_token(DType dtype);
}

}  // namespace mote
