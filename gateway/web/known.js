// The newest known state of orders. Older data that arrives later never replaces a final state.

const ENDS_MAX = 10_000;

const ends = new Map();

/// Records a change from an event.
export function note(change) {
  if (change.status === 'NEW') return;
  ends.set(change.order_id, { status: change.status, reason: change.reason, updated_at: change.at });
  if (ends.size > ENDS_MAX) ends.delete(ends.keys().next().value);
}

/// The order with its newest known state.
export function latest(order) {
  if (order.status !== 'NEW') {
    note({ order_id: order.id, status: order.status, reason: order.reason, at: order.updated_at });
    return order;
  }
  return { ...order, ...ends.get(order.id) };
}
