// A value that many parts of the page look at, and are told when it changes.

import { useEffect, useState } from './vendor/htm-preact.js';

export function store(value) {
  const listeners = new Set();
  return {
    get: () => value,
    set(next) {
      if (next === value) return;
      value = next;
      for (const listener of [...listeners]) listener(value);
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

export function useStore(source) {
  const [value, setValue] = useState(source.get());
  useEffect(() => {
    // It may have changed between drawing and here.
    setValue(source.get());
    return source.subscribe(setValue);
  }, [source]);
  return value;
}
