// The arithmetic of paged attention on the CPU, for one instruction set (core/cpu_isa.h says which).
//
// Two passes over the keys of a token: scores, then values weighted by their softmax. Query heads that share a key head
// are computed together, so that a key is loaded once. Sums are float, those over values cut at pages. The bits of a
// token depend on its own keys alone, not on the batch around it. Called by paged_cpu.cpp.
#include <cmath>
#include <cstdint>

#include "attention/paged.h"
#include "core/cpu_vector.h"

namespace mote::MOTE_CPU_ISA {
namespace {

constexpr int kHeads = 4;  // query heads computed together, at most

// Registers across the values of one token: with the sums of all heads they leave room for what is loaded.
constexpr int value_vectors(int heads) { return heads == 1 ? 8 : heads == 4 ? 2 : 4; }

// The keys one token sees: `count` of them from `first` on.
struct Keys {
  const int32_t* table;
  int64_t page_size;
  int64_t first;
  int64_t count;
};

// function(place among the keys, how many, slot of the first) for every page.
template <typename Function>
void for_each_page(const Keys& keys, const Function& function) {
  for (int64_t done = 0; done < keys.count;) {
    const int64_t key = keys.first + done, within = key % keys.page_size;
    const int64_t left = keys.count - done, room = keys.page_size - within;
    const int64_t count = left < room ? left : room;
    function(done, count, keys.table[key / keys.page_size] * keys.page_size + within);
    done += count;
  }
}

template <int kNumHeads, typename Scalar>
void score_page(const float* const (&queries)[kNumHeads], const Scalar* key, int64_t stride, int64_t count,
                int64_t size, float* scores, int64_t scores_stride) {
  for (int64_t i = 0; i < count; ++i, key += stride) {
    Vector<float> sums[kNumHeads] = {};
    for (int64_t at = 0; at < size; at += kLanes<float>) {
      const Vector<float> loaded = load_first(key + at, size - at);
#pragma GCC unroll 4
      for (int head = 0; head < kNumHeads; ++head) sums[head] += loaded * load_first(queries[head] + at, size - at);
    }
#pragma GCC unroll 4
    for (int head = 0; head < kNumHeads; ++head) scores[head * scores_stride + i] = sum_lanes<float>(sums[head]);
  }
}

// Scores become weights, not yet divided by their sum, which is returned.
float soften(const PagedAttentionParams& params, float* scores, int64_t count) {
  float largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    float score = scores[i] * params.scale;
    if (params.softcap != 0) score = params.softcap * std::tanh(score / params.softcap);
    scores[i] = score;
    largest = score > largest || std::isnan(score) ? score : largest;
  }
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - largest);
  return sum;
}

// kNumVectors of the values' columns from `values` on; `size` of them exist.
template <int kNumHeads, int kNumVectors, typename Scalar>
void sum_values(const Keys& keys, const Scalar* values, int64_t stride, int64_t size, const float* weights,
                int64_t weights_stride, const float (&divisors)[kNumHeads], float* out, int64_t out_stride) {
  Vector<float> totals[kNumHeads][kNumVectors] = {};
  for_each_page(keys, [&](int64_t place, int64_t count, int64_t slot) {
    Vector<float> sums[kNumHeads][kNumVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Scalar* const value = values + (slot + i) * stride;
#pragma GCC unroll 8
      for (int column = 0; column < kNumVectors; ++column) {
        const int64_t at = column * kLanes<float>;
        const Vector<float> loaded = load_first(value + at, size - at);
#pragma GCC unroll 4
        for (int head = 0; head < kNumHeads; ++head)
          sums[head][column] += weights[head * weights_stride + place + i] * loaded;
      }
    }
    for (int head = 0; head < kNumHeads; ++head)
      for (int column = 0; column < kNumVectors; ++column) totals[head][column] += sums[head][column];
  });
  for (int head = 0; head < kNumHeads; ++head) {
    for (int column = 0; column < kNumVectors; ++column) {
      const int64_t at = column * kLanes<float>;
      if (at < size) store_first(out + head * out_stride + at, totals[head][column] / divisors[head], size - at);
    }
  }
}

template <int kNumHeads, typename Scalar>
void attend_heads(const PagedAttentionParams& params, const Keys& keys, int64_t token, int64_t key_head, int64_t head,
                  float* scores) {
  const float* queries[kNumHeads];
  for (int i = 0; i < kNumHeads; ++i)
    queries[i] = params.queries + token * params.query_token_stride + (head + i) * params.query_head_stride;

  const int64_t key_stride = params.num_key_heads * params.key_size;
  const Scalar* const own_keys = static_cast<const Scalar*>(params.keys) + key_head * params.key_size;
  for_each_page(keys, [&](int64_t place, int64_t count, int64_t slot) {
    score_page<kNumHeads>(queries, own_keys + slot * key_stride, key_stride, count, params.key_size, scores + place,
                          keys.count);
  });
  float divisors[kNumHeads];
  for (int i = 0; i < kNumHeads; ++i) divisors[i] = soften(params, scores + i * keys.count, keys.count);

  constexpr int kNumVectors = value_vectors(kNumHeads);
  const int64_t value_stride = params.num_key_heads * params.value_size;
  const Scalar* const own_values = static_cast<const Scalar*>(params.values) + key_head * params.value_size;
  float* const out = params.out + (token * params.num_heads + head) * params.value_size;
  for (int64_t at = 0; at < params.value_size; at += kNumVectors * kLanes<float>) {
    sum_values<kNumHeads, kNumVectors>(keys, own_values + at, value_stride, params.value_size - at, scores, keys.count,
                                       divisors, out + at, params.value_size);
  }
}

template <typename Scalar>
void attend_token(const PagedAttentionParams& params, const PagedRow& row, int64_t token, int64_t key_head) {
  const int64_t end = row.length - row.count + token - row.begin + 1;
  const int64_t first = params.window > 0 && end > params.window ? end - params.window : 0;
  const Keys keys = {params.page_tables + row.table * params.table_width, params.page_size, first, end - first};
  Scratch<float> scores(kHeads * keys.count);
  const int64_t share = params.num_heads / params.num_key_heads;
  for (int64_t done = 0; done < share; done += kHeads) {
    with_constant<kHeads>(share - done, [&](auto heads) {
      attend_heads<heads.value, Scalar>(params, keys, token, key_head, key_head * share + done, scores);
    });
  }
}

}  // namespace

PagedToken paged_token(DType dtype) {
  if (dtype == DType::kF16) return attend_token<f16>;
  if (dtype == DType::kBF16) return attend_token<bf16>;
  return attend_token<float>;
}

}  // namespace mote::MOTE_CPU_ISA
