// A live list of orders, newest first: pages that were read, updated by events.

import { read } from './api.js';
import { latest } from './known.js';
import { onChange, reloads } from './live.js';
import { askCurrency } from './money.js';
import { useStore } from './store.js';
import { useCallback, useEffect, useRef, useState } from './vendor/htm-preact.js';

/// Events within this time are rendered together, so that many events do not overload the browser.
const GATHER_MS = 200;
/// Events contain only part of a new order, so the newest page is read again, at most this often.
const READ_AGAIN_MS = 1_000;
const RETRY_MS = 2_000;
/// Orders beyond the requested pages. With more, the list restarts with the newest page.
const GROWTH_MAX = 200;

/// Returns { orders, problem, more, loadMore }. `orders` is undefined until the first page is read.
export function useOrderList({ userId, status, limit = 20 }) {
  const reloadCount = useStore(reloads);
  const filter = `${userId ?? ''} ${status ?? ''}`;
  const [state, setState] = useState({ filter });
  const timers = useRef({});
  const shown = useRef();
  shown.current = state.filter === filter ? state.orders : undefined;

  const readPage = useCallback(async (cursor, signal) => {
    const query = new URLSearchParams({ limit });
    if (userId) query.set('user_id', userId);
    if (status) query.set('status', status);
    if (cursor) query.set('cursor', cursor);
    const page = await read(`/v1/orders?${query}`, { signal });
    askCurrency(page.items.map((order) => order.user_id));
    return page;
  }, [filter, limit]);

  useEffect(() => {
    const abort = new AbortController();
    const readNewest = async () => {
      try {
        const page = await readPage(null, abort.signal);
        setState((before) => withNewest(before.filter === filter ? before : {}, page, filter));
      } catch (problem) {
        if (abort.signal.aborted) return;
        setState((before) => ({ ...(before.filter === filter ? before : {}), filter, problem }));
        if (problem.isOpen) timers.current.retry = setTimeout(readNewest, Math.max(RETRY_MS, 1000 * problem.retryAfterSeconds));
      }
    };
    const readSoon = () => {
      timers.current.newest ??= setTimeout(() => {
        timers.current.newest = undefined;
        readNewest();
      }, READ_AGAIN_MS);
    };
    let gathered = [];
    const stop = onChange((change) => {
      if (userId && change.user_id !== userId) return;
      gathered.push(change);
      timers.current.gather ??= setTimeout(() => {
        timers.current.gather = undefined;
        const changes = gathered;
        gathered = [];
        setState((before) => (before.orders ? { ...before, orders: withChanges(before.orders, changes) } : before));
        const known = new Set(shown.current?.map(({ id }) => id));
        if (changes.some((change) => !change.order && !known.has(change.order_id) && (!status || change.status === status))) readSoon();
      }, GATHER_MS);
    });
    readNewest();
    return () => {
      abort.abort();
      stop();
      Object.values(timers.current).forEach(clearTimeout);
      timers.current = {};
    };
  }, [filter, limit, reloadCount]);

  const current = state.filter === filter ? state : {};
  const loadMore = async () => {
    // Meanwhile the filter may have changed, or the list may have restarted.
    const unlessLeft = (change) => setState((before) => (before.filter === filter && before.more === current.more ? change(before) : before));
    try {
      const page = await readPage(current.more);
      unlessLeft((before) => {
        const orders = merged(before.orders, page.items);
        return { ...before, orders, more: page.next_cursor, requested: orders.length, problem: undefined };
      });
    } catch (problem) {
      unlessLeft((before) => ({ ...before, problem }));
    }
  };
  const orders = current.orders?.map(latest).filter((order) => !status || order.status === status);
  return { orders, problem: current.problem, more: current.more, loadMore };
}

/// Puts the newest page in front of the orders that were read before, unless there is a gap between
/// them.
function withNewest(before, page, filter) {
  const known = new Set(before.orders?.map(({ id }) => id));
  const joins = !page.next_cursor || page.items.some(({ id }) => known.has(id));
  const orders = merged(before.orders ?? [], page.items);
  if (!joins || orders.length > (before.requested ?? 0) + GROWTH_MAX) return { filter, orders: page.items, more: page.next_cursor, requested: page.items.length };
  return { ...before, filter, orders, more: before.orders ? before.more : page.next_cursor, requested: before.requested ?? page.items.length, problem: undefined };
}

/// Ids are made in time order.
function merged(orders, others) {
  const all = new Map([...orders, ...others].map((order) => [order.id, order]));
  return [...all.values()].sort((a, b) => (a.id < b.id ? 1 : -1));
}

function withChanges(orders, changes) {
  const known = new Map(orders.map((order) => [order.id, order]));
  for (const { order_id: id, status, reason, at, order } of changes) {
    const before = known.get(id) ?? order;
    if (before) known.set(id, { ...before, changed: true, ...(status !== 'NEW' && { status, reason, updated_at: at }) });
  }
  return merged([...known.values()], []);
}
