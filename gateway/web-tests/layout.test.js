// Layout and accessibility: every view at three widths, light and dark, with screenshots.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { before, test } from 'node:test';
import { browsing, drawn, orderWith, screenshots, severe, startDemo } from './browser.js';
import { base, customer, ended, eventually, order, paid, publish, sayAgain, timeline } from './stack.js';

const WIDTHS = [360, 768, 1440];
const SCHEMES = ['light', 'dark'];
const HEIGHT = 900;
const LONG_AGO_MS = 58 * 60_000;
/// Each layout and each colour scheme is checked once, since they are independent.
const ASKED = ['360 light', '1440 dark'];
/// Largest cumulative layout shift. Google calls 0.1 good.
const SHIFT_MAX = 0.01;
const README = process.env.GOZON_README_SCREENSHOTS;

let alice;
let longest;
let way;
let declined;

before(async () => {
  alice = await customer(480_000, 'alice');
  await paid(alice, 1_299, 'A lamp');
  await paid(alice, 450, 'Tea, the strong one in the tin with the elephants, and a second tin for whoever comes along');
  ({ id: declined } = await order(alice, 1_250_000, 'A bicycle'));
  await ended(declined);
  await paid(alice, 2_400, 'A book');
  way = await paid(alice, 35_990, 'A present');
  await timeline(way);
  await sayAgain(way, 'orders');
  await timeline(way, 12);
  longest = await customer(1_000, 'with-a-name-as-long-as-any-name-may-be-in-this-shop');
  await paid(longest, 100, 'A name');
  await publish('orders', 'gozon.orders.placed', { 'ce-specversion': '1.0', 'ce-id': randomUUID(), 'ce-type': 'gozon.order.placed.v9', 'ce-subject': randomUUID() }, '{"not": "an order"}');
  await publish('orders', 'gozon.orders.placed', { 'ce-specversion': '1.0', 'ce-id': randomUUID(), 'ce-type': 'gozon.order.placed.v1', 'ce-subject': randomUUID() }, 'nonsense');
});

/// Name, URL, preparation, and options of each view.
const VIEWS = [
  ['first visit', () => '#/', async (page) => page.getByTestId('demo').waitFor(), { stranger: true }],
  ['shop', () => '#/', async (page) => orderWith(page, 'FINISHED').first().waitFor()],
  ['shop with errors', () => '#/', async (page) => {
    await page.getByTestId('order-amount').fill('0');
    await page.getByTestId('place').click();
    await page.getByTestId('order-amount-error').waitFor();
    await page.getByTestId('top-up').fill('much');
    await page.getByTestId('top-up-submit').click();
    await page.getByTestId('top-up-error').waitFor();
  }, { tolerated: [/status of 422/] }],
  ['shop without an answer', () => '#/', async (page) => {
    await page.context().route('**/v1/orders', (route) => (route.request().method() === 'POST' ? route.abort() : route.fallback()));
    await page.getByTestId('buy-tea').click();
    await page.getByTestId('unanswered').waitFor();
  }, { tolerated: [/net::ERR_FAILED/] }],
  ['orders', () => '#/orders', async (page) => page.getByTestId('order').first().waitFor()],
  ['orders of a long name', () => `#/orders?user_id=${longest}`, async (page) => page.getByTestId('order').first().waitFor()],
  ['timeline', () => `#/orders/${way}`, async (page) => {
    await page.locator('[data-step=repeated]').waitFor();
    await page.locator('main > [data-test=shell] summary').click();
  }],
  ['timeline of a cancelled order', () => `#/orders/${declined}`, async (page) => page.locator('[data-step=ended]').waitFor()],
  ['timeline of nothing', () => '#/orders/01933f3c-7d5a-7b60-9d6f-000000000000', async (page) => page.getByTestId('problem').waitFor(), { tolerated: [/status of 404/] }],
  ['message', () => `#/orders/${way}`, async (page) => {
    await page.getByTestId('message').first().click();
    await page.getByTestId('drawer').waitFor();
  }],
  ['accounts', () => '#/accounts', async (page) => page.getByTestId('user').waitFor()],
  ['account', () => `#/accounts/${alice}`, async (page) => page.getByTestId('sums').waitFor()],
  ['account of nobody', () => '#/accounts/nobody-yet', async (page) => page.getByTestId('open-account-submit').waitFor(), { tolerated: [/status of 404/] }],
  ['flow', () => '#/flow', async (page) => page.getByTestId('letter').first().waitFor()],
  ['replay', () => '#/flow', async (page) => {
    await page.getByTestId('replay-all').click();
    await page.getByTestId('preview').first().waitFor();
  }],
  ['keys', () => '#/orders', async (page) => {
    await page.getByTestId('order').first().waitFor();
    await page.keyboard.press('?');
    await page.getByTestId('keys').waitFor();
  }],
  ['shop without a currency', () => '#/', async (page) => {
    await page.context().route('**/v1/accounts/*', (route) => route.fulfill({ status: 503, json: { status: 503, code: 'service_unavailable', title: 'Away', detail: 'It is away.' } }));
    await page.addInitScript(() => localStorage.removeItem('gozon.currency'));
    await page.reload();
    await page.locator('[data-test=order-amount]:disabled').waitFor();
    await orderWith(page, 'FINISHED').first().waitFor();
  }, { tolerated: [/status of 503/] }],
  ['request given up', () => '#/', async (page) => {
    await page.context().route('**/v1/orders', (route) => (route.request().method() === 'POST' ? route.abort() : route.fallback()));
    await page.getByTestId('buy-tea').click();
    await page.getByTestId('unanswered').waitFor();
    await page.reload();
    await page.getByTestId('unanswered').getByRole('button').click();
    await page.getByTestId('resumed').waitFor();
  }, { tolerated: [/net::ERR_FAILED/] }],
];

