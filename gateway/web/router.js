// The current view is in the URL fragment, so that it survives a reload and can be shared as a
// link.

import { store } from './store.js';

export const links = {
  shop: () => '#/',
  orders: (query = {}) => '#/orders' + queryText(query),
  order: (id) => `#/orders/${encodeURIComponent(id)}`,
  accounts: () => '#/accounts',
  account: (userId) => `#/accounts/${encodeURIComponent(userId)}`,
  flow: () => '#/flow',
};

export const route = store(parse(location.hash));

addEventListener('hashchange', () => route.set(parse(location.hash)));

export function go(link) {
  location.hash = link;
}

/// Changes the URL without a history entry, for filters that are being typed.
export function replace(link) {
  history.replaceState(null, '', link);
  route.set(parse(link));
}

function parse(hash) {
  const [path, query = ''] = hash.replace(/^#\/?/, '').split('?');
  const [view, id] = path.split('/').map(decoded);
  return { view: view || 'shop', id: id || undefined, query: Object.fromEntries(new URLSearchParams(query)) };
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function queryText(query) {
  const set = Object.entries(query).filter(([, value]) => value);
  return set.length ? `?${new URLSearchParams(set)}` : '';
}
