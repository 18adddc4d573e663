// Rates of placed and final orders, counted from events since this page was opened.

import { onChange } from './live.js';

const BUCKET_MS = 5_000;
const BUCKETS = 60;
const COUNTED_MAX = 20_000;

const buckets = new Map();
/// Counts each change once: own changes arrive twice, and events may be repeated.
const countedAlready = new Set();

export function count() {
  onChange(({ order_id: id, status, at }) => {
    const what = `${id} ${status === 'NEW' ? 'begun' : 'ended'}`;
    if (countedAlready.has(what)) return;
    countedAlready.add(what);
    if (countedAlready.size > COUNTED_MAX) countedAlready.delete(countedAlready.values().next().value);
    const bucket = Math.floor(Date.parse(at) / BUCKET_MS);
    const counted = buckets.get(bucket) ?? { NEW: 0, FINISHED: 0, CANCELLED: 0 };
    counted[status] += 1;
    buckets.set(bucket, counted);
    for (const old of buckets.keys()) if (old < bucket - BUCKETS) buckets.delete(old);
  });
}

/// Rates per second, oldest first, without the bucket that is still being filled.
export function rates(status) {
  const newest = Math.floor(Date.now() / BUCKET_MS) - 1;
  return Array.from({ length: BUCKETS }, (_, index) => (1000 * (buckets.get(newest - BUCKETS + 1 + index)?.[status] ?? 0)) / BUCKET_MS);
}
