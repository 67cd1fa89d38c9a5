/* SPDX-License-Identifier: Apache-2.0 */
/* latency: how long one request takes, beside the least that this machine allows. */
#ifndef VIOMMU_BENCH_LATENCY_H
#define VIOMMU_BENCH_LATENCY_H

double monotonic_ns(void);

/* Measures and prints {"asleep", "eventfd_floor", "spinning", "spin_floor"}, medians in microseconds. 0, or 1. */
int run_latency(void);

#endif
