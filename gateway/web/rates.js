// How many orders come and end each second, counted from the events since this page was opened.

import { onChange } from './live.js';

const BUCKET_MS = 5_000;
const BUCKETS = 60;
const COUNTED_MAX = 20_000;

const buckets = new Map();
/// What this page does itself it learns twice, and events may come again.
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

/// Per second, oldest first. The bucket that is being filled is left out.
export function rates(status) {
  const newest = Math.floor(Date.now() / BUCKET_MS) - 1;
  return Array.from({ length: BUCKETS }, (_, place) => (1000 * (buckets.get(newest - BUCKETS + 1 + place)?.[status] ?? 0)) / BUCKET_MS);
}
