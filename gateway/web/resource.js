// Something that is read from the API for as long as it is shown.

import { read } from './api.js';
import { useEffect, useRef, useState } from './vendor/htm-preact.js';

const RETRY_MS = 2_000;

/// { data, problem, reload }. What was read stays while it is read again; while a service is away it is asked again.
/// A read that is under way is finished first, and followed by one more: so events in quick succession hold up nothing.
export function useResource(path, again = 0) {
  const [state, setState] = useState({});
  const reload = useRef();
  useEffect(() => {
    const leaving = new AbortController();
    let reading = false;
    let asked = false;
    let timer;
    const readNow = async () => {
      clearTimeout(timer);
      asked = true;
      if (!path || reading) return;
      reading = true;
      while (asked) {
        asked = false;
        const result = await read(path, { signal: leaving.signal }).then((data) => ({ data }), (problem) => ({ problem }));
        if (leaving.signal.aborted) return;
        setState((before) => ({ path, data: before.path === path ? before.data : undefined, ...result }));
        if (!result.problem?.isOpen) continue;
        asked = false;
        timer = setTimeout(readNow, Math.max(RETRY_MS, 1000 * result.problem.retryAfterSeconds));
      }
      reading = false;
    };
    reload.current = readNow;
    return () => {
      leaving.abort();
      clearTimeout(timer);
    };
  }, [path]);
  useEffect(() => {
    reload.current();
  }, [path, again]);
  const current = state.path === path ? state : {};
  return { ...current, reload: () => reload.current() };
}