/// Elements that are cut off, by the window or by their row.
function sticksOut() {
  const beyond = (part) => {
    const { right } = part.getBoundingClientRect();
    const row = part.closest('.row-main');
    return right > innerWidth + 1 || (row && right > row.getBoundingClientRect().right + 1);
  };
  const found = document.documentElement.scrollWidth > innerWidth ? [`the page scrolls to the side at ${innerWidth}`] : [];
  for (const part of document.querySelectorAll('main *, dialog *')) if (beyond(part)) found.push(`beyond ${innerWidth}: ${part.textContent || part.outerHTML}`);
  return found;
}

async function shopAs(page, user) {
  await page.evaluate((user) => {
    localStorage.setItem('gozon.users', JSON.stringify([user, 'bob']));
    localStorage.setItem('gozon.shopper', JSON.stringify(user));
  }, user);
  await page.reload();
  await page.locator('main h1').waitFor();
}

for (const [name, path, ready, { stranger, tolerated } = {}] of VIEWS) {
  // Half of the views in Russian, whose words are longer.
  const locale = VIEWS.findIndex(([other]) => other === name) % 2 ? 'ru-RU' : 'en-GB';
  test(`${name}: fits from 360 pixels up and is accessible, light and dark`, browsing({ tolerated, reducedMotion: 'reduce', locale }, async ({ page }) => {
    // With old timestamps, which are the longest texts and the same in every run.
    await page.clock.setFixedTime(Date.now() + LONG_AGO_MS);
    if (!stranger) await shopAs(page, alice);
    await page.goto(`${base}/${path()}`);
    await ready(page);
    const found = [];
    for (const width of WIDTHS) {
      for (const colorScheme of SCHEMES) {
        await page.setViewportSize({ width, height: HEIGHT });
        await page.emulateMedia({ colorScheme });
        found.push(...await page.evaluate(sticksOut));
        await page.evaluate(() => scrollTo(0, 0));
        // The screenshot of a dialog covers only the visible part of the page.
        const fullPage = await page.locator('dialog').count() === 0;
        await page.screenshot({ path: `${screenshots}/${name.replaceAll(' ', '-')}-${width}-${colorScheme}.png`, fullPage, animations: 'disabled' });
        if (ASKED.includes(`${width} ${colorScheme}`)) found.push(...await severe(page));
      }
    }
    assert.deepEqual(found, []);
  }));
}

