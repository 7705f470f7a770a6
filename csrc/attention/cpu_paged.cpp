// The arithmetic of paged attention on the CPU, for one instruction set (core/cpu_isa.h says which).
//
// Two passes over the pages of a token, each read in the order it lies in memory, all key heads of a page in turn:
// scores, then values weighted by their softmax. Query heads that share a key head are computed together, so that a key
// is loaded once. Sums are float, those over values cut at pages. The bits of a token depend on its own keys alone, not
// on the batch around it. Called by paged_cpu.cpp.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention/paged.h"
#include "core/cpu_dot.h"
#include "core/math.h"

namespace mote::MOTE_CPU_ISA {
namespace {

constexpr int kHeads = 4;  // query heads whose values are summed together, at most

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

// totals[head] += Σ_i weights[head][i] · values[i] over the columns of some registers; load reads one of them.
template <int kNumHeads, int kNumVectors, typename Scalar, typename Load>
void add_columns(const Scalar* values, int64_t stride, int64_t count, const float* weights, int64_t weights_stride,
                 float* totals, int64_t totals_stride, const Load& load_column) {
  Vector<float> sums[kNumHeads][kNumVectors] = {};
  for (int64_t i = 0; i < count; ++i, values += stride) {
    Vector<float> columns[kNumVectors];
#pragma GCC unroll 8
    for (int column = 0; column < kNumVectors; ++column) columns[column] = load_column(values + column * kLanes<float>);
#pragma GCC unroll 4
    for (int head = 0; head < kNumHeads; ++head) {
      const float weight = weights[head * weights_stride + i];
#pragma GCC unroll 8
      for (int column = 0; column < kNumVectors; ++column) sums[head][column] += weight * columns[column];
    }
  }
#pragma GCC unroll 4
  for (int head = 0; head < kNumHeads; ++head) {
#pragma GCC unroll 8
    for (int column = 0; column < kNumVectors; ++column) {
      float* const total = totals + head * totals_stride + column * kLanes<float>;
      store(total, load(total) + sums[head][column]);
    }
  }
}

// The same over `size` columns.
template <int kNumHeads, typename Scalar>
void add_values(const Scalar* values, int64_t stride, int64_t count, int64_t size, const float* weights,
                int64_t weights_stride, float* totals, int64_t totals_stride) {
  constexpr int lanes = kLanes<float>, kNumVectors = value_vectors(kNumHeads);
  int64_t at = 0;
  for (; at + kNumVectors * lanes <= size; at += kNumVectors * lanes) {
    add_columns<kNumHeads, kNumVectors>(values + at, stride, count, weights, weights_stride, totals + at, totals_stride,
                                        [](const Scalar* from) { return load(from); });
  }
  for (; at < size; at += lanes) {
    add_columns<kNumHeads, 1>(values + at, stride, count, weights, weights_stride, totals + at, totals_stride,
                              [&](const Scalar* from) { return load_first(from, size - at); });
  }
}

Keys visible_keys(const PagedAttentionParams& params, const PagedRow& row, int64_t token) {
  const int64_t end = row.length - row.count + token - row.begin + 1;
  const int64_t first = params.window > 0 && end > params.window ? end - params.window : 0;
  return {params.page_tables + row.table * params.table_width, params.page_size, first, end - first};
}

// One token, and the query heads of some key heads; `head` counts from the first of them.
template <typename Scalar>
struct TokenHeads {
  TokenHeads(const PagedAttentionParams& params, const PagedRow& row, int64_t token, KeyHeads key_heads)
      : params(params),
        key_heads(key_heads),
        share(params.num_heads / params.num_key_heads),
        num_heads((key_heads.end - key_heads.begin) * share),
        keys(visible_keys(params, row, token)),
        query_stride(round_up<int64_t>(params.key_size, kLanes<float>)),
        total_stride(round_up<int64_t>(params.value_size, kLanes<float>)),
        queries(num_heads * query_stride),
        scores(num_heads * keys.count),
        totals(num_heads * total_stride) {
    const int64_t first_head = key_heads.begin * share;
    const float* query = params.queries + token * params.query_token_stride + first_head * params.query_head_stride;
    for (int64_t head = 0; head < num_heads; ++head)
      widen(query + head * params.query_head_stride, params.key_size, queries + head * query_stride);
    std::fill_n(+scores, num_heads * keys.count, 0.0f);
    std::fill_n(+totals, num_heads * total_stride, 0.0f);
  }

