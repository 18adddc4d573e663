// The same from a shell: with curl, with a recipe of this repository, with the nats CLI.

const NATS = 'nats --server nats://viewer:viewer@127.0.0.1:4222';

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
