// Stacks that can be left and entered again, all on one system thread: what simt.cpp makes the threads of a block of.
//
// A switch is a dozen instructions on x86-64 Linux and swapcontext() elsewhere, or where MOTE_SIMT_UCONTEXT asks for
// it. AddressSanitizer is told of each switch, or it would take a fiber's stack for a wild pointer. A fiber that is
// left for good is not unwound; its stack is simply used again.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if !defined(__x86_64__) || !defined(__linux__)
#define MOTE_SIMT_UCONTEXT
#endif
#ifdef MOTE_SIMT_UCONTEXT
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#define MOTE_SIMT_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOTE_SIMT_ASAN
#endif
#endif
#ifdef MOTE_SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define MOTE_SIMT_NO_ASAN __attribute__((no_sanitize_address))
#else
#define MOTE_SIMT_NO_ASAN
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)0)
#endif

#ifndef MOTE_SIMT_UCONTEXT
// Pushes what a callee must keep, exchanges the stack pointers, and returns on the other stack.
extern "C" void mote_simt_exchange_stacks(void** left, void* entered);
asm(R"(
  .text
  .p2align 4
  .type mote_simt_exchange_stacks, @function
mote_simt_exchange_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mote_simt_exchange_stacks, . - mote_simt_exchange_stacks
)");
#endif

namespace mote::simt {

class Fiber {
 public:
  // The stack that is running already: where the others are entered from.
  Fiber() = default;

  explicit Fiber(size_t stack_bytes) : stack_bytes_(stack_bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mapping_ = memory;
    mapping_bytes_ = page + stack_bytes;
    mprotect(memory, page, PROT_NONE);  // overflowing is a fault, not a neighbour's wrong result
    stack_ = static_cast<unsigned char*>(memory) + page;
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  ~Fiber() {
    if (mapping_ != nullptr) munmap(mapping_, mapping_bytes_);
  }

  // The next switch to this fiber begins `body`, which calls arrived() first and never returns.
  void start(void (*body)()) {
    if (left_midway_) ASAN_UNPOISON_MEMORY_REGION(stack_, stack_bytes_);  // the frames that were never returned from
    left_midway_ = true;
    asan_fake_stack_ = nullptr;
#ifdef MOTE_SIMT_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = stack_bytes_;
    context_.uc_link = nullptr;
    makecontext(&context_, body, 0);
#else
    // As if `body` had been called: six kept registers, its address to return to, and no caller.
    void** top = reinterpret_cast<void**>(stack_ + stack_bytes_);
    top[-1] = nullptr;
    top[-2] = reinterpret_cast<void*>(body);
    for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
    stack_pointer_ = top - 8;
#endif
  }

  void switch_to(Fiber& next) { leave_to(next, &asan_fake_stack_); }

  // NOTE: not marked by AddressSanitizer, like every frame that is on the stack now: it would stay so for the next use.
  MOTE_SIMT_NO_ASAN void switch_for_good(Fiber& next) {
    left_midway_ = false;
    leave_to(next, nullptr);
  }

  // On the stack that was entered.
  void arrived() {
#ifdef MOTE_SIMT_ASAN
    const void* bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(asan_fake_stack_, &bottom, &bytes);
    if (left_->stack_ == nullptr) left_->borrow_stack(bottom, bytes);
#endif
  }

 private:
  MOTE_SIMT_NO_ASAN void leave_to(Fiber& next, [[maybe_unused]] void** fake_stack) {
    left_ = this;
#ifdef MOTE_SIMT_ASAN
    __sanitizer_start_switch_fiber(fake_stack, next.stack_, next.stack_bytes_);
#endif
#ifdef MOTE_SIMT_UCONTEXT
    swapcontext(&context_, &next.context_);
#else
    mote_simt_exchange_stacks(&stack_pointer_, next.stack_pointer_);
#endif
    arrived();
  }

  // Only AddressSanitizer knows where the stack lies that everything started on.
  void borrow_stack(const void* bottom, size_t bytes) {
    stack_ = static_cast<unsigned char*>(const_cast<void*>(bottom));
    stack_bytes_ = bytes;
  }

  static inline Fiber* left_ = nullptr;

  void* mapping_ = nullptr;
  size_t mapping_bytes_ = 0;
  unsigned char* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* asan_fake_stack_ = nullptr;
  bool left_midway_ = false;
#ifdef MOTE_SIMT_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace mote::simt
