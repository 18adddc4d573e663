// How orders ended. What is final is final: whatever is read or told later about the time before, it stays.

const ENDS_MAX = 10_000;

const ends = new Map();

/// A change that was told.
export function note(change) {
  if (change.status === 'NEW') return;
  ends.set(change.order_id, { status: change.status, reason: change.reason, updated_at: change.at });
  if (ends.size > ENDS_MAX) ends.delete(ends.keys().next().value);
}

/// An order that was read, as far as it is known by now.
export function latest(order) {
  if (order.status !== 'NEW') {
    note({ order_id: order.id, status: order.status, reason: order.reason, at: order.updated_at });
    return order;
  }
  return { ...order, ...ends.get(order.id) };
}
