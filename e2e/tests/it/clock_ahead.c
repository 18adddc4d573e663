/* Preloaded into a service: shifts its clock by CLOCK_SHIFT_SECONDS. Timers are not shifted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    static long shift;
    if (!real) {
        const char *seconds = getenv("CLOCK_SHIFT_SECONDS");
        shift = seconds ? atol(seconds) : 0;
        real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    }
    int result = real(clock, now);
    if (result == 0 && clock == CLOCK_REALTIME)
        now->tv_sec += shift;
    return result;
}
