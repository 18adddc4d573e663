// Lists, timelines and statements show what is stored.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { browsing, drawn, held } from './browser.js';
import { balanceOf, base, customer, ended, eventually, get, order, ordersOf, paid, sayAgain, timeline } from './stack.js';

const STEPS = [
  'orders placed', 'orders enqueued', 'orders published',
  'payments taken', 'payments decided', 'payments enqueued', 'payments published',
  'orders taken', 'orders ended', 'orders enqueued', 'orders published',
];

function steps(page) {
  return page.getByTestId('step').evaluateAll((steps) => steps.map(({ dataset }) => `${dataset.service} ${dataset.step}`));
}

/// The text of the shell commands.
async function commands(within) {
  await within.locator('summary').click();
  return within.locator('code').allTextContents();
}

test('a timeline shows every step with its time, and its message with headers and payload', browsing({ permissions: ['clipboard-read', 'clipboard-write'] }, async ({ page }) => {
  const user = await customer(1_000);
  const id = await paid(user, 70, 'A present');
  await page.goto(`${base}/#/orders/${id}`);
  await eventually(async () => assert.deepEqual(await steps(page), STEPS));
  // Publications are recorded a little later.
  const { steps: expected } = await timeline(id);
  // The currency comes with the account, which is another request.
  await eventually(async () => assert.match(await page.getByTestId('step').nth(4).innerText(), /paid and debited[\s\S]*balance ₽9\.30/));
  const texts = await page.getByTestId('step').allInnerTexts();
  for (const [n, text] of texts.entries()) assert.match(text, n === 0 ? /POST \/v1\/orders → 201/ : /\+[\d.,]+\s?(ms|sec)|same time/, text);
  assert.equal(await page.getByTestId('slowest').count(), 1);
  assert.match(await page.getByTestId('took').textContent(), /[\d.]+ (ms|sec)/);
  const widths = await page.getByTestId('bar').locator('rect').evaluateAll((parts) => parts.map((part) => Number(part.getAttribute('x')) + Number(part.getAttribute('width'))));
  assert.ok(Math.abs(Math.max(...widths) - 100) < 1, `the bar ends at ${Math.max(...widths)}`);

  await page.getByTestId('message').first().click();
  const drawer = page.getByTestId('drawer');
  const request = expected.find((step) => step.step === 'enqueued');
  for (const [name, value] of Object.entries({ ...request.message.headers, 'ce-id': request.event_id })) {
    await drawer.locator('.headers div').filter({ hasText: name }).filter({ hasText: value }).first().waitFor();
  }
  assert.deepEqual(JSON.parse(await drawer.locator('pre').textContent()), request.message.payload);
  const { stream_sequence: place } = expected.find((step) => step.step === 'published');
  const shell = await commands(drawer.getByTestId('shell'));
  assert.deepEqual(shell, ['./dev peek ORDERS', `nats --user viewer --password viewer stream get ORDERS ${place}`]);
  await drawer.getByRole('button', { name: 'Copy as nats' }).click();
  await eventually(async () => assert.equal(await page.evaluate(() => navigator.clipboard.readText()), shell[1]));
  await page.keyboard.press('Escape');
  await drawer.waitFor({ state: 'detached' });
  const [curl, dev] = await commands(page.locator('main > [data-test=shell]'));
  assert.equal(curl, `curl -s '${base}/v1/orders/${id}/timeline'`);
  assert.equal(dev, `./dev trace ${id}`);
}));

test('duplicate messages are shown as ignored and change nothing', browsing(async ({ page }) => {
  const user = await customer(1_000);
  const id = await paid(user, 70);
  await timeline(id);
  await page.goto(`${base}/#/orders/${id}`);
  await eventually(async () => assert.deepEqual(await steps(page), STEPS));
  await sayAgain(id, 'orders');
  await sayAgain(id, 'orders');
  await sayAgain(id, 'payments');
  await timeline(id, 13);
  await page.reload();
  const repeated = page.locator('[data-step=repeated]');
  await repeated.nth(1).waitFor();
  assert.equal(await page.locator('[data-step=repeated][data-service=payments]').count(), 1);
  await repeated.filter({ hasText: 'OrderPlaced received again 2 times and ignored' }).waitFor();
  await repeated.filter({ hasText: 'PaymentSettled received again and ignored' }).waitFor();
  assert.match(await repeated.first().textContent(), /Recognised as a duplicate\. Nothing was changed\./);
  assert.equal(await repeated.first().locator('.step-body').evaluate((body) => getComputedStyle(body).borderTopStyle), 'dashed');
  assert.equal(await page.getByTestId('status').first().getAttribute('data-status'), 'FINISHED');
  assert.equal(await balanceOf(user), 930);
}));

