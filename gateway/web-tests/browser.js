// A supervised browser: a test fails if a page logs errors, requests another origin or violates the
// policy.

import assert from 'node:assert/strict';
import { mkdirSync, readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { after } from 'node:test';
import { base } from './stack.js';

// With `require`, because ES modules ignore NODE_PATH.
const require = createRequire(import.meta.url);
const { chromium, selectors } = require('playwright-core');
const AXE = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
// Long enough for a busy machine. Only failing tests reach it.
const DEADLINE_MS = 60_000;
const SEVERE = ['serious', 'critical'];

export const screenshots = process.env.GOZON_SCREENSHOTS;

selectors.setTestIdAttribute('data-test');
let started;
after(async () => (await started)?.close());

/// A test with its own browser context: `{ page, open, context }`. `options` are context options,
/// and `tolerated`: errors that the test causes on purpose; `path`: the first URL; `noPage`: open
/// no page.
export function browsing(options, body) {
  if (!body) return browsing({}, options);
  const { tolerated = [], path = '', noPage = false, ...rest } = options;
  return async (test) => {
    started ??= chromium.launch({ executablePath: process.env.CHROMIUM });
    const context = await (await started).newContext({ locale: 'en-GB', viewport: { width: 1200, height: 900 }, ...rest });
    context.setDefaultTimeout(DEADLINE_MS);
    const complaints = [];
    await context.exposeBinding('gozonViolation', (_, text) => complaints.push(`the policy blocks ${text}`));
    await context.addInitScript(() => addEventListener('securitypolicyviolation', (event) => gozonViolation(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`)));
    context.on('request', (request) => {
      const asked = new URL(request.url());
      if (asked.origin !== new URL(request.frame().page().gozonUrl).origin && asked.protocol !== 'data:') complaints.push(`it requests ${asked}`);
    });
    const open = async (path = '', from = base) => {
      const page = await context.newPage();
      page.gozonUrl = from;
      page.on('console', (message) => ['error', 'warning'].includes(message.type()) && complaints.push(`${message.text()} (${message.location().url})`));
      page.on('pageerror', (error) => complaints.push(error.stack));
      await page.goto(`${from}/${path}`);
      await page.locator('main h1').waitFor();
      return page;
    };
    let page;
    try {
      page = noPage ? undefined : await open(path);
      await body({ page, open, context });
      assert.deepEqual(complaints.filter((text) => !tolerated.some((allowed) => allowed.test(text))), []);
    } catch (error) {
      mkdirSync(`${screenshots}/failed`, { recursive: true });
      const name = test.name.replace(/\W+/g, '-').slice(0, 80);
      await Promise.all(context.pages().map((page, n) => page.screenshot({ path: `${screenshots}/failed/${name}-${n}.png` }).catch(() => {})));
      if (complaints.length) error.message += `\nThe page complained: ${complaints.join('\n')}`;
      throw error;
    } finally {
      await context.close();
    }
  };
}

/// Makes a first visit with the demo account; returns its user after the order was paid.
export async function startDemo(page) {
  await page.getByTestId('demo').click();
  await orderWith(page, 'FINISHED').waitFor();
  return page.getByTestId('account-link').textContent();
}

export function orderWith(page, status) {
  return page.locator(`[data-test=order][data-status=${status}]`);
}

/// The displayed balance, in minor units.
export async function balance(page) {
  return Number(await page.getByTestId('balance').getAttribute('data-minor'));
}

/// Waits until all pending changes are rendered and observers have run.
export function drawn(page) {
  return page.evaluate(() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(resolve)))));
}

/// Holds the requests to `pattern` until `release` is called. `asked` counts them.
export async function held(context, pattern) {
  let release;
  const released = new Promise((resolve) => { release = resolve; });
  const hold = { asked: 0, release };
  await context.route(pattern, async (route) => {
    hold.asked += 1;
    await released;
    // The page may have cancelled it meanwhile.
    await route.continue().catch(() => {});
  });
  return hold;
}

/// Accessibility violations that axe-core finds.
export async function severe(page) {
  // Through the debugger, to which the page's policy does not apply.
  const debug = await page.context().newCDPSession(page);
  await debug.send('Runtime.evaluate', { expression: AXE });
  const violations = await page.evaluate(async () => (await axe.run()).violations.map(({ id, impact, nodes }) => ({ id, impact, where: nodes.map((node) => `${node.target} ${node.failureSummary}`) })));
  await debug.detach();
  return violations.filter(({ impact }) => SEVERE.includes(impact));
}
