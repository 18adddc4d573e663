// Requests that change something: each has its effect exactly once, whatever happens to this page.
//
// An operation is a list of requests, each with an idempotency key that is created and stored
// before anything is sent. It is deleted only when its outcome is known. Until then it is retried
// under the same keys, also after a reload.

import { Problem, send } from './api.js';
import { forget, namesBelow, recall, remember } from './storage.js';
import { store } from './store.js';

// Not renamed, so that operations stored by an earlier version of the page are still resumed.
const PREFIX = 'errand.';
const RETRY_FIRST_MS = 500;
const RETRY_MAX_MS = 8_000;

/// Operations that this tab is running, each with its last problem, if any.
export const pendingRequests = store([]);

/// Results of operations that were started before this page was loaded.
export const resumed = store([]);

/// AbortControllers of the running operations, by id.
const aborts = new Map();

/// `steps`: { kind, path, body }. Returns the answers in order, or throws a Problem if a request is
/// rejected.
export function submitRequests(steps) {
  const operation = { id: newKey(), begun_at: new Date().toISOString(), steps: steps.map((step) => ({ ...step, key: newKey() })), answers: [] };
  persist(operation);
  return withLock(operation.id, () => run(operation));
}

/// Resumes the operations that an earlier load of this page has left.
export function resumePending() {
  for (const name of namesBelow(PREFIX)) {
    const id = name.slice(PREFIX.length);
    withLock(id, async () => {
      // Another tab may have completed it meanwhile.
      const operation = recall(name);
      if (!operation) return;
      const doneBefore = operation.answers.length;
      const problem = await run(operation).then(() => undefined, (refused) => refused);
      const { steps, answers } = operation;
      resumed.set([...resumed.get(), { id, steps, answers, doneBefore, problem }]);
    });
  }
}

/// Stops retrying. A request that was sent may have been done.
export function giveUp(id) {
  aborts.get(id)?.abort();
}

export function dismiss(id) {
  resumed.set(resumed.get().filter((outcome) => outcome.id !== id));
}

async function run(operation) {
  const abort = new AbortController();
  aborts.set(operation.id, abort);
  setPending(operation, null);
  try {
    while (operation.answers.length < operation.steps.length) {
      operation.answers.push(await sendUntilAnswered(operation, operation.steps[operation.answers.length], abort.signal));
      persist(operation);
    }
    return operation.answers;
  } finally {
    aborts.delete(operation.id);
    forget(PREFIX + operation.id);
    pendingRequests.set(pendingRequests.get().filter((other) => other.id !== operation.id));
  }
}

/// Retries until the outcome is known or the operation is given up.
async function sendUntilAnswered(operation, step, signal) {
  for (let delay = RETRY_FIRST_MS; ; delay = Math.min(2 * delay, RETRY_MAX_MS)) {
    try {
      return await send(step.path, step.body, step.key, signal);
    } catch (problem) {
      if (!signal.aborted) {
        if (!(problem instanceof Problem) || !problem.isOpen) throw problem;
        setPending(operation, problem);
        await pause(Math.max(delay, 1000 * problem.retryAfterSeconds), signal);
      }
      if (signal.aborted) throw new Problem({ code: 'given_up', step });
    }
  }
}

function setPending(operation, problem) {
  const others = pendingRequests.get().filter((other) => other.id !== operation.id);
  pendingRequests.set([...others, { id: operation.id, steps: operation.steps, done: operation.answers.length, problem }]);
}

/// Waits; ends early when the network is back or the operation is given up.
function pause(ms, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener('online', done);
      signal.removeEventListener('abort', done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    addEventListener('online', done);
    signal.addEventListener('abort', done);
  });
}

function persist(operation) {
  remember(PREFIX + operation.id, operation);
}

/// Only one tab runs an operation; another takes over when that one is closed. Without the Web
/// Locks API (plain HTTP from another host) two tabs may send it; the idempotency keys prevent a
/// second effect.
function withLock(id, run) {
  return navigator.locks ? navigator.locks.request(`gozon.${PREFIX}${id}`, run) : run();
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