test('a statement adds up to the balance on every page and links to its orders', browsing(async ({ page }) => {
  const user = await customer(10_000);
  const ids = await Promise.all(Array.from({ length: 60 }, () => paid(user, 100)));
  const entries = (await get(`/v1/accounts/${user}/entries?limit=100`)).items;
  assert.equal(entries.reduce((sum, { amount }) => sum + amount, 0), await balanceOf(user));
  await page.goto(`${base}/#/accounts/${user}`);
  const sums = page.getByTestId('sums');
  await sums.filter({ hasText: 'The newest 50 of 61 entries add up' }).waitFor();
  await page.getByTestId('check-all').click();
  await sums.filter({ hasText: 'All 61 entries add up to the balance' }).waitFor();
  assert.equal(await sums.getAttribute('data-match'), 'true');
  assert.match(await page.getByTestId('entry').first().innerText(), /-₽1\.00\s*₽40\.00/);
  assert.match(await page.getByTestId('entry').last().innerText(), /\+₽100\.00\s*₽100\.00/);
  const links = await page.getByTestId('entry').getByRole('link').evaluateAll((links) => links.map((link) => link.hash.split('/').at(-1)));
  assert.deepEqual(links.sort(), ids.sort());
  await paid(user, 5);
  await sums.filter({ hasText: 'All 62 entries' }).waitFor();
}));

test('a statement that does not add up is reported (here the API omits an entry)', browsing(async ({ page, context }) => {
  const user = await customer(10_000);
  await paid(user, 100);
  await paid(user, 200);
  await context.route('**/entries?*', async (route) => {
    const response = await route.fetch();
    const { items, ...rest } = await response.json();
    await route.fulfill({ response, json: { ...rest, items: items.filter(({ amount }) => amount !== -100) } });
  });
  await page.goto(`${base}/#/accounts/${user}`);
  await page.getByTestId('sums').filter({ hasText: 'do not add up' }).waitFor();
  assert.equal(await page.getByTestId('sums').getAttribute('data-match'), 'false');
}));

test('orders are filtered by status and user, found by id, and loaded page by page', browsing({ tolerated: [/status of 404/] }, async ({ page }) => {
  const user = await customer(10_000);
  const other = await customer(10_000);
  await Promise.all(Array.from({ length: 24 }, (_, n) => paid(user, 10 + n)));
  const { id: declined } = await order(user, 50_000, 'Too dear');
  assert.equal((await ended(declined)).status, 'CANCELLED');
  await paid(other, 1);
  await page.getByTestId('nav-orders').click();
  const shown = () => page.getByTestId('order').evaluateAll((rows) => rows.map((row) => row.dataset.id));
  // Other tests place orders too, so the first row is not known.
  await eventually(async () => assert.ok((await shown()).length >= 20));
  await page.getByTestId('search').fill(user);
  await page.keyboard.press('Enter');
  await eventually(async () => assert.equal((await shown())[0], declined));
  assert.equal((await shown()).length, 20);
  await page.getByTestId('more').click();
  const all = (await ordersOf(user)).map(({ id }) => id);
  await eventually(async () => assert.deepEqual(await shown(), all));
  await page.getByTestId('filter-CANCELLED').click();
  await eventually(async () => assert.deepEqual(await shown(), [declined]));
  assert.match(page.url(), /status=CANCELLED&user_id=/);
  await page.reload();
  await eventually(async () => assert.deepEqual(await shown(), [declined]));
  const time = page.locator('time').first();
  assert.match(await time.textContent(), /ago|now/);
  assert.match(await time.getAttribute('title'), /20\d\d.*\d\d:\d\d/);
  await page.getByTestId('filter-user').click();
  await page.getByTestId('filter-all').click();
  await eventually(async () => assert.ok((await shown()).some((id) => !all.includes(id))));
  await page.getByTestId('search').fill(` ${declined.toUpperCase()} `);
  await page.keyboard.press('Enter');
  await page.getByRole('heading', { name: 'Too dear' }).waitFor();
  await page.goto(`${base}/#/orders/01933f3c-7d5a-7b60-9d6f-000000000000`);
  await page.locator('[data-test=problem][data-code=order_not_found]').waitFor();
}));

test('a list requests the accounts of its orders until one of them has the currency', browsing({ noPage: true, tolerated: [/status of 404/] }, async ({ open, context }) => {
  const user = await customer(5_000);
  const nobody = `${user}-nobody`;
  const ids = [(await order(nobody, 1_299)).id, await paid(user, 1_299)];
  const items = [await ended(ids[0]), await get(`/v1/orders/${ids[1]}`)];
  // Other tests place orders meanwhile.
  await context.route('**/v1/orders?*', (route) => route.fulfill({ json: { items, next_cursor: null } }));
  const accounts = await held(context, `**/v1/accounts/${user}`);
  const page = await open('#/orders');
  const amount = (id) => page.locator(`[data-test=order][data-id="${id}"] .money`);
  await amount(ids[0]).filter({ hasText: /^12\.99$/ }).waitFor();
  accounts.release();
  for (const id of ids) await amount(id).filter({ hasText: '₽12.99' }).waitFor();
}));

