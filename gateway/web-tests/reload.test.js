// Requests have their effect once, whatever happens to the page, and the page reports their
// results.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { balance, browsing, orderWith, startDemo } from './browser.js';
import { balanceOf, ended, eventually, ordersOf } from './stack.js';

const ABORTED = [/net::ERR_FAILED/];

const isOrder = (request) => request.method() === 'POST' && new URL(request.url()).pathname === '/v1/orders';

/// Calls `what` for the requests that `which` selects, and collects their keys. After `stop`, later
/// requests pass.
async function intercept(context, which, what) {
  const keys = [];
  let stopped = false;
  await context.route('**/v1/**', async (route) => {
    if (stopped || !which(route.request())) return route.fallback();
    keys.push(route.request().headers()['idempotency-key']);
    await what(route, keys.length);
  });
  // No unroute: it would release the requests that hang.
  return { keys, stop: () => { stopped = true; } };
}

/// The request arrives, but its answer is lost.
const losesAnswer = (arrived) => async (route) => {
  await route.fetch();
  arrived?.();
  // Neither an answer nor an error, like a connection that hangs.
};

test('an order that had not arrived before a reload is placed once after it', browsing({ tolerated: ABORTED }, async ({ page, context }) => {
  const user = await startDemo(page);
  let away = true;
  const sent = await intercept(context, isOrder, (route) => (away ? route.abort() : route.continue()));
  await page.getByTestId('buy-tea').click();
  await page.getByTestId('unanswered').waitFor();
  assert.equal((await ordersOf(user)).length, 1);
  // Only now, or the page retries before the reload.
  await page.reload({ waitUntil: 'commit' });
  away = false;
  const note = page.getByTestId('resumed');
  await note.waitFor();
  assert.equal(await note.getAttribute('data-replayed'), 'false');
  assert.match(await note.innerText(), /Order “Tea” for ₽4\.50: it had not been done before and is done now/);
  assert.ok(sent.keys.length >= 2 && new Set(sent.keys).size === 1, `${sent.keys}`);
  await eventually(async () => assert.equal(await orderWith(page, 'FINISHED').count(), 2));
  assert.equal((await ordersOf(user)).length, 2);
  await note.getByRole('button', { name: 'Close' }).click();
  await page.reload();
  await orderWith(page, 'FINISHED').first().waitFor();
  assert.equal(await note.count(), 0);
  assert.equal((await ordersOf(user)).length, 2);
}));

test('an order whose answer was lost by a reload is not placed again', browsing(async ({ page, context }) => {
  const user = await startDemo(page);
  let arrived = false;
  const sent = await intercept(context, isOrder, losesAnswer(() => { arrived = true; }));
  await page.getByTestId('buy-tea').click();
  await eventually(() => arrived);
  sent.stop();
  await page.reload();
  const note = page.getByTestId('resumed');
  await note.waitFor();
  assert.equal(await note.getAttribute('data-replayed'), 'true');
  assert.match(await note.innerText(), /it had already been done and was not done again/);
  const [newest, ...older] = await ordersOf(user);
  assert.equal(older.length, 1);
  assert.match(await note.getByRole('link').getAttribute('href'), new RegExp(newest.id));
  assert.equal((await ended(newest.id)).status, 'FINISHED');
  assert.equal(await balanceOf(user), 100_000 - 1_299 - 450);
}));

test('without a reload, a lost answer is requested again under the same key', browsing({ tolerated: ABORTED }, async ({ page, context }) => {
  const user = await startDemo(page);
  const sent = await intercept(context, isOrder, async (route, times) => {
    const response = await route.fetch();
    return times < 3 ? route.abort() : route.fulfill({ response });
  });
  await page.getByTestId('buy-book').click();
  await page.getByTestId('unanswered').filter({ hasText: 'retried with the same key' }).waitFor();
  await page.getByTestId('unanswered').waitFor({ state: 'detached' });
  assert.equal(sent.keys.length, 3);
  assert.equal(new Set(sent.keys).size, 1);
  await eventually(async () => assert.equal(await balance(page), 100_000 - 1_299 - 2_400));
  assert.equal((await ordersOf(user)).length, 2);
}));

test('an interrupted first visit continues with the same account', browsing(async ({ page, context }) => {
  let deposited = '';
  const sent = await intercept(context, (request) => request.url().endsWith('/deposits'), (route) => losesAnswer(() => { deposited = route.request().url(); })(route));
  await page.getByTestId('demo').click();
  await eventually(() => deposited);
  const user = deposited.split('/').at(-2);
  sent.stop();
  await page.reload();
  await page.getByTestId('resumed').filter({ hasText: 'done before' }).filter({ hasText: 'it had already been done' }).filter({ hasText: 'is done now' }).waitFor();
  await orderWith(page, 'FINISHED').waitFor();
  assert.equal(await page.getByTestId('account-link').textContent(), user);
  assert.equal(await balanceOf(user), 100_000 - 1_299);
  assert.equal((await ordersOf(user)).length, 1);
}));

