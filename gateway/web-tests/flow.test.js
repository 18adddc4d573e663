// The operator's view.

import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { test } from 'node:test';
import { browsing } from './browser.js';
import { customer, get, order, paid, publish, sql, without } from './stack.js';

const AWAY = [/status of 503/];

function headers(type, subject) {
  return { 'ce-specversion': '1.0', 'ce-id': randomUUID(), 'ce-type': type, 'ce-subject': subject };
}

test('the flow view shows backlog, age and rates of each service', browsing({ tolerated: AWAY }, async ({ page }) => {
  const user = await customer();
  await page.getByTestId('nav-flow').click();
  for (const service of ['orders', 'payments']) {
    const card = page.getByTestId(`service-${service}`);
    for (const figure of ['outbox', 'consumer', 'set-aside']) assert.match(await card.getByTestId(figure).locator('.figure-value').textContent(), /^\d+$/);
  }
  await page.getByTestId('service-orders').filter({ hasText: 'orders-payment-settled' }).waitFor();
  await page.getByTestId('service-payments').filter({ hasText: 'payments-order-placed' }).waitFor();
  await paid(user, 1);
  // The plots show completed intervals of five seconds.
  await page.getByTestId('rates').locator('.figure').filter({ hasText: 'Paid' }).filter({ hasNotText: 'peak 0/s' }).waitFor();
  await without('payments', async () => {
    await order(user, 1);
    await page.getByTestId('new').filter({ hasText: /1[\s\S]*oldest: \d/ }).waitFor();
    await page.getByTestId('letters-missing').filter({ hasText: 'payments does not answer' }).waitFor();
  });
  await page.getByTestId('new').filter({ hasText: 'nothing waiting' }).waitFor();
  await page.getByTestId('service-payments').getByTestId('outbox').waitFor();
}));

test('dead letters show their cause and are replayed once, after a preview', browsing(async ({ page }) => {
  // An unreadable message, and an answer about an unknown order, as after a restored database.
  const user = await customer();
  const [unreadable, unknown] = [randomUUID(), randomUUID()];
  await publish('orders', 'gozon.orders.placed', headers('gozon.order.placed.v9', unreadable), '<b>garbage</b>');
  const answer = { order_id: unknown, user_id: user, amount: 7, outcome: 'declined', reason: 'no_account' };
  await publish('payments', 'gozon.payments.settled', headers('gozon.payment.settled.v1', unknown), JSON.stringify(answer));
  await page.getByTestId('nav-flow').click();
  const about = (order) => page.getByTestId('letter').filter({ has: page.locator(`a[href$="${order}"]`) });
  const [garbage, early] = [about(unreadable), about(unknown)];
  await garbage.filter({ hasText: 'poison' }).filter({ hasText: 'gozon.order.placed.v9' }).waitFor();
  await early.filter({ hasText: 'quarantined' }).waitFor();
  const { poison } = (await get('/v1/ops/flow')).payments;
  await page.getByTestId('service-payments').getByTestId('set-aside').filter({ hasText: `${poison} poison` }).waitFor();
  await garbage.getByText('Message', { exact: true }).click();
  assert.equal(await garbage.locator('pre').last().textContent(), '<b>garbage</b>');

  // A replay of either has no effect yet.
  await page.getByTestId('replay-all').click();
  const dialog = page.getByTestId('replay-dialog');
  await dialog.getByTestId('replay-useless').waitFor();
  const foreseen = await dialog.getByTestId('preview').evaluateAll((all) => all.map((one) => one.dataset.outcome));
  assert.deepEqual(new Set(foreseen), new Set(['poison', 'quarantine']));
  assert.equal(await dialog.getByTestId('replay-apply').count(), 0);
  await page.keyboard.press('Escape');
  await dialog.waitFor({ state: 'detached' });

  // Insert the order with a request that counts as published just now, so that it is not re-asked.
  await sql('orders', `WITH request AS (
      INSERT INTO outbox (event_id, subject, headers, payload, published_at, stream_sequence)
      VALUES ('${randomUUID()}', 'gozon.orders.placed', '{}', '{}', now(), 1) RETURNING event_id)
    INSERT INTO orders (id, user_id, amount, description, idempotency_key, request_hash, placed_event_id, created_at, updated_at)
    SELECT '${unknown}', '${user}', 7, 'Restored', '${unknown}', '', event_id, now(), now() FROM request`);
  await page.getByTestId('replay-all').click();
  await dialog.getByTestId('replay-apply').filter({ hasText: 'Replay 1 message' }).waitFor();
  await dialog.locator('[data-test=preview][data-outcome=applied]').filter({ hasText: 'The order ends CANCELLED: no_account.' }).waitFor();
  assert.equal((await get(`/v1/orders/${unknown}`)).status, 'NEW');
  await dialog.getByTestId('replay-apply').click();
  await dialog.getByTestId('replay-summary').filter({ hasText: 'Replayed: applied: 1' }).waitFor();
  assert.equal((await get(`/v1/orders/${unknown}`)).status, 'CANCELLED');
  await dialog.getByRole('button', { name: 'Close' }).last().click();
  await early.and(page.locator('[data-waits=false]')).filter({ hasText: 'Replayed' }).waitFor();
  assert.equal(await garbage.getAttribute('data-waits'), 'true');
  assert.equal(await early.getByTestId('replay').count(), 0);
  await early.locator('.order-link').click();
  await page.getByRole('heading', { name: 'Restored' }).waitFor();
  assert.equal(await page.getByTestId('status').first().getAttribute('data-status'), 'CANCELLED');
}));

test('loading older dead letters can be retried after an error', browsing({ tolerated: [/net::ERR_FAILED/] }, async ({ page, context }) => {
  let fails = true;
  await context.route('**/v1/ops/dead-letters?*', (route) => {
    const older = route.request().url().includes('cursor=');
    if (older && fails) return route.abort();
    return route.fulfill({ json: { items: [], next_cursor: older ? null : 'older', unavailable: [] } });
  });
  await page.getByTestId('nav-flow').click();
  const letters = page.getByTestId('dead-letters');
  await letters.getByTestId('more').click();
  await letters.getByTestId('problem').waitFor();
  fails = false;
  await letters.getByTestId('more').click();
  await letters.getByTestId('more').waitFor({ state: 'detached' });
  assert.equal(await letters.getByTestId('problem').count(), 0);
}));

test('the rates count an order once, however often its event is repeated', browsing({ noPage: true }, async ({ open, context }) => {
  const order_id = randomUUID();
  const at = new Date().toISOString();
  const events = ['NEW', 'NEW', 'FINISHED', 'FINISHED'].map((status, n) => `id: ${n}\nevent: order\ndata: ${JSON.stringify({ order_id, user_id: 'nobody', amount: 1, status, at })}\n\n`);
  await context.route('**/v1/orders/events*', (route) => route.fulfill({ contentType: 'text/event-stream', body: events.join('') }));
  const page = await open('#/flow');
  const rates = page.getByTestId('rates').locator('.figure');
  for (const name of ['Placed', 'Paid']) await rates.filter({ hasText: name }).filter({ hasText: 'peak 0.2/s' }).waitFor();
}));
