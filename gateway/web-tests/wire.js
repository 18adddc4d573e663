// A connection between browser and gateway that can be cut and restored.

import { connect, createServer } from 'node:net';
import { base } from './stack.js';

export async function wire() {
  const { hostname, port } = new URL(base);
  const open = new Set();
  let cut = false;
  const server = createServer((browser) => {
    if (cut) return browser.destroy();
    const gateway = connect(Number(port), hostname);
    const ends = [browser, gateway];
    for (const end of ends) {
      open.add(end);
      end.on('error', () => {}).on('close', () => {
        open.delete(end);
        ends.forEach((other) => other.destroy());
      });
    }
    browser.pipe(gateway).pipe(browser);
  });
  const cutAll = () => open.forEach((end) => end.destroy());
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    cut() {
      cut = true;
      cutAll();
    },
    mend() {
      cut = false;
    },
    close() {
      server.close();
      cutAll();
    },
  };
}