test('a second tab takes over a pending request only when the first tab is closed', browsing(async ({ page, context, open }) => {
  const user = await startDemo(page);
  let arrived = 0;
  const sent = await intercept(context, isOrder, losesAnswer(() => { arrived += 1; }));
  await page.getByTestId('buy-tea').click();
  await eventually(() => arrived === 1);
  const second = await open();
  await eventually(async () => assert.equal(await second.getByTestId('order').count(), 2));
  assert.equal(sent.keys.length, 1);
  sent.stop();
  assert.equal(await second.getByTestId('resumed').count(), 0);
  await page.close();
  await second.getByTestId('resumed').waitFor();
  assert.equal(await second.getByTestId('resumed').getAttribute('data-replayed'), 'true');
  assert.equal((await ordersOf(user)).length, 2);
}));

test('after giving up a request, the page says that it may have been done', browsing({ tolerated: ABORTED }, async ({ page, context }) => {
  const user = await startDemo(page);
  const sent = await intercept(context, isOrder, (route) => route.abort());
  await page.getByTestId('buy-tea').click();
  await page.getByTestId('unanswered').getByRole('button').click();
  await page.getByTestId('problem').filter({ hasText: 'It may have been done' }).waitFor();
  assert.equal(await page.getByTestId('problem').getByRole('link', { name: `Orders of ${user}` }).getAttribute('href'), `#/orders?user_id=${user}`);
  sent.stop();
  await page.reload();
  await orderWith(page, 'FINISHED').waitFor();
  assert.equal(await page.getByTestId('resumed').count(), 0);
  assert.equal((await ordersOf(user)).length, 1);
}));

test('a request that hangs can be given up at once', browsing({ tolerated: ABORTED }, async ({ page, context }) => {
  await startDemo(page);
  const sent = await intercept(context, isOrder, (route, times) => times === 1 && route.abort());
  await page.getByTestId('buy-tea').click();
  await eventually(() => sent.keys.length === 2);
  await page.getByTestId('unanswered').getByRole('button').click();
  await page.getByTestId('problem').filter({ hasText: 'It may have been done' }).waitFor({ timeout: 5_000 });
}));

test('after giving up a resumed request, the page says where its outcome is visible', browsing({ tolerated: ABORTED }, async ({ page, context }) => {
  const user = await startDemo(page);
  let arrived = false;
  await intercept(context, isOrder, async (route, times) => {
    if (times > 1) return route.abort();
    await losesAnswer(() => { arrived = true; })(route);
  });
  await page.getByTestId('buy-tea').click();
  await eventually(() => arrived);
  await page.reload();
  await page.getByTestId('unanswered').getByRole('button').click();
  const note = page.getByTestId('resumed');
  await note.filter({ hasText: 'Order “Tea” for ₽4.50: no longer retried. It may have been done.' }).waitFor();
  assert.doesNotMatch(await note.innerText(), /rejected|Nothing was done/);
  await note.getByRole('link', { name: `Orders of ${user}` }).click();
  await orderWith(page, 'FINISHED').filter({ hasText: 'Tea' }).waitFor();
}));

test('when a later step is rejected, the earlier steps are still shown as done', browsing({ tolerated: [/status of 422/] }, async ({ page, context }) => {
  let refuse = false;
  const refused = { status: 422, code: 'balance_limit_exceeded', title: 'Too much', detail: 'It would be too much.' };
  const sent = await intercept(context, (request) => request.url().endsWith('/deposits'), async (route) => {
    if (refuse) await route.fulfill({ status: 422, json: refused });
  });
  await page.getByTestId('demo').click();
  await eventually(() => sent.keys.length === 1);
  refuse = true;
  await page.reload();
  const note = page.getByTestId('resumed');
  await note.filter({ hasText: /Add ₽?1,000\.00: rejected/ }).filter({ hasText: refused.detail }).waitFor();
  assert.match(await note.innerText(), /Open account demo-\w+: done before/);
  assert.doesNotMatch(await note.innerText(), /Nothing was done/);
}));

test('several clicks add money only once', browsing(async ({ page, context }) => {
  const user = await startDemo(page);
  let release;
  const released = new Promise((resolve) => { release = resolve; });
  const sent = await intercept(context, (request) => request.url().endsWith('/deposits'), async (route) => {
    await released;
    await route.continue();
  });
  await page.getByTestId('top-up').fill('10');
  await page.getByTestId('top-up').press('Enter');
  await page.getByTestId('top-up').press('Enter');
  await page.getByTestId('top-up-10000').dblclick({ force: true });
  await page.getByTestId('top-up-submit').dblclick({ force: true });
  release();
  await eventually(async () => assert.equal(await balance(page), 100_000 - 1_299 + 1_000));
  await page.getByTestId('top-up-10000').click();
  await eventually(async () => assert.equal(await balance(page), 100_000 - 1_299 + 11_000));
  assert.equal(sent.keys.length, 2);
  assert.equal(await balanceOf(user), await balance(page));
}));
