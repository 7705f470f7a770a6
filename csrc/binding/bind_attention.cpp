// The op of torch for paged attention on the CPU: checks, then csrc/attention. No gradient: it serves, it does not
// train.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "attention/paged.h"
#include "binding/checks.h"
#include "binding/gradients.h"

namespace mote {
namespace {

using at::Tensor;

constexpr const char* kCall = "paged_attention_";

void check_cpu(const char* name, const Tensor& tensor, at::ScalarType type, int64_t dim) {
  TORCH_CHECK_VALUE(tensor.is_cpu() && tensor.dim() == dim, kCall, ": ", name, " must have ", dim,
                    " dimensions and be on the CPU, got ", tensor.sizes(), " on ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == type, kCall, ": ", name, " must be ", type, ", got ", tensor.scalar_type());
}

void check_contiguous(const char* name, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.is_contiguous(), kCall, ": ", name, " must be contiguous, got strides ", tensor.strides());
}

void check_shapes(const Tensor& out, const Tensor& queries, const Tensor& keys, const Tensor& values) {
  check_cpu("queries", queries, at::kFloat, 3);
  check_cpu("out", out, at::kFloat, 3);
  check_contiguous("out", out);
  TORCH_CHECK_VALUE(queries.stride(2) == 1 || queries.size(2) <= 1, kCall,
                    ": queries must have unit stride at the end");
  const auto type = keys.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, kCall,
                   ": keys must be float32, float16 or bfloat16, got ", type);
  for (const auto& [name, cached] : {std::pair("keys", &keys), std::pair("values", &values)}) {
    check_cpu(name, *cached, type, 3);
    check_contiguous(name, *cached);
  }
  const int64_t num_heads = queries.size(1), num_key_heads = keys.size(1);
  TORCH_CHECK_VALUE(queries.size(2) == keys.size(2) && num_key_heads > 0 && num_heads % num_key_heads == 0 &&
                        values.size(0) == keys.size(0) && values.size(1) == num_key_heads,
                    kCall,
                    ": queries [T, H, D], keys [slots, H', D] and values [slots, H', D'] with H a multiple of H'",
                    " expected, got ", queries.sizes(), ", ", keys.sizes(), ", ", values.sizes());
  TORCH_CHECK_VALUE(out.size(0) == queries.size(0) && out.size(1) == num_heads && out.size(2) == values.size(2), kCall,
                    ": out must be ", "[T, H, D'], got ", out.sizes());
}

// Every row inside the batch, and every page of its keys inside the memory.
void check_rows(const Tensor& page_tables, const Tensor& rows, int64_t page_size, int64_t num_tokens,
                int64_t num_slots) {
  check_cpu("page_tables", page_tables, at::kInt, 2);
  check_cpu("rows", rows, at::kLong, 2);
  check_contiguous("page_tables", page_tables);
  check_contiguous("rows", rows);
  TORCH_CHECK_VALUE(rows.size(1) == 4 && page_size > 0, kCall, ": rows [·, 4] and a positive page_size expected, got ",
                    rows.sizes(), " and ", page_size);
  const auto* row = reinterpret_cast<const PagedRow*>(rows.const_data_ptr<int64_t>());
  for (int64_t i = 0; i < rows.size(0); ++i, ++row) {
    const bool in_batch = row->begin >= 0 && row->count > 0 && row->count <= num_tokens - row->begin;
    const bool in_table = row->table >= 0 && row->table < page_tables.size(0) && row->length >= row->count &&
                          row->length <= page_tables.size(1) * page_size;
    TORCH_CHECK_VALUE(in_batch && in_table, kCall, ": row ", i, " is not in the batch: table ", row->table,
                      ", first token ", row->begin, ", tokens ", row->count, ", keys ", row->length);
    const int32_t* const table = page_tables.const_data_ptr<int32_t>() + row->table * page_tables.size(1);
    for (int64_t place = 0; place * page_size < row->length; ++place)
      TORCH_CHECK_VALUE(table[place] >= 0 && (table[place] + int64_t{1}) * page_size <= num_slots, kCall, ": row ", i,
                        " has a page ", table[place], " that does not exist");
  }
}

void paged_attention_op(const Tensor& out, const Tensor& queries, const Tensor& keys, const Tensor& values,
                        const Tensor& page_tables, const Tensor& rows, int64_t page_size, double scale, int64_t window,
                        double softcap) {
  check_shapes(out, queries, keys, values);
  TORCH_CHECK_VALUE(window >= 0 && softcap >= 0, kCall, ": window and softcap must be at least 0 (none), got ", window,
                    " and ", softcap);
  refuse_gradients(kCall, {&queries, &keys, &values}, "torch's scaled_dot_product_attention");
  check_rows(page_tables, rows, page_size, queries.size(0), keys.size(0));
  if (out.numel() == 0) return;
  PagedAttentionParams params;
  params.queries = queries.const_data_ptr<float>();
  params.query_token_stride = queries.stride(0);
  params.query_head_stride = queries.stride(1);
  params.keys = keys.const_data_ptr();
  params.values = values.const_data_ptr();
  params.page_tables = page_tables.const_data_ptr<int32_t>();
  params.rows = reinterpret_cast<const PagedRow*>(rows.const_data_ptr<int64_t>());
  params.out = out.mutable_data_ptr<float>();
  params.table_width = page_tables.size(1);
  params.num_rows = rows.size(0);
  params.num_heads = queries.size(1);
  params.num_key_heads = keys.size(1);
  params.key_size = keys.size(2);
  params.value_size = values.size(2);
  params.page_size = page_size;
  params.window = window;
  params.scale = static_cast<float>(scale);
  params.softcap = static_cast<float>(softcap);
  params.dtype = dtype_of(keys.scalar_type());
  paged_attention(params);
}

}  // namespace
}  // namespace mote

TORCH_LIBRARY_FRAGMENT(mote_ext, m) {
  m.def(
      "paged_attention_(Tensor(a!) out, Tensor queries, Tensor keys, Tensor values, Tensor page_tables, Tensor rows, "
      "int page_size, float scale, int window, float softcap) -> ()");
}

TORCH_LIBRARY_IMPL(mote_ext, CPU, m) { m.impl("paged_attention_", &mote::paged_attention_op); }
