// The customers of this browser. The API has no public list of customers, so the browser remembers
// them.

import { resumed } from './pending-requests.js';
import { recall, remember } from './storage.js';
import { store } from './store.js';

const USERS_MAX = 20;

export const users = store(recall('users', []));

/// The current customer, or null.
export const shopper = store(recall('shopper', null));

export function shopAs(userId) {
  users.set([userId, ...users.get().filter((other) => other !== userId)].slice(0, USERS_MAX));
  shopper.set(userId);
  remember('users', users.get());
  remember('shopper', userId);
}

// Selects an account whose creation was interrupted by a reload.
resumed.subscribe((outcomes) => {
  const { steps, answers } = outcomes.at(-1) ?? {};
  if (answers?.length && steps[0].kind === 'account') shopAs(steps[0].body.user_id);
});

/// A unique name: 40 random bits.
export function demoName() {
  const bytes = crypto.getRandomValues(new Uint8Array(5));
  return `demo-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')}`;
}
