// Something that is read from the API for as long as it is shown.

import { read } from './api.js';
import { useEffect, useState } from './vendor/htm-preact.js';

const RETRY_MS = 2_000;

/// { data, problem, reload }. What was read stays while it is read again; while a service is away it is asked again.
export function useResource(path, again = 0) {
  const [state, setState] = useState({});
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (!path) return;
    const leaving = new AbortController();
    let timer;
    read(path, { signal: leaving.signal }).then(
      (data) => setState({ path, data }),
      (problem) => {
        if (leaving.signal.aborted) return;
        setState((before) => ({ path, data: before.path === path ? before.data : undefined, problem }));
        if (problem.isOpen) timer = setTimeout(() => setTurn((turn) => turn + 1), Math.max(RETRY_MS, 1000 * problem.retryAfterSeconds));
      },
    );
    return () => {
      leaving.abort();
      clearTimeout(timer);
    };
  }, [path, again, turn]);
  const current = state.path === path ? state : {};
  return { ...current, reload: () => setTurn((turn) => turn + 1) };
}
