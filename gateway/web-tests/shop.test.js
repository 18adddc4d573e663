// The customer's view.

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { balance, browsing, orderWith, startDemo } from './browser.js';
import { balanceOf, customer, eventually, get, order, ordersOf } from './stack.js';

const LAMP = 1_299;

test('the demo button opens an account, adds money and places an order, which is paid', browsing(async ({ page }) => {
  const buttons = page.locator('main button');
  assert.equal(await buttons.count(), 1);
  const user = await startDemo(page);
  await eventually(async () => assert.equal(await balance(page), 100_000 - LAMP));
  assert.equal(await balanceOf(user), 100_000 - LAMP);
  assert.deepEqual((await ordersOf(user)).map(({ status, amount }) => [status, amount]), [['FINISHED', LAMP]]);
}));

test('the balance is updated by paid orders, including those of another client', browsing(async ({ page }) => {
  const user = await startDemo(page);
  await eventually(async () => assert.equal(await balance(page), 100_000 - LAMP));
  await page.evaluate(() => { window.stayed = true; });
  await page.getByTestId('buy-tea').click();
  await eventually(async () => assert.equal(await balance(page), 100_000 - LAMP - 450));
  await order(user, 1_000, 'From elsewhere');
  await orderWith(page, 'FINISHED').filter({ hasText: 'From elsewhere' }).waitFor();
  await eventually(async () => assert.equal(await balance(page), 100_000 - LAMP - 1_450));
  await page.getByTestId('top-up').fill('12,5');
  await page.getByTestId('top-up-submit').click();
  await eventually(async () => assert.equal(await balance(page), 100_000 - LAMP - 1_450 + 1_250));
  assert.equal(await orderWith(page, 'FINISHED').count(), 3);
  assert.ok(await page.evaluate(() => window.stayed), 'the page was loaded again');
  assert.equal(await balanceOf(user), await balance(page));
}));

test('an order that cannot be paid is cancelled with a reason and costs nothing', browsing(async ({ page }) => {
  const user = await startDemo(page);
  await page.getByTestId('buy-bike').click();
  const cancelled = orderWith(page, 'CANCELLED');
  await cancelled.waitFor();
  assert.match(await cancelled.getByTestId('status').innerText(), /Cancelled\s*not enough money/);
  await eventually(async () => assert.match(await page.getByTestId('announcement').textContent(), /1,250\.00: Cancelled/));
  assert.equal(await balanceOf(user), 100_000 - LAMP);
  await cancelled.getByRole('link').click();
  await page.locator('[data-test=step][data-step=decided]').filter({ hasText: 'nothing debited' }).waitFor();
}));

test('an invalid amount is reported at its field, by the page or by the API, and nothing is ordered', browsing({ tolerated: [/status of 422/] }, async ({ page }) => {
  const user = await startDemo(page);
  const field = page.getByTestId('order-amount');
  const error = page.getByTestId('order-amount-error');
  for (const [typed, said] of [['abc', /Enter an amount/], ['1.234', /Enter an amount/], ['0', /greater than zero/]]) {
    await field.fill(typed);
    await page.getByTestId('place').click();
    await error.filter({ hasText: said }).waitFor();
    assert.equal(await field.getAttribute('aria-invalid'), 'true');
    assert.equal(await field.getAttribute('aria-describedby'), await error.getAttribute('id'));
    assert.equal(await page.getByTestId('problem').count(), 0);
  }
  assert.equal((await ordersOf(user)).length, 1);
  await field.fill('0.01');
  assert.equal(await error.count(), 0);
  await page.getByTestId('place').click();
  await eventually(async () => assert.equal((await ordersOf(user))[0].amount, 1));
}));

test('a description is shown as text, whatever it contains', browsing(async ({ page }) => {
  await startDemo(page);
  const markup = '<img src=x onerror="document.title=1"><b>bold</b> &amp; \u202e';
  await page.getByTestId('order-amount').fill('1');
  await page.getByTestId('order-description').fill(markup);
  await page.getByTestId('place').click();
  const row = page.getByTestId('order').filter({ hasText: 'onerror' });
  await row.waitFor();
  assert.equal(await row.locator('.row-title').textContent(), markup);
  await row.getByRole('link').click();
  await page.getByTestId('timeline').waitFor();
  assert.equal(await page.locator('h1').textContent(), markup);
  assert.equal(await page.locator('main img, main b').count(), 0);
}));

