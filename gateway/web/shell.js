// The same from a shell: with curl, with a recipe of this repository, with the nats CLI.

/// Where the broker is, the page is not told: the reader's nats context or NATS_URL says it.
const NATS = 'nats --user viewer --password viewer';

export function curl(path) {
  return ['curl', `curl -s ${quoted(location.origin + path)}`];
}

export function curlPost(path, body, key) {
  const data = body ? ` -H 'Content-Type: application/json' -d ${quoted(JSON.stringify(body))}` : ' -X POST';
  return ['curl', `curl -s ${quoted(location.origin + path)}${key ? ` -H ${quoted(`Idempotency-Key: ${key}`)}` : ''}${data}`];
}

export function just(recipe) {
  return ['just', `just ${recipe}`];
}

export function nats(command) {
  return ['nats', `${NATS} ${command}`];
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