test('the layout does not shift while views load and orders arrive', browsing({ noPage: true }, async ({ open, context }) => {
  await context.addInitScript(() => {
    window.shifts = [];
    // Text inside a moved row is sometimes reported separately.
    const named = (node) => (node?.nodeType === Node.TEXT_NODE ? node.parentElement : node)?.closest?.('.row')?.className || node?.className || `${node?.nodeName} ${node?.textContent}`;
    new PerformanceObserver((list) => {
      for (const { value, hadRecentInput, sources } of list.getEntries()) if (!hadRecentInput) window.shifts.push({ value, what: sources.map(({ node }) => named(node)) });
    }).observe({ type: 'layout-shift', buffered: true });
  });
  const first = await open();
  const user = await startDemo(first);
  // More orders than placeholder rows.
  await Promise.all(Array.from({ length: 20 }, () => paid(user, 10)));
  // No request is answered before the placeholders are visible.
  await context.route('**/v1/**', async (route) => {
    const page = route.request().frame().page();
    if (page !== first && !page.drawn) {
      await page.locator('.waiting').first().waitFor();
      await drawn(page);
      page.drawn = true;
    }
    // The page may be closed meanwhile.
    await route.continue().catch(() => {});
  });
  for (const [path, ready] of [['#/', 'order'], ['#/orders', 'order'], [`#/orders/${way}`, 'timeline'], [`#/accounts/${user}`, 'sums'], ['#/flow', 'letter']]) {
    const page = await open(path);
    await page.getByTestId(ready).first().waitFor();
    await drawn(page);
    const shifts = await page.evaluate(() => window.shifts.splice(0));
    assert.ok(shifts.reduce((sum, { value }) => sum + value, 0) < SHIFT_MAX, `${path}: ${JSON.stringify(shifts)}`);
    if (path === '#/') {
      await order(user, 1, 'From elsewhere');
      await orderWith(page, 'FINISHED').filter({ hasText: 'From elsewhere' }).waitFor();
      await drawn(page);
      // New rows come first, and only other rows may move.
      const moved = await page.evaluate(() => window.shifts.flatMap(({ what }) => what));
      assert.deepEqual(moved.filter((what) => !/^row /.test(what)), []);
    }
    await page.close();
  }
}));

test('a first visit only sends requests to the gateway and loads less than 100 kB', browsing({ noPage: true }, async ({ context }) => {
  let bytes = 0;
  const page = await context.newPage();
  const debug = await context.newCDPSession(page);
  await debug.send('Network.enable');
  debug.on('Network.loadingFinished', ({ encodedDataLength }) => { bytes += encodedDataLength; });
  page.gozonUrl = base;
  await page.goto(base);
  await page.getByTestId('demo').waitFor();
  await eventually(() => bytes > 10_000);
  assert.ok(bytes < 100_000, `${bytes} bytes`);
}));

// The width of a README.
const PICTURE = { viewport: { width: 960, height: 700 }, deviceScaleFactor: 0.85, reducedMotion: 'reduce' };

test('screenshots for the README', { skip: !README && 'with --screenshots FOLDER' }, browsing(PICTURE, async ({ page }) => {
  // Up to the end of the last card.
  const picture = async (name) => {
    const height = await page.locator('.card').evaluateAll((cards) => Math.max(...cards.map((card) => card.getBoundingClientRect().bottom + scrollY)) + 24);
    await page.screenshot({ path: `${README}/${name}.png`, animations: 'disabled', fullPage: true, clip: { x: 0, y: 0, width: 960, height } });
  };
  await shopAs(page, alice);
  await orderWith(page, 'FINISHED').first().waitFor();
  await picture('shop');
  await page.goto(`${base}/#/orders/${way}`);
  await page.locator('[data-step=repeated]').waitFor();
  await picture('timeline');
}));