test('a statement restarts when more than a page of entries is new, and adds up', browsing(async ({ page, context }) => {
  const user = await customer(10_000);
  await page.goto(`${base}/#/accounts/${user}`);
  const sums = page.getByTestId('sums');
  await sums.filter({ hasText: 'The only entry adds up' }).waitFor();
  const account = await held(context, `**/v1/accounts/${user}`);
  await Promise.all(Array.from({ length: 55 }, () => paid(user, 100)));
  account.release();
  await sums.filter({ hasText: 'The newest 50 of 56 entries add up' }).waitFor();
  await page.getByTestId('check-all').click();
  await sums.filter({ hasText: 'All 56 entries add up to the balance' }).waitFor();
}));

test('after an error, loading older entries can be retried, and the loaded ones stay', browsing({ tolerated: [/net::ERR_FAILED/] }, async ({ page, context }) => {
  const user = await customer(10_000);
  await Promise.all(Array.from({ length: 52 }, () => paid(user, 100)));
  await page.goto(`${base}/#/accounts/${user}`);
  await page.getByTestId('entry').nth(49).waitFor();
  const older = '**/entries?*cursor=*';
  await context.route(older, (route) => route.abort());
  await page.getByTestId('more').click();
  await page.getByTestId('problem').waitFor();
  assert.equal(await page.getByTestId('entry').count(), 50);
  await context.unroute(older);
  await page.getByTestId('more').click();
  await page.getByTestId('sums').filter({ hasText: 'All 53 entries' }).waitFor();
  assert.equal(await page.getByTestId('problem').count(), 0);
}));

test('older orders that arrive after another user was selected are ignored', browsing(async ({ page, context }) => {
  const [user, other] = [await customer(10_000), await customer(10_000)];
  await Promise.all(Array.from({ length: 22 }, () => paid(user, 1)));
  const id = await paid(other, 2);
  const shown = () => page.getByTestId('order').evaluateAll((rows) => rows.map((row) => row.dataset.id));
  await page.goto(`${base}/#/orders?user_id=${user}`);
  await page.getByTestId('order').nth(19).waitFor();
  const older = await held(context, '**/v1/orders?*cursor=*');
  const came = page.waitForEvent('requestfinished', (request) => request.url().includes('cursor='));
  await page.getByTestId('more').click();
  await eventually(() => older.asked > 0);
  await page.getByTestId('search').fill(other);
  await page.keyboard.press('Enter');
  await eventually(async () => assert.deepEqual(await shown(), [id]));
  older.release();
  await came;
  await drawn(page);
  assert.deepEqual(await shown(), [id]);
}));

test('the keyboard controls search, rows, views and help', browsing(async ({ page }) => {
  const user = await customer(10_000);
  for (const what of ['one', 'two', 'three']) await paid(user, 1, what);
  const focus = () => page.evaluate(() => document.activeElement.dataset.test ?? document.activeElement.textContent);
  const focused = (what) => eventually(async () => assert.equal(await focus(), what));
  await page.keyboard.press('/');
  await focused('search');
  await page.keyboard.type(`${user}/j`);
  assert.equal(await page.getByTestId('search').inputValue(), `${user}/j`);
  await page.getByTestId('search').fill(user);
  await page.keyboard.press('Enter');
  await eventually(async () => assert.equal(await page.getByTestId('order').count(), 3));
  await page.locator('h1').focus();
  await page.keyboard.press('j');
  await focused('three');
  await page.keyboard.press('j');
  await focused('two');
  await page.keyboard.press('j');
  await page.keyboard.press('j');
  await focused('one');
  await page.keyboard.press('k');
  await focused('two');
  await page.keyboard.press('Enter');
  await page.getByTestId('timeline').waitFor();
  await focused('two');
  assert.equal(await page.evaluate(() => document.activeElement.tagName), 'H1');
  await page.keyboard.press('?');
  await page.getByTestId('keys').waitFor();
  await page.keyboard.press('Escape');
  await page.getByTestId('keys').waitFor({ state: 'detached' });
  for (const [key, view] of [['a', 'accounts'], ['f', 'flow'], ['o', 'orders'], ['s', 'shop']]) {
    await page.keyboard.press('g');
    await page.keyboard.press(key);
    await page.locator(`main[data-view=${view}]`).waitFor();
  }
  // A keyboard layout without Latin letters; the same physical keys.
  for (const [key, code] of [['п', 'KeyG'], ['щ', 'KeyO']]) {
    await page.evaluate((pressed) => document.body.dispatchEvent(new KeyboardEvent('keydown', { ...pressed, bubbles: true })), { key, code });
  }
  await page.locator('main[data-view=orders]').waitFor();
  await page.reload();
  await page.locator('main h1').waitFor();
  await page.keyboard.press('Tab');
  await focused('Skip to the content');
  await page.keyboard.press('Enter');
  assert.equal(await page.evaluate(() => document.activeElement.tagName), 'H1');
}));

test('an unknown address shows that the page was not found', browsing({ path: '#/nowhere' }, async ({ page }) => {
  assert.equal(await page.locator('h1').textContent(), 'Page not found');
  assert.equal(await page.title(), 'Page not found · Gozon');
  await page.locator('main').getByRole('link', { name: 'Shop' }).click();
  await page.getByTestId('demo').waitFor();
}));
