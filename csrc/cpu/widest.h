// Before a function with a hot loop: it is compiled for several widths of vectors, and the machine it runs on chooses.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CTM_FAST_WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CTM_FAST_WIDEST
#endif
