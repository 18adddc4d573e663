// How orders change, told by the gateway: one connection per tab, because browsers allow few to one host.
//
// Whoever shows orders listens first and reads then, again whenever `opened` rises: so nothing is missed between the two,
// nor while the connection was away. Events that come twice or late do no harm, see known.js.

import { note } from './known.js';
import { store } from './store.js';

const RETRY_FIRST_MS = 1_000;
const RETRY_MAX_MS = 10_000;
/// A tab that nobody looks at gives its connection back after this long: six are all that a browser has for one host.
const HIDDEN_MAX_MS = 60_000;

/// `connecting`, `open` or `reconnecting`.
export const connection = store('connecting');

/// Rises when everything should be read afresh.
export const opened = store(0);

const listeners = new Set();
let lastEventId = '';
let retryMs = RETRY_FIRST_MS;
let source;
let timer;

/// Calls `listener` with each change of an order, until the returned function is called.
export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/// What this page has learned by itself about an order goes the same way as what it is told.
export function learned(order) {
  tell({ order_id: order.id, user_id: order.user_id, amount: order.amount, status: order.status, reason: order.reason, at: order.updated_at, order });
}

function tell(change) {
  note(change);
  for (const listener of [...listeners]) listener(change);
}

export function connect() {
  source = new EventSource('/v1/orders/events' + (lastEventId && `?last_event_id=${encodeURIComponent(lastEventId)}`));
  source.addEventListener('open', () => {
    retryMs = RETRY_FIRST_MS;
    connection.set('open');
    opened.set(opened.get() + 1);
  });
  source.addEventListener('order', (event) => {
    lastEventId = event.lastEventId;
    tell(JSON.parse(event.data));
  });
  source.addEventListener('reset', (event) => {
    lastEventId = event.lastEventId;
    opened.set(opened.get() + 1);
  });
  source.addEventListener('error', () => {
    connection.set('reconnecting');
    // After an answer that is no event stream, browsers give up for ever. Until there is one, what is shown is read again.
    if (source.readyState !== EventSource.CLOSED) return;
    timer = setTimeout(connect, retryMs);
    opened.set(opened.get() + 1);
    retryMs = Math.min(2 * retryMs, RETRY_MAX_MS);
  });
}

let resting;

document.addEventListener('visibilitychange', () => {
  clearTimeout(resting);
  if (document.hidden) resting = setTimeout(rest, HIDDEN_MAX_MS);
  else if (!source) connect();
});

/// Until somebody looks again. It goes on after the last event then.
function rest() {
  clearTimeout(timer);
  source?.close();
  source = undefined;
}
