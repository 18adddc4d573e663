// Access to the stack under test: API, broker, databases and services.

import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { connect } from 'node:net';
import { promisify } from 'node:util';

const run = promisify(execFile);
const { GOZON_GATEWAY, GOZON_DIR, GOZON_PORT_OFFSET, GOZON_STACK } = process.env;
const NATS_PORT = 4222 + Number(GOZON_PORT_OFFSET);
const ORDERS_PORT = 8081 + Number(GOZON_PORT_OFFSET);
const DEADLINE_MS = 15_000;
const POLL_MS = 40;

export const base = GOZON_GATEWAY;

/// Waits until `check` neither throws nor returns false (undefined is a success). On a timeout
/// throws its last error.
export async function eventually(check, deadlineMs = DEADLINE_MS) {
  const deadline = Date.now() + deadlineMs;
  for (;;) {
    let problem;
    try {
      const found = await check();
      if (found === undefined || found) return found;
      problem = new Error(`not within ${deadlineMs} ms: ${check}`);
    } catch (error) {
      problem = error;
    }
    if (Date.now() > deadline) throw problem;
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

export async function get(path) {
  const response = await fetch(base + path);
  assert.equal(response.status, 200, path);
  return response.json();
}

export async function post(path, body) {
  const headers = { 'content-type': 'application/json', 'idempotency-key': randomUUID() };
  const response = await fetch(base + path, { method: 'POST', headers, body: JSON.stringify(body) });
  assert.ok(response.ok, `${path}: ${response.status}`);
  return response.json();
}

let customers = 0;

/// Creates a customer with money.
export async function customer(money = 100_000, name = `customer-${process.pid}-${++customers}`) {
  await post('/v1/accounts', { user_id: name });
  if (money) await post(`/v1/accounts/${name}/deposits`, { amount: money });
  return name;
}

export function order(user, amount, description = '') {
  return post('/v1/orders', { user_id: user, amount, description });
}

/// The order, when it is final.
export async function ended(id) {
  return eventually(async () => {
    const order = await get(`/v1/orders/${id}?wait=10`);
    return order.status !== 'NEW' && order;
  });
}

/// The same without the gateway.
export async function endedInside(id) {
  const orders = `http://127.0.0.1:${ORDERS_PORT}`;
  await eventually(async () => (await (await fetch(`${orders}/v1/orders/${id}`)).json()).status !== 'NEW');
}

export async function paid(user, amount, description) {
  const { id } = await order(user, amount, description);
  assert.equal((await ended(id)).status, 'FINISHED');
  return id;
}

export async function ordersOf(user) {
  return (await get(`/v1/orders?user_id=${user}&limit=100`)).items;
}

export async function balanceOf(user) {
  return (await get(`/v1/accounts/${user}`)).balance;
}

/// All steps of a final order, after its last message is published.
export async function timeline(id, steps = 11) {
  return eventually(async () => {
    const timeline = await get(`/v1/orders/${id}/timeline`);
    return timeline.steps.length >= steps && timeline;
  });
}

/// Runs `work` while a service or the gateway is stopped, and waits until it is ready again.
export async function without(service, work) {
  await stop(service);
  try {
    return await work();
  } finally {
    await start(service);
  }
}

export function stop(service) {
  return stack('stop', service);
}

/// Waits until it is ready.
export function start(service) {
  return stack('start', service);
}

function stack(...command) {
  return run(GOZON_STACK, ['--dir', GOZON_DIR, '--port-offset', GOZON_PORT_OFFSET, ...command]);
}

export function sql(database, statement) {
  return run('recipes/psql.sh', [database, '--quiet', '--set', 'ON_ERROR_STOP=1', '--command', statement]);
}

/// Publishes a message as the service `user` and waits until the stream has it.
export async function publish(user, subject, headers, body) {
  const secrets = JSON.parse(readFileSync(`${GOZON_DIR}/secrets.json`, 'utf8'));
  const inbox = `_INBOX_${user}.${randomUUID()}`;
  const lines = Object.entries({ ...headers, 'Nats-Msg-Id': randomUUID() }).map(([name, value]) => `${name}: ${value}\r\n`);
  const head = Buffer.from(`NATS/1.0\r\n${lines.join('')}\r\n`);
  const payload = Buffer.from(body);
  const socket = connect(NATS_PORT, '127.0.0.1');
  let answer = '';
  try {
    socket.setEncoding('utf8').on('data', (text) => { answer += text; });
    socket.write(`CONNECT ${JSON.stringify({ user, pass: secrets[`nats_${user}`], verbose: false, headers: true })}\r\nSUB ${inbox} 1\r\n`);
    socket.write(Buffer.concat([Buffer.from(`HPUB ${subject} ${inbox} ${head.length} ${head.length + payload.length}\r\n`), head, payload, Buffer.from('\r\n')]));
    await eventually(() => /^\{"stream":/m.test(answer)).catch(() => assert.fail(`the broker did not store it: ${answer}`));
  } finally {
    socket.destroy();
  }
}

/// Publishes a message of the order's timeline again, as a service without its database would.
export async function sayAgain(id, user) {
  const { steps } = await get(`/v1/orders/${id}/timeline`);
  const { event_id, message } = steps.find((step) => step.service === user && step.step === 'enqueued');
  await publish(user, message.subject, { 'ce-specversion': '1.0', 'ce-id': event_id, ...message.headers }, JSON.stringify(message.payload));
}