test('a Russian browser gets Russian texts, and another chosen language is remembered', browsing({ locale: 'ru-RU', noPage: true }, async ({ open }) => {
  const page = await open();
  assert.equal(await page.locator('html').getAttribute('lang'), 'ru');
  assert.equal(await page.getByTestId('nav-shop').textContent(), 'Магазин');
  await startDemo(page);
  await page.getByTestId('buy-bike').click();
  const cancelled = orderWith(page, 'CANCELLED');
  await cancelled.filter({ hasText: 'не хватает денег' }).waitFor();
  assert.match(await cancelled.innerText(), /1\s250,00\s₽/);
  await page.getByTestId('language-en').click();
  await cancelled.filter({ hasText: 'not enough money' }).waitFor();
  await page.reload();
  await cancelled.filter({ hasText: 'not enough money' }).waitFor();
  assert.equal(await page.locator('html').getAttribute('lang'), 'en');
  assert.match(await page.title(), /^Shop/);
}));

test('an account is opened by name, and the user can switch between two accounts', browsing({ tolerated: [/status of 404/] }, async ({ page }) => {
  const rich = await customer(5_000);
  const name = `${rich}-new`;
  await page.getByTestId('nav-accounts').click();
  await page.getByTestId('user').fill('no spaces please');
  await page.getByTestId('user-go').click();
  await page.getByTestId('user-error').waitFor();
  await page.getByTestId('user').fill(name);
  await page.getByTestId('user-go').click();
  await page.getByTestId('open-account-submit').click();
  await eventually(async () => assert.equal(await balance(page), 0));
  assert.equal((await get(`/v1/accounts/${name}`)).balance, 0);
  await page.goto(`${page.gozonUrl}/#/accounts/${rich}`);
  await page.getByTestId('shop-as').click();
  await eventually(async () => assert.equal(await balance(page), 5_000));
  await page.getByTestId('switch-user').selectOption(name);
  await eventually(async () => assert.equal(await balance(page), 0));
  await page.getByTestId('top-up-10000').click();
  await eventually(async () => assert.equal(await balanceOf(name), 10_000));
  assert.equal(await balanceOf(rich), 5_000);
}));

test('while the digits of the currency are unknown, no amount can be entered or sent', browsing({ tolerated: [/status of 503/] }, async ({ page, context }) => {
  const user = await customer(5_000);
  let away = true;
  await context.route(`**/v1/accounts/${user}`, (route) => (away ? route.fulfill({ status: 503, json: { status: 503, code: 'service_unavailable', title: 'Away' } }) : route.fallback()));
  await page.goto(`${page.gozonUrl}/#/accounts/${user}`);
  await page.getByTestId('shop-as').click();
  await page.getByText('The currency is not known yet').first().waitFor();
  for (const name of ['order-amount', 'place', 'buy-tea', 'top-up', 'top-up-submit', 'top-up-10000']) assert.ok(await page.getByTestId(name).isDisabled(), name);
  assert.match(await page.getByTestId('buy-lamp').innerText(), /\s12\.99$/);
  away = false;
  await page.getByTestId('order-amount').fill('12.99');
  await page.getByTestId('place').click();
  await eventually(async () => assert.deepEqual((await ordersOf(user)).map(({ amount }) => amount), [LAMP]));
}));

test('switching the language keeps the input and translates its error', browsing(async ({ page }) => {
  await startDemo(page);
  await page.getByTestId('order-amount').fill('much');
  await page.getByTestId('order-description').fill('A present');
  await page.getByTestId('place').click();
  await page.getByTestId('order-amount-error').filter({ hasText: 'Enter an amount' }).waitFor();
  await page.getByTestId('language-ru').click();
  await page.getByTestId('order-amount-error').filter({ hasText: 'Введите сумму' }).waitFor();
  assert.equal(await page.getByTestId('order-amount').inputValue(), 'much');
  assert.equal(await page.getByTestId('order-description').inputValue(), 'A present');
}));
