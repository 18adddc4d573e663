// Requests that change something, done exactly once whatever happens to this page.
//
// An errand is a list of requests, each with an idempotency key that is made and stored before anything is sent. It is
// forgotten only when its outcome is known; until then it is sent again under the same keys, after a reload too.

import { Problem, send } from './api.js';
import { forget, namesBelow, recall, remember } from './storage.js';
import { store } from './store.js';

const PREFIX = 'errand.';
const RETRY_FIRST_MS = 500;
const RETRY_MAX_MS = 8_000;

/// Errands this tab works on: each with the problem that it met last, if any.
export const underWay = store([]);

/// What became of errands that were begun before this page was loaded.
export const resumed = store([]);

/// What ends the work on an errand.
const stops = new Map();

/// `steps`: { kind, path, body }. The answers, in order, or a Problem if a request is refused.
export function begin(steps) {
  const errand = { id: newKey(), begun_at: new Date().toISOString(), steps: steps.map((step) => ({ ...step, key: newKey() })), answers: [] };
  keep(errand);
  return holding(errand.id, () => work(errand));
}

/// Takes up what an earlier load of this page has left.
export function resumeAll() {
  for (const name of namesBelow(PREFIX)) {
    const id = name.slice(PREFIX.length);
    holding(id, async () => {
      // Another tab may have ended it meanwhile.
      const errand = recall(name);
      if (!errand) return;
      const doneBefore = errand.answers.length;
      const problem = await work(errand).then(() => undefined, (refused) => refused);
      const { steps, answers } = errand;
      resumed.set([...resumed.get(), { id, steps, answers, doneBefore, problem }]);
    });
  }
}

/// Stops asking. What was sent may have been done all the same.
export function giveUp(id) {
  stops.get(id)?.abort();
}

export function dismiss(id) {
  resumed.set(resumed.get().filter((outcome) => outcome.id !== id));
}

async function work(errand) {
  const stop = new AbortController();
  stops.set(errand.id, stop);
  show(errand, null);
  try {
    while (errand.answers.length < errand.steps.length) {
      errand.answers.push(await insist(errand, errand.steps[errand.answers.length], stop.signal));
      keep(errand);
    }
    return errand.answers;
  } finally {
    stops.delete(errand.id);
    forget(PREFIX + errand.id);
    underWay.set(underWay.get().filter((other) => other.id !== errand.id));
  }
}

/// Until the outcome is known, or nobody waits for it any more.
async function insist(errand, step, stopped) {
  for (let delay = RETRY_FIRST_MS; ; delay = Math.min(2 * delay, RETRY_MAX_MS)) {
    try {
      return await send(step.path, step.body, step.key, stopped);
    } catch (problem) {
      if (!stopped.aborted) {
        if (!(problem instanceof Problem) || !problem.isOpen) throw problem;
        show(errand, problem);
        await pause(Math.max(delay, 1000 * problem.retryAfterSeconds), stopped);
      }
      if (stopped.aborted) throw new Problem({ code: 'given_up', step });
    }
  }
}

function show(errand, problem) {
  const others = underWay.get().filter((other) => other.id !== errand.id);
  underWay.set([...others, { id: errand.id, steps: errand.steps, done: errand.answers.length, problem }]);
}

/// Ends early when the network is back, or when the errand is given up.
function pause(ms, stopped) {
  return new Promise((resolve) => {
    const over = () => {
      clearTimeout(timer);
      removeEventListener('online', over);
      stopped.removeEventListener('abort', over);
      resolve();
    };
    const timer = setTimeout(over, ms);
    addEventListener('online', over);
    stopped.addEventListener('abort', over);
  });
}

function keep(errand) {
  remember(PREFIX + errand.id, errand);
}

/// One tab at a time works on an errand; another takes over when that one is closed. Where browsers have no locks (plain
/// HTTP from elsewhere), two may ask: the keys see to it that nothing is done twice.
function holding(id, work) {
  return navigator.locks ? navigator.locks.request(`gozon.${PREFIX}${id}`, work) : work();
}

function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
