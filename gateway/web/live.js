// Order events from the gateway. Each tab has one connection, because browsers allow few per host.
//
// A view that shows orders subscribes first and then reads. It reads again whenever `reloads`
// increases. So it misses no change, not even while disconnected. Repeated and late events have no
// effect: see known.js.

import { note } from './known.js';
import { store } from './store.js';

const RETRY_FIRST_MS = 1_000;
const RETRY_MAX_MS = 10_000;
/// A hidden tab closes its connection after this time: browsers allow six connections per host.
const HIDDEN_MAX_MS = 60_000;

/// `connecting`, `open` or `reconnecting`.
export const connection = store('connecting');

/// A counter that increases when all data must be read again.
export const reloads = store(0);

const listeners = new Set();
let lastEventId = '';
let retryMs = RETRY_FIRST_MS;
let source;
let timer;

/// Calls `listener` for each change of an order. Returns a function that unsubscribes.
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/// Notifies listeners of an order that this page has read or placed, as if it were an event.
export function noteOwnChange(order) {
  notify({ order_id: order.id, user_id: order.user_id, amount: order.amount, status: order.status, reason: order.reason, at: order.updated_at, order });
}

function notify(change) {
  note(change);
  for (const listener of [...listeners]) listener(change);
}

export function connect() {
  source = new EventSource('/v1/orders/events' + (lastEventId && `?last_event_id=${encodeURIComponent(lastEventId)}`));
  source.addEventListener('open', () => {
    retryMs = RETRY_FIRST_MS;
    connection.set('open');
    reloads.set(reloads.get() + 1);
  });
  source.addEventListener('order', (event) => {
    lastEventId = event.lastEventId;
    notify(JSON.parse(event.data));
  });
  source.addEventListener('reset', (event) => {
    lastEventId = event.lastEventId;
    reloads.set(reloads.get() + 1);
  });
  source.addEventListener('error', () => {
    connection.set('reconnecting');
    // If the answer is not an event stream, EventSource never reconnects by itself. Until there is
    // a connection, views read again at each attempt.
    if (source.readyState !== EventSource.CLOSED) return;
    timer = setTimeout(connect, retryMs);
    reloads.set(reloads.get() + 1);
    retryMs = Math.min(2 * retryMs, RETRY_MAX_MS);
  });
}

let hiddenTimer;

document.addEventListener('visibilitychange', () => {
  clearTimeout(hiddenTimer);
  if (document.hidden) hiddenTimer = setTimeout(disconnect, HIDDEN_MAX_MS);
  else if (!source) connect();
});

/// Disconnects until the tab is visible again; then it continues after the last event.
function disconnect() {
  clearTimeout(timer);
  source?.close();
  source = undefined;
}
