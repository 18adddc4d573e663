// The REST API: reads, writes, and problem documents (RFC 9457) as errors.

const TIMEOUT_MS = 20_000;

export class Problem extends Error {
  constructor(document, retryAfterSeconds = 0) {
    super(document.detail);
    Object.assign(this, { status: 0, code: 'unreachable', title: '', detail: '', errors: [] }, document);
    this.retryAfterSeconds = retryAfterSeconds;
  }

  /// Whether the outcome is unknown, or a retry may succeed. Only a retry resolves it.
  get isOpen() {
    return this.status === 0 || this.status >= 500 || [408, 429].includes(this.status) || this.code === 'request_in_progress';
  }

  /// The error of one field of the request.
  at(pointer) {
    return this.errors.find((error) => error.pointer === pointer)?.detail;
  }
}

export async function read(path, { signal, timeoutMs = TIMEOUT_MS } = {}) {
  return (await request(path, { signal }, timeoutMs)).body;
}

/// Returns the answer, and whether it was replayed from an earlier request with this key.
export async function send(path, body, key, signal) {
  const headers = { 'content-type': 'application/json', 'idempotency-key': key };
  const { body: answer, response } = await request(path, { method: 'POST', headers, body: JSON.stringify(body), signal });
  return { answer, replayed: response.headers.get('idempotency-replayed') === 'true' };
}

export async function act(path) {
  return (await request(path, { method: 'POST' })).body;
}

async function request(path, options, timeoutMs = TIMEOUT_MS) {
  const late = AbortSignal.timeout(timeoutMs);
  const signal = options.signal ? AbortSignal.any([options.signal, late]) : late;
  let response;
  let body;
  try {
    response = await fetch(path, { ...options, signal });
    body = await response.json();
  } catch (error) {
    if (options.signal?.aborted) throw error;
    // An answer that is not JSON comes from a proxy in front of the gateway.
    throw new Problem({ status: response && !response.ok ? response.status : 0 }, retryAfter(response));
  }
  if (!response.ok) throw new Problem(body, retryAfter(response));
  return { body, response };
}

function retryAfter(response) {
  return Number(response?.headers.get('retry-after')) || 0;
}