  // function(place among the keys, how many, first key or value, its first head), page by page.
  template <typename Function>
  void for_each_piece(const void* cached, int64_t size, const Function& function) {
    const int64_t stride = params.num_key_heads * size;
    for_each_page(keys, [&](int64_t place, int64_t count, int64_t slot) {
      const Scalar* const page = static_cast<const Scalar*>(cached) + slot * stride;
      for (int64_t i = key_heads.begin; i < key_heads.end; ++i)
        function(place, count, page + i * size, (i - key_heads.begin) * share);
    });
  }

  const PagedAttentionParams& params;
  const KeyHeads key_heads;
  const int64_t share;  // query heads of one key head
  const int64_t num_heads;
  const Keys keys;
  const int64_t query_stride;
  const int64_t total_stride;
  Scratch<float> queries;  // [num_heads, query_stride], padded with zeros
  Scratch<float> scores;   // [num_heads, keys.count]
  Scratch<float> totals;   // [num_heads, total_stride]
};

template <typename Scalar>
void score_keys(TokenHeads<Scalar>& token) {
  const int64_t size = token.params.key_size, stride = token.params.num_key_heads * size;
  token.for_each_piece(token.params.keys, size, [&](int64_t place, int64_t count, const Scalar* keys, int64_t head) {
    for (int64_t at = 0; at < size; at += kDotBlock) {
      const float* queries = token.queries + head * token.query_stride + at;
      dot_block([&](int64_t i) { return queries + i * token.query_stride; }, token.share, keys + at, stride, count,
                std::min(kDotBlock, size - at), token.scores + head * token.keys.count + place, token.keys.count);
    }
  });
}

template <typename Scalar>
void sum_values(TokenHeads<Scalar>& token) {
  const int64_t size = token.params.value_size, stride = token.params.num_key_heads * size;
  token.for_each_piece(
      token.params.values, size, [&](int64_t place, int64_t count, const Scalar* values, int64_t head) {
        for (int64_t done = 0; done < token.share; done += kHeads) {
          with_constant<kHeads>(token.share - done, [&](auto heads) {
            add_values<heads.value>(values, stride, count, size,
                                    token.scores + (head + done) * token.keys.count + place, token.keys.count,
                                    token.totals + (head + done) * token.total_stride, token.total_stride);
          });
        }
      });
}

template <typename Scalar>
void attend_token(const PagedAttentionParams& params, const PagedRow& row, int64_t place, KeyHeads key_heads) {
  TokenHeads<Scalar> token(params, row, place, key_heads);
  score_keys(token);
  Scratch<float> divisors(token.num_heads);
  for (int64_t head = 0; head < token.num_heads; ++head)
    divisors[head] = soften(params, token.scores + head * token.keys.count, token.keys.count);
  sum_values(token);
  float* const out = params.out + (place * params.num_heads + key_heads.begin * token.share) * params.value_size;
  for (int64_t head = 0; head < token.num_heads; ++head) {
    for (int64_t at = 0; at < params.value_size; at += kLanes<float>) {
      const Vector<float> value = load(token.totals + head * token.total_stride + at) / divisors[head];
      store_first(out + head * params.value_size + at, value, params.value_size - at);
    }
  }
}

}  // namespace

PagedToken paged_token(DType dtype) {
  if (dtype == DType::kF16) return attend_token<f16>;
  if (dtype == DType::kBF16) return attend_token<bf16>;
  return attend_token<float>;
}

}  // namespace mote::MOTE_CPU_ISA
