// Reads a resource of the API for as long as it is shown.

import { read } from './api.js';
import { useEffect, useRef, useState } from './vendor/htm-preact.js';

const RETRY_MS = 2_000;

/// Returns { data, problem, reload }. Old data stays while it is read again, and an unavailable
/// service is retried. A reload during a read starts one more read after it, so quick events cause
/// no pile-up.
export function useResource(path, again = 0) {
  const [state, setState] = useState({});
  const reload = useRef();
  useEffect(() => {
    const abort = new AbortController();
    let reading = false;
    let requested = false;
    let timer;
    const readNow = async () => {
      clearTimeout(timer);
      requested = true;
      if (!path || reading) return;
      reading = true;
      while (requested) {
        requested = false;
        const result = await read(path, { signal: abort.signal }).then((data) => ({ data }), (problem) => ({ problem }));
        if (abort.signal.aborted) return;
        setState((before) => ({ path, data: before.path === path ? before.data : undefined, ...result }));
        if (!result.problem?.isOpen) continue;
        requested = false;
        timer = setTimeout(readNow, Math.max(RETRY_MS, 1000 * result.problem.retryAfterSeconds));
      }
      reading = false;
    };
    reload.current = readNow;
    return () => {
      abort.abort();
      clearTimeout(timer);
    };
  }, [path]);
  useEffect(() => {
    reload.current();
  }, [path, again]);
  const current = state.path === path ? state : {};
  return { ...current, reload: () => reload.current() };
}
