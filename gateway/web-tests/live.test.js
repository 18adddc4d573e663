// Live orders, in several tabs and with lost connections.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { balance, browsing, held, orderWith, startDemo } from './browser.js';
import { balanceOf, base, customer, endedInside, eventually, order, paid, start, stop, without } from './stack.js';
import { wire } from './wire.js';

const AWAY = [/net::ERR_/, /status of 50[234]/];

/// Collects the events that the page gets, as `NEW id` and so on. Call it before the page connects.
async function told(page) {
  const debug = await page.context().newCDPSession(page);
  await debug.send('Network.enable');
  const events = [];
  debug.on('Network.eventSourceMessageReceived', ({ eventName, data }) => {
    if (eventName !== 'order') return;
    const { order_id, status } = JSON.parse(data);
    events.push(`${status} ${order_id}`);
  });
  await page.reload();
  await connection(page, 'open');
  return events;
}

function connection(page, state) {
  return page.locator(`[data-test=connection][data-state=${state}]`).waitFor();
}

/// A test whose connection can be cut.
function overWire(body) {
  return browsing({ noPage: true, tolerated: AWAY }, async ({ open }) => {
    const line = await wire();
    try {
      await body(await open('', line.url), line);
    } finally {
      line.close();
    }
  });
}

test('a change in one tab is shown in another', browsing(async ({ page, open }) => {
  const user = await startDemo(page);
  const second = await open();
  await orderWith(second, 'FINISHED').waitFor();
  assert.equal(await second.getByTestId('account-link').textContent(), user);
  await second.getByTestId('buy-tea').click();
  await orderWith(page, 'FINISHED').filter({ hasText: 'Tea' }).waitFor();
  await page.getByTestId('buy-bike').click();
  await orderWith(second, 'CANCELLED').waitFor();
  for (const tab of [page, second]) await eventually(async () => assert.equal(await balance(tab), 100_000 - 1_299 - 450));
}));

test('the balance is updated while many orders become final quickly', browsing(async ({ page, context }) => {
  const user = await startDemo(page);
  await eventually(async () => assert.equal(await balance(page), 100_000 - 1_299));
  const cut = [];
  page.on('requestfailed', (request) => cut.push(request.url()));
  const account = await held(context, `**/v1/accounts/${user}`);
  for (const what of ['One', 'Two', 'Three']) {
    await order(user, 100, what);
    await orderWith(page, 'FINISHED').filter({ hasText: what }).waitFor();
  }
  assert.equal(account.asked, 1);
  account.release();
  await eventually(async () => assert.equal(await balance(page), 100_000 - 1_299 - 300));
  assert.deepEqual(cut, []);
}));

test('a lost connection is shown, and afterwards the page has every event and every change', overWire(async (page, line) => {
  const user = await startDemo(page);
  await page.goto(`${line.url}/#/orders?user_id=${user}`);
  const events = await told(page);
  await orderWith(page, 'FINISHED').waitFor();
  line.cut();
  await connection(page, 'reconnecting');
  assert.match(await page.getByTestId('connection').textContent(), /Reconnecting/);
  // More than one page of the list.
  const meanwhile = await Promise.all(Array.from({ length: 25 }, (_, n) => paid(user, 100 + n, `Meanwhile ${n}`)));
  assert.deepEqual(events, []);
  line.mend();
  await connection(page, 'open');
  await orderWith(page, 'FINISHED').filter({ hasText: 'Meanwhile' }).nth(19).waitFor();
  await eventually(() => meanwhile.every((id) => events.includes(`NEW ${id}`) && events.includes(`FINISHED ${id}`)));
  const afterwards = await paid(user, 1, 'Afterwards');
  await orderWith(page, 'FINISHED').filter({ hasText: 'Afterwards' }).waitFor();
  await eventually(() => events.includes(`FINISHED ${afterwards}`));
  await page.getByTestId('nav-shop').click();
  await eventually(async () => assert.equal(await balance(page), await balanceOf(user)));
}));

test('an order placed while the connection is lost is placed once when it is back', overWire(async (page, line) => {
  const user = await startDemo(page);
  line.cut();
  await page.getByTestId('buy-tea').click();
  await page.getByTestId('unanswered').waitFor();
  line.mend();
  await page.getByTestId('unanswered').waitFor({ state: 'detached' });
  await orderWith(page, 'FINISHED').filter({ hasText: 'Tea' }).waitFor();
  assert.equal(await balanceOf(user), 100_000 - 1_299 - 450);
}));

test('changes while the gateway is stopped are shown when it is back', browsing({ tolerated: AWAY }, async ({ page }) => {
  const user = await customer();
  await page.goto(`${base}/#/orders`);
  const events = await told(page);
  const first = await paid(user, 1);
  await eventually(() => events.includes(`FINISHED ${first}`));
  let id;
  try {
    await without('payments', async () => {
      ({ id } = await order(user, 2, 'Over a restart'));
      await orderWith(page, 'NEW').filter({ hasText: 'Over a restart' }).waitFor();
      await stop('gateway');
    });
    await connection(page, 'reconnecting');
    await endedInside(id);
  } finally {
    await start('gateway');
  }
  await connection(page, 'open');
  await orderWith(page, 'FINISHED').filter({ hasText: 'Over a restart' }).waitFor();
  await eventually(() => events.includes(`FINISHED ${id}`));
}));

test('while payments is down, the timeline names it, and the order continues by itself afterwards', browsing({ tolerated: AWAY }, async ({ page }) => {
  await startDemo(page);
  await without('payments', async () => {
    await page.getByTestId('buy-tea').click();
    await orderWith(page, 'NEW').getByRole('link').click();
    await page.getByTestId('missing').filter({ hasText: 'payments does not answer' }).waitFor();
    await page.getByTestId('under-way').waitFor();
    assert.deepEqual(await page.getByTestId('step').evaluateAll((steps) => steps.map((step) => step.dataset.step)), ['placed', 'enqueued', 'published']);
    await page.getByTestId('nav-flow').click();
    await page.getByTestId('service-payments').filter({ hasText: 'does not answer' }).waitFor();
    await page.getByTestId('new').filter({ hasText: 'oldest:' }).waitFor();
    await page.goBack();
  });
  await page.locator('[data-test=step][data-step=ended]').waitFor();
  await page.getByTestId('missing').waitFor({ state: 'detached' });
  await page.getByTestId('under-way').waitFor({ state: 'detached' });
}));

test('an order whose new status matches a filter appears in the filtered list', browsing({ tolerated: AWAY, noPage: true }, async ({ open }) => {
  const user = await customer();
  let page;
  await without('payments', async () => {
    await order(user, 1, 'From before');
    page = await open(`#/orders?status=FINISHED&user_id=${user}`);
    await connection(page, 'open');
    await page.getByText('No orders here').waitFor();
  });
  await orderWith(page, 'FINISHED').filter({ hasText: 'From before' }).waitFor();
}));
