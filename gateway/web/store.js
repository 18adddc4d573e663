// An observable value that several parts of the page share.

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
    // The value may have changed between rendering and this effect.
    setValue(source.get());
    return source.subscribe(setValue);
  }, [source]);
  return value;
}
