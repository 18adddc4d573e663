// A list of orders, newest first, that stays up to date: pages that were read, and what the events tell since.

import { read } from './api.js';
import { latest } from './known.js';
import { onChange, opened } from './live.js';
import { askCurrency } from './money.js';
import { useStore } from './store.js';
import { useCallback, useEffect, useRef, useState } from './vendor/htm-preact.js';

/// Events are shown together, so that a busy shop does not keep the browser busy.
const GATHER_MS = 200;
/// Events tell little of an order that is not shown yet: the newest page is read for the rest, at most this often.
const READ_AGAIN_MS = 1_000;
const RETRY_MS = 2_000;
/// Beyond those that were asked for. Then the list begins anew with the newest.
const GROWTH_MAX = 200;

/// { orders, problem, more, loadMore }. `orders` is undefined until the first page is there.
export function useOrderList({ userId, status, limit = 20 }) {
  const turn = useStore(opened);
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
    const leaving = new AbortController();
    const readNewest = async () => {
      try {
        const page = await readPage(null, leaving.signal);
        setState((before) => withNewest(before.filter === filter ? before : {}, page, filter));
      } catch (problem) {
        if (leaving.signal.aborted) return;
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
      leaving.abort();
      stop();
      Object.values(timers.current).forEach(clearTimeout);
      timers.current = {};
    };
  }, [filter, limit, turn]);

  const current = state.filter === filter ? state : {};
  const loadMore = async () => {
    // The list may be another one by then, or have begun anew.
    const unlessLeft = (change) => setState((before) => (before.filter === filter && before.more === current.more ? change(before) : before));
    try {
      const page = await readPage(current.more);
      unlessLeft((before) => {
        const orders = merged(before.orders, page.items);
        return { ...before, orders, more: page.next_cursor, asked: orders.length, problem: undefined };
      });
    } catch (problem) {
      unlessLeft((before) => ({ ...before, problem }));
    }
  };
  const orders = current.orders?.map(latest).filter((order) => !status || order.status === status);
  return { orders, problem: current.problem, more: current.more, loadMore };
}

/// The newest page may have pushed others down; those that were read stay, unless there is a gap to them.
function withNewest(before, page, filter) {
  const known = new Set(before.orders?.map(({ id }) => id));
  const joins = !page.next_cursor || page.items.some(({ id }) => known.has(id));
  const orders = merged(before.orders ?? [], page.items);
  if (!joins || orders.length > (before.asked ?? 0) + GROWTH_MAX) return { filter, orders: page.items, more: page.next_cursor, asked: page.items.length };
  return { ...before, filter, orders, more: before.orders ? before.more : page.next_cursor, asked: before.asked ?? page.items.length, problem: undefined };
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
    if (before) known.set(id, { ...before, told: true, ...(status !== 'NEW' && { status, reason, updated_at: at }) });
  }
  return merged([...known.values()], []);
}
