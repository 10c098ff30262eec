// Preloaded, makes an Intel CPU under Linux tell the process that it is a Haswell: AVX2, no AVX-512, no AMX.
//
// The kernel lets a process make CPUID fault (flag cpuid_fault in /proc/cpuinfo). The handler executes the
// instruction, takes from its answer what a Haswell lacks, and goes on behind it. Every library that asks the CPU is
// told the same, those of PyTorch and LLVM too; instructions that nobody asks about are not hindered. Of the processes
// that inherit it only Python is told so: compilers put a handler of their own in the place of ours.
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kArchSetCpuid = 0x1012 };

// Raw: the handler may run where errno is in use.
static long allow_cpuid(unsigned long allowed) {
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "0"(SYS_arch_prctl), "D"(kArchSetCpuid), "S"(allowed)
                   : "rcx", "r11", "memory");
  return result;
}

static void as_haswell(unsigned leaf, unsigned subleaf, unsigned *a, unsigned *b, unsigned *c, unsigned *d) {
  const unsigned fsgsbase = 1u << 0, bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8, erms = 1u << 9;
  if (leaf == 0 && *a > 0xd) *a = 0xd;
  if (leaf == 1) *a = 0x306c3;
  if (leaf == 7) {
    *a = *c = *d = 0;
    *b &= subleaf ? 0 : fsgsbase | bmi1 | avx2 | bmi2 | erms;
  }
  if (leaf > 0xd && leaf < 0x40000000) *a = *b = *c = *d = 0;
}

static void on_fault(int number, siginfo_t *info, void *context) {
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)registers[REG_RIP];
  if (info->si_code != SI_KERNEL || code[0] != 0x0f || code[1] != 0xa2) {
    signal(number, SIG_DFL); // a fault of the program's own, which it meets again
    return;
  }
  unsigned leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
  allow_cpuid(1);
  __cpuid_count(leaf, subleaf, a, b, c, d);
  allow_cpuid(0);
  as_haswell(leaf, subleaf, &a, &b, &c, &d);
  registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor(101))) static void begin(void) {
  if (strncmp(program_invocation_short_name, "python", 6) != 0) return;
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
  if (sigaction(SIGSEGV, &action, NULL) != 0 || allow_cpuid(0) != 0) {
    fprintf(stderr, "error: this CPU or kernel cannot make CPUID fault; run on an Intel CPU with cpuid_fault.\n");
    _exit(2);
  }
}
